"""PartialFC with several centers per class: training, checkpoints and export."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support.partial_fc import SIZE, Run, batch, compare, joined, sharded, single
from support.ranks import run_ranks

import unitsface_kernels as uk
from unitsface_kernels.partial_fc import (
    dominant_centers,
    export,
    export_class_weights,
    load_checkpoint,
    save_checkpoint,
    storage,
)
from unitsface_kernels.subcenters import keep_dominant

LOSS, CLASSES = "subcenter_arcface", 23
RUNS = [
    Run(LOSS, {}, 1.0, steps=4),
    Run(LOSS, {"centers": 2}, 0.4, steps=4),
    Run(LOSS, {}, 0.4, "adamw", "backward", steps=4),
    Run(LOSS, {}, 0.4, "sgd", "step", steps=4, max_norm=0.2),
    Run("class_bce", {"centers": 2}, 0.4, steps=4),
    Run("npt", {"k": 3, "centers": 2}, 0.4, fuse="backward", steps=4),
    Run("adacos", {"centers": 2}, 0.4, steps=4),
    Run("curricularface", {"centers": 2, "alpha": 0.5}, 0.4, "adamw", "backward", steps=4),
    Run("elasticface", {"centers": 2, "assignment": "sorted"}, steps=4),
]


def _all_runs(rank: int) -> list[dict]:
    return [sharded(rank, run) for run in RUNS]


@pytest.mark.parametrize(
    "ranks",
    [pytest.param(1, marks=pytest.mark.extended), 2, pytest.param(3, marks=pytest.mark.extended)],
)
def test_training_is_that_of_one_process(ranks: int) -> None:
    found = run_ranks(ranks, _all_runs)
    for number, run in enumerate(RUNS):
        of_ranks = joined([each[number] for each in found], run.classes)
        compare(of_ranks, single(run, ranks), run.name())


def _head() -> tuple[uk.PartialFC, torch.optim.Optimizer]:
    head = uk.PartialFC(LOSS, SIZE, CLASSES, 0.5, seed=3)
    return head, uk.SampledAdamW(head.parameters(), lr=0.1)


def _saved(rank: int, path: Path) -> None:
    head, optimizer = _head()
    head(*batch(0, CLASSES)).backward()
    optimizer.step()
    save_checkpoint(path, head, optimizer)


def test_checkpoint_and_export(tmp_path: Path) -> None:
    path, file = tmp_path / "saved", tmp_path / "weights.safetensors"
    run_ranks(2, partial(_saved, path=path))
    head, optimizer = _head()
    assert load_checkpoint(path, head, optimizer) is None
    assert head.weight.shape == (CLASSES, 3, SIZE)
    assert optimizer.state[head.weight]["exp_avg"].shape == (CLASSES, 3, SIZE)
    assert bool(optimizer.state[head.weight]["exp_avg"].any())
    export_class_weights(path, file)
    assert torch.equal(safetensors.torch.load_file(file)["weight"], head.weight.detach())
    one = uk.PartialFC("arcface", SIZE, CLASSES, 0.5, seed=3)
    with pytest.raises(ValueError, match="has loss = subcenter_arcface"):
        load_checkpoint(path, one)
    two = uk.PartialFC(LOSS, SIZE, CLASSES, 0.5, seed=3, centers=2)
    with pytest.raises(ValueError, match=r"weight = \(23, 3, 16\), this PartialFC has \(23, 2, 16"):
        load_checkpoint(path, two)


def test_dominant_centers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block by block from a checkpoint, the centers that ``keep_dominant`` finds at once."""
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4 * 4 * 3 * SIZE)
    path, file, samples = tmp_path / "saved", tmp_path / "one", tmp_path / "samples.npz"
    _saved(0, path)
    head, _ = _head()
    load_checkpoint(path, head)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(200, SIZE, generator=generator)
    labels = torch.randint(-1, CLASSES, (200,), generator=generator)
    wanted = keep_dominant(head.weight, feats, labels, angle=80.0)
    found = dominant_centers(path, feats, labels, angle=80.0)
    assert 0 < int(wanted.kept.sum()) < 200
    assert torch.equal(found.center, wanted.center)
    assert torch.equal(found.kept, wanted.kept)
    np.savez(samples, feats=feats.numpy(), labels=labels.numpy())
    arguments = [str(path), str(file), "--dominant", str(samples), "--angle", "80"]
    assert export.main(arguments) == 0
    assert f"{int(wanted.kept.sum())} of 200 samples" in capsys.readouterr().out
    written = safetensors.torch.load_file(file)
    assert torch.equal(written["weight"], wanted.weight)
    assert torch.equal(written["center"], wanted.center)
    assert torch.equal(written["kept"], wanted.kept)
    # A training with one center each begins with them.
    uk.ArcFaceLoss(SIZE, CLASSES).load_state_dict({"weight": written["weight"]})
    np.savez(samples, feats=feats.numpy())
    assert export.main(arguments) == 2
    assert "no .npz file of feats and labels" in capsys.readouterr().err
    one = uk.PartialFC("arcface", SIZE, CLASSES)
    save_checkpoint(path, one)
    with pytest.raises(ValueError, match="one center each"):
        dominant_centers(path, feats, labels)
