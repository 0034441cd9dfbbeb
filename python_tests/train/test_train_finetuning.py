"""Finetuning: classes are kept, dropped and added by name, with the optimizer's rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import tiny, train, trainer_of, write_faces
from test_train_partial_fc import argv_of, succeed
from torch.nn import functional as F

from train import checkpoint
from train.data.identities import unpack_names
from train.data.loader import open_images
from train.errors import USER_ERROR, UserError
from train.evaluation.embed import embed
from train.main import load_config, main
from train.starting.finetuning import finetune
from train.trainer import Trainer
from unitsface_kernels import partial_fc

# Labels of the checkpoint that the new identities have; person0 and person12 are new.
KEPT = {"person2": 1, "person4": 3}
NAMES = ["person0", "person2", "person4", "person12"]
SHARDS: dict[str, Any] = {"enabled": "always", "fused_optimizer": "backward"}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=5)


@pytest.fixture(scope="module")
def others(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of the people of before, and two that were not there."""
    folder = tmp_path_factory.mktemp("others")
    for name in NAMES:
        shutil.copytree(faces / (name if name in KEPT else "person1"), folder / name)
    return folder


def of(faces: Path, run: Path, **sections: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "conv4", "embedding_size": 24},
        "loss": {"class": "uce", "pair": "uss"},
    }
    for section, entries in sections.items():
        values[section] = {**values.get(section, {}), **entries}
    return tiny(faces, run, **values)


