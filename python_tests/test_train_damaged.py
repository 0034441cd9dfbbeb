"""Checkpoints of runs that are damaged, incomplete, too new, or named by their run's folder."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_support import arguments, losses, tiny, train, trainer_of, write_faces

from train import checkpoint, convert
from train.errors import UserError
from train.evaluation.model import load_model
from train.main import load_config, main


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that keeps the checkpoints of the last two."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(faces, run, train={"max_steps": 3}, run={"save_steps": 1, "keep": 2}))
    return run


@pytest.fixture(scope="module")
def sharded(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "sharded"
    keep, partial = {"save_steps": 1, "keep": 2}, {"enabled": "always"}
    train(tiny(faces, run, train={"max_steps": 3}, run=keep, partial_fc=partial))
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
    last, before = (run / "checkpoints" / f"{name}.pt" for name in ("last", "step-000002"))
    damage(last)
    (run / "checkpoints" / "step-000003.pt").unlink()
    given = [f"run.dir={run}", "train.max_steps=4"]
    assert main(["--resume", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"cannot read checkpoint {last}: record data/" in said
    assert said.endswith(f"--resume {before} goes on from step 2\n")
    assert main(["--resume", "auto", *given]) == 0
    assert f"going on from {before}\n" in capsys.readouterr().err
    assert len(losses(run)) == 4


def test_without_an_earlier_one_it_is_an_error_even_for_auto(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(whole, tmp_path / "run")
    for name in ("step-000002.pt", "step-000003.pt"):
        (run / "checkpoints" / name).unlink()
    damage(run / "checkpoints" / "last.pt")
    assert main(["--resume", "auto", f"run.dir={run}"]) == 2
    assert "no earlier checkpoint is kept here (run.keep)" in capsys.readouterr().err


def test_so_it_is_with_shards(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(sharded, tmp_path / "run")
    last, before = (run / "checkpoints" / name for name in ("last", "step-000002"))
    # In the shards: what they share is whole, and so is the copy by the name of its step.
    shutil.rmtree(run / "checkpoints" / "step-000003")
    file = last / "__0_0.distcp"
    weight = trainer_of(load_config(["--resume", str(run)])[0])
    weight.load_state(checkpoint.read_run(last), last)
    assert weight.head is not None
    rows = weight.head.weight.detach().numpy().tobytes()
    data = file.read_bytes()
    file.write_bytes(data.replace(rows, bytes([rows[0] ^ 1]) + rows[1:]))
    given = [f"run.dir={run}", "train.max_steps=4"]
    assert main(["--resume", *given]) == 2
    assert f"--resume {before} goes on from step 2" in capsys.readouterr().err
    assert main(["--resume", "auto", *given]) == 0
    assert f"going on from {before}\n" in capsys.readouterr().err
    assert len(losses(run)) == 4


def test_a_runs_folder_is_its_last_checkpoint_everywhere(
    whole: Path, sharded: Path, faces: Path, tmp_path: Path
) -> None:
    for run in (whole, sharded):
        for given in (run, run / "checkpoints", checkpoint.last(run)):
            _, path, values = load_config(["--resume", str(given)])
            assert path == checkpoint.last(run)
            assert values is not None
            started = trainer_of(tiny(faces, tmp_path / "x", model={"weights": str(given)}))
            judged = load_model(Namespace(checkpoint=given, device="cpu"))
            for key, value in started.backbone.state_dict().items():
                assert torch.equal(value, values["backbone"][key])
                assert torch.equal(value, judged.backbone.state_dict()[key])
            assert convert.run([str(given), str(tmp_path / "out.pt")]) == 0
    with pytest.raises(UserError, match=r"no such checkpoint: .*last\.pt"):
        load_config(["--resume", str(tmp_path)])


PARTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        part: (lambda values, part=part: values.pop(part), f"is not a whole checkpoint: .* {part}$")
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


@pytest.mark.parametrize("part", PARTS)
def test_incomplete_and_newer_ones_are_called_that(part: str, whole: Path, tmp_path: Path) -> None:
    change, message = PARTS[part]
    values = checkpoint.read_run(whole / checkpoint.LAST)
    change(values)
    torch.save(values, tmp_path / "last.pt")
    with pytest.raises(UserError, match=message):
        load_config(["--resume", str(tmp_path / "last.pt")])


def test_what_does_not_fit_the_run_is_refused_before_it_takes_memory_or_ends_at_once(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resumed(**parts: Any) -> str:
        values = checkpoint.read_run(whole / checkpoint.LAST)
        for name, part in parts.items():
            values[name] = {**values[name], **part}
        torch.save(values, tmp_path / "x.pt")
        assert main(["--resume", str(tmp_path / "x.pt"), f"run.dir={tmp_path / 'run'}"]) == 2
        return capsys.readouterr().err

    step = {"step": 10**9, "threshold": None, "best": None}
    assert "is of step 1000000000, and this run has 3 in all" in resumed(trainer=step)
    config = checkpoint.read_run(whole / checkpoint.LAST)["config"]
    large = {"model": {**config["model"], "embedding_size": 10**7}}
    assert "of another embedding size, not iresnet18" in resumed(config=large)
    state = checkpoint.read_run(whole / checkpoint.LAST)["optimizer"]["state"]
    wrong = {k: {"momentum_buffer": torch.zeros(3)} for k in state}
    assert "holds the state of other parameters" in resumed(optimizer={"state": wrong})
    assert "holds the state of another optimizer" in resumed(optimizer={"param_groups": 3})


def test_weights_may_be_of_the_format_before_torch_1_6(whole: Path, tmp_path: Path) -> None:
    state = checkpoint.read_run(whole / checkpoint.LAST)["backbone"]
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    found = checkpoint.read(tmp_path / "x.pt")
    assert all(torch.equal(found[key], value) for key, value in state.items())
    small = io.BytesIO()
    torch.save({"a": torch.ones(9)}, small, _use_new_zipfile_serialization=False)
    for end in range(0, len(small.getvalue()), 7):
        (tmp_path / "x.pt").write_bytes(small.getvalue()[:end])
        with pytest.raises(UserError, match=r"cannot read checkpoint .*x\.pt: ."):
            checkpoint.read(tmp_path / "x.pt")


def test_arguments_of_a_fresh_run_are_not_a_checkpoint(faces: Path, tmp_path: Path) -> None:
    """``auto`` starts anew where nothing is, whatever folder is named."""
    argv = arguments(tiny(faces, tmp_path / "run", train={"max_steps": 1}))
    assert main([*argv, "--resume", "auto"]) == 0
    assert len(losses(tmp_path / "run")) == 1
