"""Where a resumed run goes on, what it reports, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ranks import run_ranks
from support.training import losses, tiny, train, trainer_of, write_faces

from train import checkpoint
from train.config import make_config
from train.data.identities import Identities, check_same
from train.data.image_list import ImageList, whole
from train.data.loader import ImageSource
from train.data.records import Encoded
from train.distributed import DistributedEnv
from train.errors import UserError
from train.main import main
from train.run_folder import read_metrics
from train.schedule import Course, learning_rate


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 6 identities."""
    return write_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


def course(images: int, *place: int, **train: Any) -> Course:
    return Course(make_config(("test", {"train": train})).train, images, *place)


SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "polynomial", "warmup_epochs": 1.5},
    {"schedule": "cosine", "max_steps": 17},
    {"schedule": "step", "milestones": [1, 2.5]},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["schedule"])
@pytest.mark.parametrize(("images", "batch"), [(23, 5), (3, 8), (24, 8)])
def test_a_run_that_is_cut_off_anywhere_has_the_course_of_one_that_is_not(
    images: int, batch: int, schedule: dict[str, Any]
) -> None:
    given = {"batch_size": batch, "epochs": 5, **schedule}
    one = course(images, **given)
    per_epoch = max(1, images // batch)
    assert one.total_steps == min(5 * per_epoch, schedule.get("max_steps", 10**9))
    for step in range(one.total_steps):
        epoch, done = one.place(step)
        assert (epoch, done // one.batch) == divmod(step, per_epoch)
        assert one.epochs(step) == step / per_epoch
        assert one.lr(step) == learning_rate(one.train, step, one.total_steps, per_epoch)
        again = course(images, step, epoch, done, **given)
        assert again.total_steps == one.total_steps
        for later in range(step, one.total_steps):
            assert (again.place(later), again.lr(later)) == (one.place(later), one.lr(later))


def test_batches_of_another_size_go_on_behind_the_images_that_were_seen() -> None:
    given = {"epochs": 3, "schedule": "cosine"}
    changed = course(23, 3, 1, 10, batch_size=3, **given)  # 13 images are left of the second epoch
    assert [changed.place(step) for step in range(3, 8)] == [
        (1, 10), (1, 13), (1, 16), (1, 19), (2, 0)
    ]  # fmt: skip
    assert changed.total_steps == 3 + 4 + 7
    rates = [changed.lr(step) for step in range(3, changed.total_steps)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01 * changed.train.lr + 1e-2
    # Its place in the schedule follows from images, not from steps.
    same = course(23, batch_size=3, **given)
    assert changed.lr(3) == pytest.approx(
        learning_rate(same.train, 7 + 10 / 3, same.total_steps, 7), rel=1e-12
    )
    assert course(23, 4, 0, 22, batch_size=3, **given).place(4) == (1, 0)  # no whole batch left
    # Cut off once more, it is the same to the last bit.
    for step in range(3, changed.total_steps):
        again = course(23, step, *changed.place(step), batch_size=3, **given)
        assert again.lr(step) == changed.lr(step)
        assert again.total_steps == changed.total_steps


def test_every_image_is_seen_once_in_an_epoch_whose_batches_change(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[int]] = []
    batches = ImageSource.batches

    def noted(self: ImageSource, indices: Any) -> Any:
        for rows, batch in zip(indices, batches(self, indices), strict=True):
            seen.append([int(row) for row in rows])
            yield batch

    monkeypatch.setattr(ImageSource, "batches", noted)
    train(tiny(faces, tmp_path, train={"epochs": 2}), stop_after=1)
    assert [len(rows) for rows in seen] == [8]
    assert main(["--resume", f"run.dir={tmp_path}", "train.batch_size=4", "train.lr=0.025"]) == 0
    assert [len(rows) for rows in seen] == [8] + [4] * (4 + 6)
    first, second = (sorted(np.concatenate(part).tolist()) for part in (seen[:5], seen[5:]))
    assert first == second == list(range(24))
    assert len(losses(tmp_path)) == 11
    assert [line["epoch"] for line in read_metrics(tmp_path)][4::6] == [1.0, 2.0]
    said = capsys.readouterr().out
    assert "last.pt at step 1 of 11, epoch 0.33\n  the same: identities, model, loss, " in said
    assert "differs: train.batch_size: 8, now 4 (the epoch goes on behind the images" in said
    assert "differs: train.lr: 0.05, now 0.025 (learning rate and end of the run)" in said
    assert "differs: learning rate of the next step: 0.0347222, now 0.0173611" in said


def test_differences_are_printed_once(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "faces", identities=4, images=4)
    run = tmp_path / "run"
    train(tiny(data, run, train={"max_steps": 1}))
    assert main(["--resume", f"run.dir={run}"]) == 0
    said = capsys.readouterr().out
    assert "at step 1 of 1, epoch 0.50\n" in said
    assert "\n  nothing differs\n  it is at its end: there is nothing left to train\n" in said
    (data / "person2" / "3.png").unlink()
    given = [
        "train.max_steps=2",
        "data.flip=0.25",
        "run.log_every=5",
        "loss.class_options.scale=32",
    ]
    assert main(["--resume", f"run.dir={run}", *given]) == 0
    said = capsys.readouterr().out
    assert "differs: loss.class_options: {}, now {'scale': 32} (from the next step on)" in said
    assert "differs: data.flip: 0.5, now 0.25 (from the next step on)" in said
    assert "differs: run.log_every: 1, now 5 (none on what is trained)" in said
    assert "images, in brackets now: 16 images (15), 4 of 'person2' (3)" in said
    assert "repeats and leaves out some" in said


def test_changes_that_cannot_be_meant_are_errors(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    sections = {"data": {"sampler": "balanced", "images_per_identity": 2}}
    train(tiny(faces, run, train={"epochs": 2}, **sections), stop_after=1)
    for override, message in (
        ("loss.class=arcface", "the state of loss.class=cosface, not of arcface; leave"),
        ("loss.pair=pair_bce", "the state of loss.pair=uss, not of pair_bce; leave"),
        ("train.max_steps=0 train.epochs=1 train.batch_size=4", "data.sampler=balanced makes"),
        ("data.images_per_identity=4", "data.sampler=balanced makes"),
        ("data.sampler=shuffle", ""),
    ):
        code = main(["--resume", f"run.dir={run}", *override.split()])
        error = capsys.readouterr().err
        if message:
            assert code == 2
            assert message in error
            assert error.count("\n") == 1
        else:
            assert code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 10**9}, "is of step 1000000000, and this run has 4 in all"),
        ({"step": 10**9, "epoch": 0, "images": 0}, "and this run has 4 in all"),
        ({"step": 1, "epoch": 0, "images": -8}, "is damaged: step 1, epoch 0, image -8"),
        ({"step": 1, "epoch": 0.5, "images": 8}, "is damaged: step 1, epoch 0.5, image 8"),
    ],
)
def test_a_step_that_cannot_be_is_no_end(
    faces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    message: str,
) -> None:
    config = tiny(faces, tmp_path, train={"max_steps": 4})
    values = trainer_of(config).state()
    for key in ("epoch", "images"):  # as earlier versions wrote it
        values["trainer"].pop(key)
    values["trainer"].update(change)
    checkpoint.save_atomically(values, tmp_path / checkpoint.LAST)
    assert main(["--resume", f"run.dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


# -- who is in the images -------------------------------------------------------------------------


def images_of(names: list[str], counts: list[int]) -> ImageList:
    labels = np.repeat(np.arange(len(names)), counts)
    return whole(Encoded([b""] * len(labels), "x"), labels, names)


OTHERS = [
    (["anna", "bert", "carla"], [2, 2, 2], ""),
    (
        ["anna", "bruno", "carla"],
        [2, 2, 2],
        r"identities \(3\), of which number 1 is 'bert' \('br",
    ),
    (["bert", "anna", "carla"], [2, 2, 2], r"number 0 is 'anna' \('bert'\)"),
    (["anna", "bert"], [2, 2], r"3 identities \(2\), of which number 2 is 'carla' \(none\)"),
    (["anna", "bert", "carla"], [2, 1, 3], r"6 images \(6\), 2 of 'bert' \(1\)"),
]


def _compare(rank: int, case: int) -> str:
    import torch

    names, counts, _ = OTHERS[case if rank == 1 else 0]
    try:
        check_same(
            DistributedEnv(rank, 3, torch.device("cpu")), "data.path", images_of(names, counts)
        )
    except UserError as error:
        return str(error)
    return ""


def _compare_all(rank: int) -> list[str]:
    return [_compare(rank, case) for case in range(len(OTHERS))]


def test_processes_compare_who_is_in_their_images() -> None:
    found = run_ranks(3, _compare_all)
    assert found[1:] == found[:1] * 2
    for said, (_, _, message) in zip(found[0], OTHERS, strict=True):
        if not message:
            assert not said
            continue
        assert said.startswith("data.path is not the same on all processes: process 0 has, and in")
        with pytest.raises(UserError, match=message):
            raise UserError(said)


def test_the_order_of_images_counts_too() -> None:
    images = images_of(["a", "b"], [2, 2])
    other = whole(images.records, [0, 1, 0, 1], ["a", "b"])
    ours, theirs = (Identities.of(i, in_order=True) for i in (images, other))
    assert ours.digest() != theirs.digest()
    assert ours.difference(theirs) == "the same identities, with their images in another order"
    assert ours.difference(Identities.of(images, in_order=True)) == ""
