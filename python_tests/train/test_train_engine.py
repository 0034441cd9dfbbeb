"""Training runs on a handful of tiny pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import (
    IRESNET,
    arguments,
    assert_same_state,
    losses,
    tiny,
    train,
    trainer_of,
    write_faces,
)

import unitsface_kernels
from train import checkpoint
from train.config import read_yaml, to_dict
from train.distributed import DistributedEnv
from train.errors import UserError
from train.main import main
from train.optimizer import build_optimizer
from train.run_folder import read_metrics
from train.step_clock import PARTS
from train.trainer import Trainer


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


# -- what a run leaves behind -------------------------------------------------------------------


def test_loss_falls_and_the_run_folder_is_complete(faces: Path, tmp_path: Path) -> None:
    config = tiny(faces, tmp_path, train={"epochs": 10}, run={"tensorboard": True, "save_every": 4})
    train(config)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["epoch"] == 10.0
    keys = "step, epoch, loss, class_loss, pair_loss, threshold, lr, images_per_s"
    keys += "".join(f", {part}_ms" for part in PARTS)
    assert ", ".join(lines[0]) == keys
    for line in lines:
        assert line["loss"] == pytest.approx(line["class_loss"] + line["pair_loss"], rel=1e-5)
        assert line["images_per_s"] > 0
    # Polynomial of power 2 over 20 steps.
    assert [line["lr"] for line in lines] == pytest.approx(
        [0.05 * (1 - k / 20) ** 2 for k in range(20)]
    )
    first, last = sum(losses(tmp_path)[:4]), sum(losses(tmp_path)[-4:])
    assert last < 0.5 * first
    assert lines[-1]["threshold"] != 0
    assert read_yaml(tmp_path / "config.yaml") == to_dict(config)
    assert list((tmp_path / "tensorboard").glob("events*"))
    saved = checkpoint.read_run(tmp_path / checkpoint.LAST)
    assert saved["trainer"]["step"] == 20
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]


def test_same_seed_same_run_other_seed_other_run(faces: Path, tmp_path: Path) -> None:
    augment = {"shift": 0.1, "zoom": 0.1, "rotation": 5, "brightness": 0.2, "contrast": 0.2}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tiny(faces, tmp_path / name, data=augment, run={"seed": seed}))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


RANDOM: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.2},  # uses the global generator
    "data": {"shift": 0.1, "brightness": 0.2, "crop": 0.3, "low_res": 0.3, "photometric": 0.3},
    "train": {"epochs": 3, "warmup_epochs": 0.5},
}


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An uninterrupted run."""
    return train(tiny(faces, tmp_path_factory.mktemp("whole"), **RANDOM))


@pytest.mark.parametrize(
    "stop_after",
    [pytest.param(2, marks=pytest.mark.extended), 3],
    ids=["between epochs", "within an epoch"],
)
def test_resumed_run_ends_bitwise_like_an_uninterrupted_one(
    faces: Path, whole: Trainer, tmp_path: Path, stop_after: int
) -> None:
    train(tiny(faces, tmp_path / "cut", **RANDOM), stop_after=stop_after)
    assert len(losses(tmp_path / "cut")) == stop_after
    # A line of a step after the checkpoint, as a killed process leaves it.
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": stop_after + 1, "loss": -1.0}) + "\n")
    assert main(["--resume", f"run.dir={tmp_path / 'cut'}"]) == 0
    resumed = checkpoint.read_run(tmp_path / "cut" / checkpoint.LAST)
    expected = whole.state()
    assert resumed["trainer"]["step"] == 6
    for part in ("backbone", "loss", "optimizer"):
        assert_same_state(resumed[part], expected[part])
    assert losses(tmp_path / "cut") == losses(Path(whole.config.run.dir))


# -- losses and precision -----------------------------------------------------------------------


