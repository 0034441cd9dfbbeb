"""Checkpoints of runs that are damaged, incomplete, too new, or named by their run's folder."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import (
    IRESNET,
    assert_same_state,
    losses,
    tiny,
    train,
    trainer_of,
    write_faces,
)

from train import checkpoint
from train.backbones import build_backbone
from train.errors import UserError
from train.evaluation.model import load_model
from train.main import load_config, main


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that keeps both checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(faces, run, train={"max_steps": 2}, run={"save_steps": 1, "keep": 2}))
    return run


@pytest.fixture(scope="module")
def sharded(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "sharded"
    keep, partial = {"save_steps": 1, "keep": 2}, {"enabled": "always"}
    train(tiny(faces, run, train={"max_steps": 2}, run=keep, partial_fc=partial))
    return run


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def damage(path: Path) -> None:
    """One bit in the middle; of this name alone, as a copy that went wrong."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_a_damaged_checkpoint_names_the_one_before_which_auto_takes(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(whole, tmp_path / "run")
    last, before = (run / "checkpoints" / f"{name}.pt" for name in ("last", "step-000001"))
    damage(last)
    (run / "checkpoints" / "step-000002.pt").unlink()
    given = [f"run.dir={run}"]
    assert main(["--resume", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot read checkpoint {last}: record data/" in said
    assert said.endswith(f"--resume {before} goes on from step 1\n")
    assert main(["--resume", "auto", *given]) == 0
    assert f"going on from {before}\n" in capsys.readouterr().err
    assert len(losses(run)) == 2


def test_without_an_earlier_one_it_is_an_error_even_for_auto(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path / "run") / "checkpoints"
    given = ["--resume", "auto", f"run.dir={folder.parent}"]
    # Where the last one has been lost it is not the beginning that is gone on from.
    (folder / "last.pt").unlink()
    assert load_config(given)[1] == folder / "step-000002.pt"
    for path in (folder / "step-000001.pt", folder / "step-000002.pt"):
        damage(path)
    assert main(given) == 2
    said = capsys.readouterr().err
    assert f"cannot read checkpoint {folder / 'step-000002.pt'}: " in said
    assert "no earlier checkpoint is kept here (run.keep)" in said


@pytest.mark.extended
def test_so_it_is_with_shards(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(sharded, tmp_path / "run")
    last, before = (run / "checkpoints" / name for name in ("last", "step-000001"))
    # In the shards: what they share is whole, and so is the copy by the name of its step.
    shutil.rmtree(run / "checkpoints" / "step-000002")
    file = last / "__0_0.distcp"
    weight = trainer_of(load_config(["--resume", str(run)])[0])
    weight.load_state(checkpoint.read_run(last), last)
    assert weight.head is not None
    rows = weight.head.weight.detach().numpy().tobytes()
    data = file.read_bytes()
    file.write_bytes(data.replace(rows, bytes([rows[0] ^ 1]) + rows[1:]))
    assert main(["--resume", "auto", f"run.dir={run}"]) == 0
    assert f"going on from {before}\n" in capsys.readouterr().err
    assert len(losses(run)) == 2


def test_a_runs_folder_is_its_last_checkpoint_everywhere(
    whole: Path, sharded: Path, faces: Path, tmp_path: Path
) -> None:
    for run in (whole, sharded):
        for given in (run, run / "checkpoints", checkpoint.last(run)):
            assert checkpoint.found(given) == checkpoint.last(run)
        _, path, values = load_config(["--resume", str(run)])
        assert path == checkpoint.last(run)
        assert values is not None
        evaluated = load_model(run, ["train.device=cpu"])
        assert_same_state(evaluated.backbone.state_dict(), values["backbone"])
    started = trainer_of(tiny(faces, tmp_path / "x", model={"weights": str(sharded)}))
    assert_same_state(dict(started.backbone.state_dict()), dict(values["backbone"]))
    with pytest.raises(UserError, match=r"no such checkpoint: .*last\.pt"):
        load_config(["--resume", str(tmp_path)])


def _values() -> dict[str, Any]:
    trainer = {"step": 1, "threshold": None, "best": None}
    parts: dict[str, Any] = {name: {} for name in ("config", "backbone", "loss", "scaler")}
    parts["config"] = {"run": {"dir": "x"}}
    return {"format": 1, "identities": "", "optimizer": {}, "trainer": trainer, **parts}


PARTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        part: (
            lambda values, part=part: values.pop(part),
            f"is not a whole checkpoint: it has no {part}",
        )
        for part in ("config", "backbone", "loss", "scaler", "identities", "optimizer")
    },
    "trainer": (lambda values: values.pop("trainer"), "is not a training checkpoint"),
    "a config of another type": (lambda values: values.update(config=3), "it has no config"),
    "step": (lambda values: values["trainer"].update(step=-1), "its step is none"),
    "no step": (lambda values: values["trainer"].update(step=None), "its step is none"),
    "best": (lambda values: values["trainer"].update(best={"step": 1}), "best figure is none"),
    "threshold": (lambda values: values["trainer"].update(threshold="1"), "its threshold or"),
    "format": (lambda values: values.update(format=2), "has format 2, of a newer version"),
}


def test_a_checkpoint_is_no_reason_to_reach_for_the_network(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({**_values(), "config": {"model": {"name": "timm:hf-hub:a/b"}}}, path)
    with pytest.raises(UserError, match=r"x\.pt: model\.name=timm:hf-hub:a/b would be fetched"):
        load_config(["--resume", str(path)])
    with pytest.raises(UserError, match=r"x\.pt: model\.name=timm:hf-hub:a/b would be fetched"):
        load_model(path, ["train.device=cpu"])
    typed = load_config(["--resume", str(path), "model.name=timm:hf-hub:a/b"])[0]
    assert typed.model.name == "timm:hf-hub:a/b"


@pytest.mark.parametrize("part", PARTS)
def test_incomplete_and_newer_ones_are_called_that(part: str, tmp_path: Path) -> None:
    change, message = PARTS[part]
    values = _values()
    torch.save(values, tmp_path / "x.pt")
    assert load_config(["--resume", str(tmp_path / "x.pt")])[2] is not None
    change(values)
    torch.save(values, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        load_config(["--resume", str(tmp_path / "x.pt")])


def test_what_does_not_fit_the_run_is_refused_before_it_takes_memory_or_ends_at_once(
    whole: Path, faces: Path, tmp_path: Path
) -> None:
    path = whole / checkpoint.LAST
    values = checkpoint.read_run(path)
    trainer = trainer_of(tiny(faces, tmp_path, train={"max_steps": 3}))

    def refused(message: str, **parts: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=message):
            trainer.load_state({**values, **{k: values[k] | v for k, v in parts.items()}}, path)

    refused("is of step 1000000000, and this run has 3 in all", trainer={"step": 10**9})
    wrong = {k: {"momentum_buffer": torch.zeros(3)} for k in values["optimizer"]["state"]}
    refused("holds the state of other parameters", optimizer={"state": wrong})
    refused("holds the state of another optimizer", optimizer={"param_groups": 3})
    large = tiny(faces, tmp_path, model=IRESNET | {"embedding_size": 10**9})
    known = values | {"backbone": build_backbone("iresnet18", 16).state_dict()}
    with pytest.raises(UserError, match="iresnet18 of another embedding size"):
        checkpoint.check_backbone(known, path=path, config=large)


def test_files_before_torch_1_6_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path, written, state = tmp_path / "x.pt", io.BytesIO(), torch.nn.Linear(3, 3).state_dict()
    torch.save(state, written, _use_new_zipfile_serialization=False)
    path.write_bytes(written.getvalue())
    assert_same_state(checkpoint.read(path), state)
    for end in range(0, len(written.getvalue()), 7):
        path.write_bytes(written.getvalue()[:end])
        with pytest.raises(UserError, match=r"cannot read checkpoint .*x\.pt: ."):
            checkpoint.read(path)
