"""Checkpoints kept, runs stopped and diverged, and what a step may be made of; one process."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.training import (
    arguments,
    assert_same_state,
    losses,
    tiny,
    train,
    trainer_of,
    write_faces,
)
from torch import distributed as dist
from torch import nn

from train import checkpoint
from train.checkpoint import keep
from train.config import Config, make_config
from train.data.dataset import scan
from train.data.loader import open_images
from train.distributed import DistributedEnv, Vote
from train.errors import INTERRUPTED, DivergedError, UserError
from train.evaluation.embed import embed
from train.evaluation.model import load_model
from train.main import main
from train.run_folder import MetricsLog, prepare, read_metrics
from train.stopping import stop_on_signal
from train.trainer import Trainer


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / checkpoint.LAST.parent).iterdir()}


# -- checkpoints ----------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept_without_a_copy_and_can_be_gone_on_from(
    faces: Path, tmp_path: Path
) -> None:
    kept = {"save_steps": 1, "keep": 3}
    train(tiny(faces, tmp_path, train={"max_steps": 4}, run=kept))
    assert names(tmp_path) == {"last.pt", *(f"step-00000{n}.pt" for n in (2, 3, 4))}
    folder = tmp_path / "checkpoints"
    assert os.path.samefile(folder / "last.pt", folder / "step-000004.pt")
    assert checkpoint.read_run(folder / "step-000003.pt")["trainer"]["step"] == 3
    for leftover in (".last.pt.1.tmp", ".step-000001.pt.1.tmp"):
        (folder / leftover).write_bytes(b"half")
    # From an earlier one: what lies after it is of another course now.
    assert main(["--resume", str(folder / "step-000002.pt"), "train.max_steps=3"]) == 0
    assert names(tmp_path) == {"last.pt", "step-000002.pt", "step-000003.pt"}
    assert main(["--resume", f"run.dir={tmp_path}", "train.max_steps=5", "run.keep=1"]) == 0
    assert names(tmp_path) == {"last.pt"}
    assert len(losses(tmp_path)) == 5


def test_folders_are_kept_by_links_to_their_files(tmp_path: Path) -> None:
    last = tmp_path / "last"
    for step in (1, 2, 3):
        last.mkdir()
        (last / "part").write_text(str(step))
        keep(last, step, 2, best=True)
        assert os.path.samefile(last / "part", tmp_path / "best" / "part")
        (last / "part").unlink()
        last.rmdir()
    assert {path.name for path in tmp_path.iterdir()} == {"best", "step-000002", "step-000003"}
    assert [(tmp_path / name / "part").read_text() for name in ("best", "step-000002")] == list(
        "32"
    )


def test_a_file_system_without_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save_atomically({"step": 1}, tmp_path / "last.pt")
    keep(tmp_path / "last.pt", 1, 1, best=True)
    assert checkpoint.read(tmp_path / "best.pt") == {"step": 1}
    assert not os.path.samefile(tmp_path / "best.pt", tmp_path / "last.pt")


def test_nothing_to_resume_is_an_error_or_a_start(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tiny(faces, tmp_path / "run", train={"max_steps": 1}))
    assert main([*argv, "--resume"]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    prepare(tmp_path / "run", tiny(faces, tmp_path / "run"), resume_step=None)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss"')
    for _ in range(2):
        assert main([*argv, "--resume", "auto"]) == 0
        assert len(losses(tmp_path / "run")) == 1


# -- stopping -------------------------------------------------------------------------------------


def test_what_torchrun_passes_on_counts_as_the_same_signal() -> None:
    outside: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: outside.append(number))
    try:
        with stop_on_signal(patience_s=0.2) as received:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (received, outside) == ([signal.SIGTERM], [])
            time.sleep(0.25)
            os.kill(os.getpid(), signal.SIGTERM)
            assert outside == [signal.SIGTERM]  # that of a process that is not training
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_saves_the_step_and_decides_the_exit_code(
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    end_step = Trainer._end_step

    def signaled(self: Trainer, stopped: int) -> int:
        cut_off = end_step(self, stopped)
        if self.step == 1:
            os.kill(os.getpid(), number)
        return cut_off

    monkeypatch.setattr(Trainer, "_end_step", signaled)
    config = tiny(faces, tmp_path, eval={"every": 2}, data={"holdout": 2})
    assert main(arguments(config)) == code
    assert capsys.readouterr().err == "stopped at step 2 of 4; continue with --resume\n"
    assert checkpoint.read_run(tmp_path / checkpoint.LAST)["trainer"]["step"] == 2
    assert not (tmp_path / "evaluation.json").exists()
    assert (tmp_path / "evaluations.jsonl").read_text() == ""  # left to the next run


def _votes(rank: int) -> list[int]:
    vote = Vote(DistributedEnv(rank, 3, torch.device("cpu")), 10.0)
    given = [[0, 0, 0, 2], [0, 15, 0, 0], [0, 0, 0, 0]][rank]
    return [*(vote(number) for number in given), vote.finish(), vote.finish()]


def test_all_processes_stop_at_the_same_step() -> None:
    assert run_ranks(3, _votes) == [[0, 0, 15, 0, 2, 0]] * 3


# -- divergence -----------------------------------------------------------------------------------


def test_the_first_bad_step_is_named_and_the_last_good_checkpoint_kept(
    faces: Path, tmp_path: Path
) -> None:
    run = {"log_every": 10, "save_steps": 2}
    config = tiny(faces, tmp_path, train={"epochs": 5, "amp": "fp16"}, run=run)
    trainer = trainer_of(config)

    def spoil(module: nn.Module, given: Any, features: torch.Tensor) -> torch.Tensor:
        return features * (math.inf if trainer.step == 2 else 1.0)

    trainer.backbone.register_forward_hook(spoil)
    prepare(tmp_path, config, resume_step=None)
    with pytest.raises(DivergedError) as caught:
        trainer.fit(tmp_path)
    said = str(caught.value)
    assert "the loss is nan at step 3; try a smaller train.lr or train.amp=none" in said
    assert "first on process 0: class loss nan, pair loss nan, largest feature norm inf" in said
    assert "scale 64 (CosFaceLoss), 64 (USSLoss), lr 0.0" in said
    assert "gradients scaled by " in said  # less from step to step: an overflow is no divergence
    assert said.endswith("the last checkpoint, of step 2, is kept")
    assert checkpoint.read_run(tmp_path / checkpoint.LAST)["trainer"]["step"] == 2


def test_weights_that_are_not_finite_are_not_saved(faces: Path, tmp_path: Path) -> None:
    config = tiny(faces, tmp_path, run={"save_steps": 1})
    trainer = trainer_of(config)

    def spoil(*given: Any) -> None:
        with torch.no_grad():
            trainer.backbone.fc.weight[0, 0] = math.inf if trainer.step == 1 else 0.0

    trainer.optimizer.register_step_post_hook(spoil)
    prepare(tmp_path, config, resume_step=None)
    with pytest.raises(DivergedError, match="weights are not finite after step 2; try a smaller"):
        trainer.fit(tmp_path)
    assert checkpoint.read_run(tmp_path / checkpoint.LAST)["trainer"]["step"] == 1


# -- evaluation -----------------------------------------------------------------------------------


def test_evaluation_on_the_way_changes_nothing_and_the_best_is_kept(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.2, "freeze_bn": True},
        "data": {"holdout": 2, "cache": "never"},
        "train": {"max_steps": 4},
    }
    for name, every in (("plain", 0), ("evaluated", 1)):
        argv = arguments(tiny(faces, tmp_path / name, eval={"every": every}, **common))
        assert main(argv) == 0
    plain, evaluated = (
        checkpoint.read_run(tmp_path / n / checkpoint.LAST) for n in ("plain", "evaluated")
    )
    for part in ("backbone", "loss", "optimizer"):
        assert_same_state(plain[part], evaluated[part])
    assert losses(tmp_path / "plain") == losses(tmp_path / "evaluated")
    assert names(tmp_path / "plain") == {"last.pt"}
    assert names(tmp_path / "evaluated") == {"last.pt", "best.pt"}
    lines = [
        json.loads(line)
        for line in (tmp_path / "evaluated" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["epoch"]) for line in lines] == [
        (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)
    ]  # fmt: skip
    values = [line["eval"]["held_out"]["accuracy"] for line in lines]
    best = checkpoint.read_run(tmp_path / "evaluated" / "checkpoints" / "best.pt")["trainer"]
    first = values.index(max(values)) + 1
    assert best["best"] == {"figure": "accuracy", "value": max(values), "step": first}
    assert best["step"] == first
    # The last figures are those of the report, and its features give them.
    result = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert lines[-1]["eval"]["held_out"]["auc"] == result["auc"]
    stored = np.load(tmp_path / "evaluated" / "features.npz")
    assert stored["features"].shape == (8, 512)
    assert stored["labels"].tolist() == [0] * 4 + [1] * 4
    assert stored["identities"].tolist() == ["person5", "person6"]
    capsys.readouterr()
    common["eval"] = {"every": 1, "best": "charm"}
    assert main(arguments(tiny(faces, tmp_path / "other", **common))) == 2
    assert "eval.best: expected one of accuracy, " in capsys.readouterr().err


def _shares(rank: int, size: int, folder: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of 24 images, of 5, and of 1: less than there are processes."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    device = torch.device("cpu")
    world = DistributedEnv(rank, dist.get_world_size(), device) if size > 1 else None
    images = scan(folder)
    found = []
    for count in (24, 5, 1):
        source = open_images(images.keep(range(count)), 16, on_error="fail")
        features, labels = embed(backbone, source, device, batch_size=7, world=world)
        found.append((torch.from_numpy(features), torch.from_numpy(labels)))
    return found


def test_every_process_embeds_its_share_and_gets_all(faces: Path) -> None:
    alone = _shares(0, 1, str(faces))
    for of_rank in run_ranks(3, _shares, 3, str(faces)):
        for (features, labels), (expected, expected_labels) in zip(of_rank, alone, strict=True):
            torch.testing.assert_close(features, expected)
            assert torch.equal(labels, expected_labels)


def test_a_table_gets_columns_that_an_earlier_version_did_not_have(tmp_path: Path) -> None:
    old = '{"step": 1, "loss": 0.5, "gone": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(old)
    (tmp_path / "metrics.csv").write_text("step,loss,gone\n1,0.5,2\n")
    log = MetricsLog(tmp_path)
    for step in (2, 3):
        log.write({"step": step, "data_ms": 7, "loss": 0.25})
    log.close()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,loss,gone,data_ms", "1,0.5,2,", "2,0.25,,7", "3,0.25,,7"]


def test_columns_that_a_resumed_run_adds_have_a_name(tmp_path: Path) -> None:
    """Such as those of an earlier version's run, or of one that goes on in float16."""
    for values in ({"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "grad_scale": 8.0}):
        log = MetricsLog(tmp_path)
        log.write(values)
        log.write({"step": values["step"] + 10, "loss": 1.0})
        log.close()
    expected = "step,loss,grad_scale\n1,0.5,\n11,1.0,\n2,0.25,8.0\n12,1.0,\n"
    assert (tmp_path / "metrics.csv").read_text() == expected
    prepare(tmp_path, Config(), resume_step=20)
    assert (tmp_path / "metrics.csv").read_text() == expected


def test_figures_go_to_all_files(tmp_path: Path) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def add(self, values: Mapping[str, float], step: int) -> None:
            written.extend((name, value, step) for name, value in values.items())

        def close(self) -> None: ...

    log = MetricsLog(tmp_path, [Writer()])
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5, "pair_loss": None})
    log.write_evaluation(2, 0.1, {"lfw": {"accuracy": 0.75}})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,pair_loss\n1,0.5,\n2,0.5,\n"
    assert len(read_metrics(tmp_path)) == 2
    assert written == [
        ("train/loss", 0.5, 1),
        ("train/loss", 0.5, 2),
        ("eval/lfw/accuracy", 0.75, 2),
    ]