def test_options_reach_the_losses_and_bad_ones_are_user_errors(faces: Path, tmp_path: Path) -> None:
    good = {"class_options": {"margin": 0.3, "scale": 16}, "pair_options": {"init_threshold": 8}}
    trainer = trainer_of(tiny(faces, tmp_path, loss=good))
    assert trainer.loss.threshold() == pytest.approx(8 / 64)
    assert "scale=16" in repr(trainer.loss.class_loss)
    for options, message in (
        ({"class_options": {"marign": 0.3}}, "loss.class_options.marign: cosface takes .*margin"),
        ({"class_options": {"scale": -1}}, "scale"),
        ({"pair_options": {"scale": "big"}}, "loss"),
        ({"backend": "abacus"}, "abacus"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_of(tiny(faces, tmp_path, loss=options))


def test_sum_of_the_losses_is_the_package_s_own(faces: Path, tmp_path: Path) -> None:
    loss = trainer_of(tiny(faces, tmp_path)).loss
    assert loss.class_loss is not None
    assert loss.pair_loss is not None
    features = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    total, class_term, pair_term = loss(features, labels)
    together = unitsface_kernels.UniTSFaceLoss(loss.class_loss, loss.pair_loss)
    torch.testing.assert_close(total, together(features, labels))
    torch.testing.assert_close(total, class_term + pair_term)


def test_loss_weights_scale_the_sum(faces: Path, tmp_path: Path) -> None:
    config = tiny(
        faces,
        tmp_path,
        loss={"class_weight": 0.5, "pair_weight": 3.0},
        train={"max_steps": 1},
    )
    train(config)
    line = read_metrics(tmp_path)[0]
    assert line["loss"] == pytest.approx(0.5 * line["class_loss"] + 3 * line["pair_loss"], rel=1e-5)


def test_threshold_has_its_own_rate_and_no_weight_decay(faces: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(faces, tmp_path, train={"threshold_lr": 0.5}))
    optimizer = build_optimizer(trainer.config, trainer.backbone, trainer.loss)
    weights, thresholds = optimizer.param_groups
    assert (weights["weight_decay"], thresholds["weight_decay"]) == (5e-4, 0.0)
    assert thresholds["lr_scale"] == 0.5
    assert [p.dim() for p in thresholds["params"]] == [0]
    parameters = weights["params"] + thresholds["params"]
    wanted = [p for p in trainer.module.parameters() if p.requires_grad]
    assert {id(p) for p in parameters} == {id(p) for p in wanted}


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_step_is_close_to_a_float32_step(faces: Path, tmp_path: Path, amp: str) -> None:
    for name in ("none", amp):
        train(tiny(faces, tmp_path / name, train={"amp": name, "max_steps": 1}))
    exact, rounded = losses(tmp_path / "none")[0], losses(tmp_path / amp)[0]
    assert rounded == pytest.approx(exact, rel=0.1)
    assert rounded != exact  # it did run in another precision
    saved = checkpoint.read_run(tmp_path / amp / checkpoint.LAST)
    assert all(v.dtype != torch.bfloat16 for v in saved["backbone"].values())


def test_diverging_run_stops_with_advice(faces: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(faces, tmp_path))
    with torch.no_grad():
        trainer.backbone.fc.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"loss is nan at step 1; try a smaller train\.lr"):
        trainer.fit(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


# -- checkpoints --------------------------------------------------------------------------------


def test_published_backbone_can_be_the_start(faces: Path, tmp_path: Path) -> None:
    source = trainer_of(tiny(faces, tmp_path, run={"seed": 7})).backbone.state_dict()
    torch.save(source, tmp_path / "backbone.pth")
    weights = {"weights": str(tmp_path / "backbone.pth")}
    trainer = trainer_of(tiny(faces, tmp_path, model=weights))
    assert_same_state(dict(trainer.backbone.state_dict()), dict(source))


def test_moved_run_resumes_where_it_lies_without_its_starting_weights(
    faces: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start.pth"
    torch.save(trainer_of(tiny(faces, tmp_path)).backbone.state_dict(), start)
    config = tiny(faces, tmp_path / "run", model={"weights": str(start)})
    train(config, stop_after=1)
    start.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert main(["--resume", str(tmp_path / "moved" / checkpoint.LAST)]) == 0
    assert len(losses(tmp_path / "moved")) == 4
    assert not (tmp_path / "run").exists()


def test_wrong_checkpoints_are_errors_that_name_their_content(faces: Path, tmp_path: Path) -> None:
    small = trainer_of(tiny(faces, tmp_path, model=IRESNET)).backbone.state_dict()
    torch.save(small, tmp_path / "small.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    for model, message in (
        (
            {"name": "iresnet34", "weights": "small.pth"},
            "small.pth holds iresnet18, not iresnet34 at 16 x 16",
        ),
        (
            {"input_size": 32, "weights": "small.pth"},
            "small.pth holds iresnet18 of another input size, not iresnet18 at 32 x 32",
        ),
        ({"weights": "list.pth"}, "holds no backbone"),
        ({"weights": "text.pth"}, "cannot read checkpoint .*text.pth"),
        ({"weights": "none.pth"}, "no such checkpoint: .*none.pth"),
    ):
        model["weights"] = str(tmp_path / str(model["weights"]))
        with pytest.raises(UserError, match=message):
            trainer_of(tiny(faces, tmp_path, model=IRESNET | model))


def test_resuming_needs_the_same_architecture_people_and_losses(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train(tiny(faces, folder, model=IRESNET, train={"max_steps": 1}))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = write_faces(tmp_path / "other", identities=3, images=4)
    for override, message in (
        ("model.name=iresnet34", "holds iresnet18, not iresnet34"),
        ("model.input_size=32", "iresnet18 of another input size"),
        (f"data.path={other}", "trained on other identities (4) than those of data.path (3)"),
        ("loss.pair=none", "holds another loss"),
    ):
        assert main(["--resume", f"run.dir={folder}", override]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    backbone_only = tmp_path / "backbone.pth"
    torch.save(torch.load(folder / checkpoint.LAST)["backbone"], backbone_only)
    assert main(["--resume", str(backbone_only)]) == 2
    assert "not a training checkpoint" in capsys.readouterr().err


def test_failed_save_keeps_the_old_checkpoint_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save_atomically({"step": 1}, path)

    def fail(values: object, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*disk full"):
        checkpoint.save_atomically({"step": 2}, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    assert checkpoint.read(path) == {"step": 1}


# -- the run folder -----------------------------------------------------------------------------


def test_unwritable_run_folder(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert main(arguments(tiny(faces, file / "run"))) == 2
    error = capsys.readouterr().err
    assert error == f"error: run.dir: {file} is not a folder\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_folder_with_a_run_is_not_overwritten_unless_asked(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(faces, tmp_path / "run", train={"max_steps": 1})
    assert main(arguments(config)) == 0
    assert main(arguments(config)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*arguments(config), "run.overwrite=true"]) == 0
    assert len(losses(tmp_path / "run")) == 1
    moved = tmp_path / "run.old-1"
    assert f"was moved to {moved}" in capsys.readouterr().out
    assert len(losses(moved)) == 1
    assert checkpoint.read_run(moved / checkpoint.LAST)["trainer"]["step"] == 1


def test_mistakes_in_the_data_leave_no_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=2, images=2)
    (data / "person1" / "1.png").write_bytes(b"broken")
    run = tmp_path / "run"
    assert main(arguments(tiny(data, run))) == 2
    assert "1.png" in capsys.readouterr().err
    assert main(arguments(tiny(tmp_path / "absent", run))) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(arguments(tiny(tmp_path / "empty", run))) == 2
    assert "no images" in capsys.readouterr().err
    assert not run.exists()


def test_what_other_processes_skipped_is_reported_too(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"x.png": "cannot read image x.png: it is empty"}

    def gather(self: DistributedEnv, value: Any) -> list[Any]:
        return [value, other] if isinstance(value, dict) else [value]

    monkeypatch.setattr(DistributedEnv, "gather_objects", gather)
    assert main(arguments(tiny(faces, tmp_path, train={"max_steps": 1}))) == 0
    assert capsys.readouterr().err.endswith(f"skipped 1 unreadable image(s):\n  {other['x.png']}\n")


def test_skipped_images_are_counted_and_the_held_out_people_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=6, images=4)
    (data / "person1" / "1.png").write_bytes(b"broken")
    run = tmp_path / "run"
    config = tiny(data, run, data={"on_error": "skip", "holdout": 2}, train={"epochs": 1})
    assert main(arguments(config)) == 0
    output = capsys.readouterr()
    assert "15 images of 4 identities" in output.out
    assert "skipped 1 unreadable image(s)" in output.err
    assert "person1" in output.err
    result = json.loads((run / "evaluation.json").read_text())
    assert (result["pairs"], result["positives"]) == (28, 12)
    assert 0 <= result["auc"] <= 1
    assert result["threshold"] == read_metrics(run)[-1]["threshold"]
