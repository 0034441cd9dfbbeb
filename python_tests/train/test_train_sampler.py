"""Which images make up which batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.packs import people, write_recordio
from support.training import assert_same_state, losses, tiny, train, trainer_of

from train import checkpoint
from train.data.dataset import open_dataset, scan
from train.data.loader import open_images
from train.data.sampler import epoch_order, rank_batches, steps_per_epoch
from train.errors import UserError
from train.main import main

BALANCED = {"sampler": "balanced", "images_per_identity": 2}


def uneven(identities: int, images: int, seed: int = 0) -> NDArray[np.int64]:
    """Labels with every identity at least once, in no order."""
    rng = np.random.default_rng(seed)
    more = rng.integers(0, rng.integers(1, identities + 1, images - identities))
    return rng.permutation(np.concatenate([np.arange(identities), more]))


def balanced(labels: NDArray[np.int64], k: int, batch: int, epoch: int) -> NDArray[np.int64]:
    """(steps, identities, k)."""
    order = epoch_order(
        labels, seed=3, epoch=epoch, images_per_identity=k, sampler="balanced", batch_size=batch
    )
    return order.reshape(-1, batch // k, k)


# -- runs of a permutation ----------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 7])
def test_runs_are_those_of_a_plain_loop(k: int) -> None:
    labels = uneven(30, 200)
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 2)
    by_identity: dict[int, list[int]] = {}
    for i in torch.randperm(200, generator=generator).tolist():
        by_identity.setdefault(labels[i], []).append(i)
    runs = [rows[j : j + k] for rows in by_identity.values() for j in range(0, len(rows), k)]
    expected = [i for r in torch.randperm(len(runs), generator=generator) for i in runs[r]]
    order = epoch_order(labels, seed=5, epoch=2, images_per_identity=k)
    assert order.tolist() == expected


# -- balanced -----------------------------------------------------------------------------------

SHAPES = [(10, 4, 32), (8, 4, 32), (13, 4, 32), (40, 3, 24), (9, 2, 16), (50, 4, 24)]


@pytest.mark.parametrize(("identities", "k", "batch"), SHAPES)
def test_batches_have_k_images_of_each_of_their_identities(
    identities: int, k: int, batch: int
) -> None:
    labels = uneven(identities, 6 * identities)
    counts = np.bincount(labels)
    for epoch in range(8):
        order = balanced(labels, k, batch, epoch)
        assert len(order) == steps_per_epoch(len(labels), batch)
        people = labels[order]
        assert (people == people[:, :, :1]).all()
        for step, names in zip(order, people[:, :, 0], strict=True):
            assert len(set(names.tolist())) == batch // k
            for images, name in zip(step, names, strict=True):
                assert len(set(images.tolist())) == min(k, counts[name])


@pytest.mark.parametrize(("identities", "k", "batch"), SHAPES)
def test_over_epochs_identities_and_their_images_are_seen_equally_often(
    identities: int, k: int, batch: int
) -> None:
    labels = uneven(identities, 6 * identities)
    seen = np.zeros(len(labels), int)
    for epoch in range(12):
        order = balanced(labels, k, batch, epoch)
        seen += np.bincount(order.ravel(), minlength=len(labels))
        visits = np.bincount(labels, seen) / k
        assert visits.max() - visits.min() <= 1
        for label in range(identities):
            assert np.ptp(seen[labels == label]) <= 1


def test_balanced_order_depends_on_seed_and_epoch_and_regroups_images() -> None:
    labels = np.repeat(np.arange(6), 4)
    first = balanced(labels, 2, 4, 0)
    assert np.array_equal(first, balanced(labels, 2, 4, 0))
    assert not np.array_equal(first, balanced(labels, 2, 4, 1))
    pairs = {
        tuple(sorted(group))
        for epoch in range(20)
        for group in balanced(labels, 2, 4, epoch).reshape(-1, 2).tolist()
    }
    assert len(pairs) == 6 * 6  # each of the 6 pairs of 4 images, of 6 identities


def test_processes_have_whole_and_disjoint_identities() -> None:
    labels = uneven(20, 120)
    order = balanced(labels, 3, 24, 1).reshape(-1)
    parts = [rank_batches(order, batch_size=24, rank=r, world_size=2) for r in range(2)]
    for a, b in zip(*parts, strict=True):
        assert len(a) == len(b) == 12
        assert set(labels[a]).isdisjoint(labels[b])
        assert np.bincount(labels[a])[np.unique(labels[a])].tolist() == [3] * 4


def test_impossible_batches_are_user_errors(tmp_path: Path) -> None:
    write_recordio(tmp_path / "data", people())

    def open_with(data: dict[str, Any], batch: int, ranks: int) -> None:
        sections = {"data": data, "train": {"batch_size": batch}}
        open_dataset(tiny(tmp_path / "data", tmp_path / "run", **sections), ranks)

    for data, batch, ranks, message in (
        ({"sampler": "balanced"}, 8, 1, "images_per_identity of at least 2"),
        ({**BALANCED, "images_per_identity": 3}, 8, 1, "batch_size=8 is no multiple"),
        (BALANCED, 6, 2, "=2 times 2 processes"),
        (BALANCED, 12, 1, "6 identities in a batch of 12 .* data.path has 5"),
    ):
        with pytest.raises(UserError, match=message):
            open_with(data, batch, ranks)


# -- in training --------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    images = scan(str(write_recordio(tmp_path, people())))
    rows = epoch_order(images.labels, seed=0, epoch=0).reshape(5, 4)

    def batches(workers: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        source = open_images(images, 16, on_error="fail", cache="never", workers=workers)
        return list(source.batches(rows[start:]))

    whole = batches(0, 0)
    for workers in (1, 2):
        assert_same_state([list(b) for b in batches(workers, 2)], [list(b) for b in whole[2:]])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({}, id="shuffle", marks=pytest.mark.extended),
        pytest.param(BALANCED, id="balanced"),
    ],
)
def test_a_run_cut_within_an_epoch_goes_on_as_if_it_had_not_been(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    write_recordio(tmp_path / "data", people())

    def config(name: str, workers: int) -> Any:
        own = {**data, "cache": "never", "workers": workers}
        return tiny(
            tmp_path / "data", tmp_path / name, data=own, train={"epochs": 1, "batch_size": 6}
        )

    whole = train(config("whole", 0))
    train(config("cut", 2), stop_after=1)
    assert main(["--resume", f"run.dir={tmp_path / 'cut'}"]) == 0
    assert len(losses(tmp_path / "whole")) == 3
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    saved = checkpoint.read_run(tmp_path / "cut" / checkpoint.LAST)
    assert_same_state(saved["backbone"], whole.state()["backbone"])


def test_the_trainer_takes_the_sampler_of_the_configuration(tmp_path: Path) -> None:
    write_recordio(tmp_path / "data", people())
    data = {**BALANCED, "images_per_identity": 4}
    trainer = trainer_of(tiny(tmp_path / "data", tmp_path / "run", data=data))
    for _, labels in trainer.epoch_batches():
        assert labels.tolist() == [labels[0]] * 4 + [labels[4]] * 4
        assert labels[0] != labels[4]