@pytest.fixture(scope="module")
def runs(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Trainer]]:
    """A run with whole class weights, and one with shards and a fused optimizer."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, partial in (("whole", {}), ("shards", SHARDS)):
        trainer = train(of(faces, folder / name, partial_fc=partial, train={"epochs": 1}))
        found[name] = (folder / name, trainer)
    return found


def started(others: Path, run: Path, **sections: dict[str, Any]) -> tuple[Trainer, str]:
    trainer = trainer_of(of(others, run.parent / "new", **sections))
    return trainer, finetune(trainer, run)


def weights(trainer: Trainer) -> torch.Tensor:
    head = trainer.loss.class_loss if trainer.head is None else trainer.head
    return head.weight


def assert_new_rows(trainer: Trainer, mean_norm: torch.Tensor) -> None:
    """The spherical mean of the features, as long as the rows that were kept are on average."""
    source = open_images(trainer.source.images, 16, on_error="fail", cache="always")
    features, labels = embed(trainer.backbone, source, torch.device("cpu"))
    unit = F.normalize(torch.from_numpy(features), dim=1)
    for label in (0, 3):
        mean = F.normalize(unit[labels == label].mean(0), dim=0)
        torch.testing.assert_close(weights(trainer)[label], mean * mean_norm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_classes_are_kept_dropped_and_added_by_name(
    runs: dict[str, tuple[Path, Trainer]], others: Path, kind: str
) -> None:
    run, before = runs[kind]
    partial = SHARDS if kind == "shards" else {}
    trainer, said = started(others, run, partial_fc=partial)
    step = before.step
    assert said == (
        f"finetuning {checkpoint.last(run)} of step {step}: 2 identities kept, 3 dropped, 2 new, "
        "which begin at their mean features"
    )
    assert trainer.source.images.identities == NAMES
    rows, old = [1, 2], [1, 3]
    kept = weights(before)[old]
    assert torch.equal(weights(trainer)[rows], kept)
    assert_new_rows(trainer, kept.norm(dim=1).mean())
    # Backbone, thresholds, and the state of the optimizer.
    for name, value in before.backbone.state_dict().items():
        assert torch.equal(trainer.backbone.state_dict()[name], value), name
    assert trainer.threshold() == before.threshold()
    momentum, buffer = (t.optimizer.state[weights(t)]["momentum_buffer"] for t in (before, trainer))
    assert buffer.shape == weights(trainer).shape
    assert torch.equal(buffer[rows], momentum[old])
    assert momentum[old].abs().sum() > 0
    assert not buffer[[0, 3]].any()
    pair = [t.loss.pair_loss.threshold for t in (before, trainer)]
    states = [t.optimizer.state[p] for t, p in zip((before, trainer), pair, strict=True)]
    assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])
    # It is a run of its own, from step 0, with the learning rates of its own configuration.
    assert trainer.step == 0
    assert trainer.optimizer.param_groups[0]["lr"] == 0.05


def test_shards_become_whole_and_whole_ones_shards(
    runs: dict[str, tuple[Path, Trainer]], others: Path
) -> None:
    for kind, partial in (("whole", SHARDS), ("shards", {})):
        run, before = runs[kind]
        trainer, said = started(others, run, partial_fc=partial)
        assert said.endswith("; the optimizer begins anew")
        assert not trainer.optimizer.state
        assert torch.equal(weights(trainer)[[1, 2]], weights(before)[[1, 3]])
        assert trainer.threshold() == before.threshold()


def test_another_loss_keeps_the_class_weights_alone(
    runs: dict[str, tuple[Path, Trainer]], others: Path
) -> None:
    run, before = runs["whole"]
    for loss in ("arcface", "epl"):  # the latter has its weights in another loss, and prototypes
        trainer, said = started(others, run, loss={"class": loss, "pair": "none"})
        assert said.endswith("the optimizer begins anew")
        assert torch.equal(weights(trainer)[[1, 2]], weights(before)[[1, 3]])
    prototypes = trainer.loss.class_loss.prototypes
    torch.testing.assert_close(prototypes[0], F.normalize(weights(trainer)[0], dim=0))
    trainer, said = started(others, run, loss={"class": "none"})
    assert said.endswith("3 dropped, 2 new; the optimizer begins anew")
    assert trainer.threshold() == before.threshold()


@pytest.mark.parametrize("before", [{"class": "none"}, {"class": "uce", "pair": "none"}])
def test_without_class_weights_of_this_shape_all_classes_are_new(
    faces: Path, others: Path, tmp_path: Path, before: dict[str, Any]
) -> None:
    train(of(faces, tmp_path / "run", loss=before, train={"max_steps": 1}))
    # Two centers: weights of another shape, of the same loss.
    loss = {**before, "class": "uce", "class_options": {"centers": 2}}
    trainer, said = started(others, tmp_path / "run", loss=loss)
    assert said.endswith(
        ": 0 identities kept, 5 dropped, 4 new, which begin at their mean features; it has no "
        "class weights of this shape; the optimizer begins anew"
    )
    source = open_images(trainer.source.images, 16, on_error="fail", cache="always")
    features, labels = embed(trainer.backbone, source, torch.device("cpu"))
    unit = F.normalize(torch.from_numpy(features), dim=1)
    for label, weight in enumerate(weights(trainer)[:, 0]):
        mean = F.normalize(unit[labels == label].mean(0), dim=0)
        torch.testing.assert_close(F.normalize(weight, dim=0), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", [{"state": 3}, {"param_groups": [4]}, {"state": {0: [1]}}])
def test_a_state_that_is_none_is_named(
    runs: dict[str, tuple[Path, Trainer]], others: Path, tmp_path: Path, damage: dict[str, Any]
) -> None:
    values = checkpoint.read(checkpoint.last(runs["whole"][0]))
    torch.save({**values, "optimizer": {**values["optimizer"], **damage}}, tmp_path / "run.pt")
    with pytest.raises(UserError, match=r"run\.pt holds no state of SGD"):
        started(others, tmp_path / "run.pt")


def test_adamw_several_centers_and_averages(faces: Path, others: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "loss": {"class": "arcface", "class_options": {"centers": 2}, "pair": "none"},
        "train": {"optimizer": "adamw", "lr": 0.01, "ema": 0.9, "max_steps": 2},
    }
    before = train(of(faces, tmp_path / "run", **sections))
    trainer, said = started(others, tmp_path / "run", **sections)
    assert "begins anew" not in said
    state, old = (t.optimizer.state[weights(t)] for t in (trainer, before))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key][[1, 2]], old[key][[1, 3]])
        assert not state[key][[0, 3]].any()
    assert state["step"] == old["step"] == 2
    # The averaged weights are what was trained. Of new classes the first center is the mean.
    assert trainer.ema is not None
    for module in (trainer.backbone, trainer.ema.module):
        for name, value in before.evaluated.state_dict().items():
            assert torch.equal(module.state_dict()[name], value), name
    first, second = weights(trainer)[0]
    norm = weights(before)[[1, 3]].norm(dim=2).mean()
    torch.testing.assert_close(first.norm(), norm)
    assert (second.norm() - norm).abs() > 1e-6


def test_fresh_takes_the_backbone_and_mistakes_are_named(
    runs: dict[str, tuple[Path, Trainer]], others: Path, tmp_path: Path
) -> None:
    run, before = runs["whole"]
    trainer, said = started(others, run, train={"finetune": str(run), "finetune_head": "fresh"})
    assert said.endswith(": its backbone")
    assert not trainer.optimizer.state
    assert not torch.equal(weights(trainer)[[1, 2]], weights(before)[[1, 3]])
    state = trainer.backbone.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.backbone.state_dict().items())
    with pytest.raises(UserError, match="conv4 at 16 x 16"):
        started(others, run, model={"embedding_size": 32})
    torch.save(before.backbone.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="not a training checkpoint of this harness"):
        started(others, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="the backbone can start from one only"):
        of(others, run, train={"finetune": "a"}, model={"weights": "b"})
    with pytest.raises(UserError, match=r"expected train\.finetune with it"):
        tiny(others, run, train={"finetune_head": "fresh"})


def test_the_command_trains_on_and_resumes(
    runs: dict[str, tuple[Path, Trainer]],
    others: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from support.training import arguments

    train_keys = {"finetune": str(runs["shards"][0]), "epochs": 1}
    config = of(others, tmp_path / "new", partial_fc=SHARDS, train=train_keys)
    assert main(arguments(config)) == 0
    assert "2 identities kept, 3 dropped, 2 new" in capsys.readouterr().out
    assert main(["--resume", f"run.dir={tmp_path / 'new'}", "train.epochs=2"]) == 0
    assert "finetuning" not in capsys.readouterr().out
    other = [f"train.finetune={tmp_path}", f"run.dir={tmp_path / 'other'}"]
    assert main([*arguments(config), *other]) == USER_ERROR
    assert "error: train.finetune: no such checkpoint: " in capsys.readouterr().err


@pytest.mark.extended
def test_processes_take_their_classes(tmp_path: Path) -> None:
    """From two processes to three: with a learning rate of 0 the weights stay as they were."""
    faces = write_faces(tmp_path / "faces", identities=12, images=2)
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": "conv4", "embedding_size": 24},
        "train": {"max_steps": 2, "batch_size": 12},
    }
    succeed(tmp_path, 2, argv_of(faces, tmp_path / "run", **sections))
    (faces / "person3").rename(faces / "zoe")
    shutil.rmtree(faces / "person7")
    still = {**sections["train"], "lr": 0.0, "finetune": str(tmp_path / "run"), "max_steps": 1}
    argv = argv_of(faces, tmp_path / "new", **{**sections, "train": still})
    succeed(tmp_path, 3, argv)
    trainer = trainer_of(load_config(argv)[0])
    finetune(trainer, tmp_path / "run")
    one = weights(trainer)
    held = unpack_names(partial_fc.read_extra(tmp_path / "run")["identities"])
    names = unpack_names(partial_fc.read_extra(tmp_path / "new")["identities"])
    before, three = (
        partial_fc.read_classes(tmp_path / name, torch.arange(count)).rows["loss.weight"]
        for name, count in (("run", 12), ("new", 11))
    )
    assert set(names) - set(held) == {"zoe"}
    for label, name in enumerate(names):
        if name != "zoe":
            assert torch.equal(three[label], before[held.index(name)]), name
    torch.testing.assert_close(three, one, rtol=1e-5, atol=1e-6)
    norm = before[[held.index(n) for n in names if n != "zoe"]].norm(dim=1).mean()
    torch.testing.assert_close(three[names.index("zoe")].norm(), norm)


def test_rows_of_a_checkpoint(runs: dict[str, tuple[Path, Trainer]]) -> None:
    run, before = runs["shards"]
    found = partial_fc.read_classes(run, torch.tensor([4, 0, 4]))
    assert torch.equal(found.rows["loss.weight"], weights(before)[[4, 0, 4]])
    momentum = before.optimizer.state[weights(before)]["momentum_buffer"]
    assert torch.equal(found.states["loss.weight"]["momentum_buffer"], momentum[[4, 0, 4]])
    assert torch.equal(found.shared["loss.threshold"], before.head.loss.threshold)
    assert found.optimizer is not None
    for classes, message in ((torch.tensor([5]), "5"), (torch.tensor([[0]]), "shape")):
        with pytest.raises(ValueError, match=f"classes must .*{message}"):
            partial_fc.read_classes(run, classes)