# -- a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "partial_fc"),
    [
        (3, {}),  # of 8 images: parts of 3, 3 and 2
        pytest.param(2, {"enabled": "always"}, marks=pytest.mark.extended),
        (2, {"sample_rate": 0.5}),
    ],
    ids=["unequal parts", "sharded", "sampled"],
)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(
    faces: Path, tmp_path: Path, accumulate: int, partial_fc: dict[str, Any]
) -> None:
    gradients = []
    for parts in (1, accumulate):
        clips = {"clip_norm": 1.0, "clip_classes": True}
        trainer = trainer_of(
            tiny(
                faces,
                tmp_path,
                model={"freeze_bn": True},
                loss={"pair": "none"},
                partial_fc=partial_fc,
                train={"accumulate": parts, **clips},
            )
        )
        step = trainer.build_step()
        images, labels = next(trainer.epoch_batches())
        row = step(images, labels, step=0, lr=0.0, pairs=False)
        of_classes = (trainer.head or trainer.loss.class_loss).parameters()
        found = [p.grad for p in (*trainer.backbone.parameters(), *of_classes)]
        gradients.append((row, [g.to_dense() for g in found if g is not None]))
    (whole_row, whole), (row, summed) = gradients
    if "sample_rate" in partial_fc:
        # Every part draws classes of its own; their norm counts each class once.
        assert trainer.head is not None
        gradient = trainer.head.weight.grad
        assert gradient is not None
        drawn = gradient._indices()[0]
        assert len(drawn) > 3
        assert len(drawn) == len(drawn.unique())
        return
    torch.testing.assert_close(row, whole_row, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(summed, whole, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


def test_parts_that_cannot_be_are_refused(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.accumulate=5 parts of a process's 8 images"):
        trainer_of(tiny(faces, tmp_path, train={"accumulate": 5}))
    fused = {"partial_fc": {"fused_optimizer": "step"}, "train": {"accumulate": 2}}
    with pytest.raises(UserError, match=r"train\.accumulate=2: partial_fc.fused_optimizer=step"):
        make_config(("test", fused))


def test_the_average_of_the_weights_is_saved_and_preferred(faces: Path, tmp_path: Path) -> None:
    run = {"save_steps": 1, "keep": 9}
    trainer = train(tiny(faces, tmp_path, train={"max_steps": 3, "ema": 0.75}, run=run))
    steps = [checkpoint.read_run(tmp_path / "checkpoints" / f"step-00000{n}.pt") for n in (1, 2, 3)]
    average = steps[0]["backbone"]
    for values in steps:
        average = {
            name: 0.75 * tensor.double() + 0.25 * values["backbone"][name].double()
            for name, tensor in average.items()
        }
        for name in ("fc.weight", "features.running_var"):
            torch.testing.assert_close(
                values["ema"][name].double(), average[name], rtol=1e-5, atol=1e-6
            )
    assert not torch.equal(steps[2]["ema"]["fc.weight"], steps[2]["backbone"]["fc.weight"])
    loaded = load_model(tmp_path, ["train.device=cpu"]).backbone
    assert_same_state(dict(loaded.state_dict()), steps[2]["ema"])
    assert trainer.evaluated is not trainer.backbone


def test_a_compiled_backbone_trains_alike_and_keeps_its_names(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Callable[..., Any]] = []
    compile_ = torch.compile

    def eagerly(function: Callable[..., Any], **options: Any) -> Any:
        compiled.append(function)
        return compile_(function, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", eagerly)
    for name in ("plain", "compiled"):
        options = {"max_steps": 2, "compile": name == "compiled", "ema": 0.5}
        train(tiny(faces, tmp_path / name, train=options))
    assert len(compiled) == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    ours, theirs = (
        checkpoint.read_run(tmp_path / name / checkpoint.LAST) for name in ("compiled", "plain")
    )
    for part in ("backbone", "ema"):
        assert ours[part].keys() == theirs[part].keys()
