"""Draws of classes: a permutation computed element by element, and the sample made from it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from support.helpers import DEVICES
from support.tolerances import check_uniform
from torch import Tensor

from unitsface_kernels import dispatch
from unitsface_kernels.distributed.partial_fc.permutation import (
    Permutation,
    draw_key,
    drawn_classes,
    places_of,
)
from unitsface_kernels.distributed.partial_fc.sampling import draw_classes, sample_classes
from unitsface_kernels.partial_fc import permutation as permutations

SIZES = [1, 2, 3, 5, 7, 64, 100, 1000, 65537]
KEYS = [0, 5, 2**64 - 1]
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def in_torch(monkeypatch):
    """No extension: what runs then is Torch."""
    monkeypatch.setattr(dispatch, "row_kernels", lambda device: None)


def _first_classes(size: int, key: int, count: int, device: str = "cpu") -> Tensor:
    """The classes at the first places: a draw without positives."""
    return drawn_classes(size, key, count, torch.empty(0, dtype=torch.int64, device=device))


# --- the permutation ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", SIZES)
def test_bijection_and_its_inverse(size: int, key: int) -> None:
    places = torch.arange(size)
    classes = Permutation(size, key).at(places)
    assert torch.equal(classes.sort().values, places)
    assert torch.equal(Permutation(size, key).place_of(classes), places)


@each_device
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("size", [*SIZES, 2**31 + 11, 2**33, 2**62])
def test_kernels_give_the_same_bits(size: int, key: int, device: str) -> None:
    assert dispatch.row_kernels(torch.device(device)) is not None
    wanted = Permutation(size, key).at(torch.arange(min(size, 1000)))
    got = _first_classes(size, key, min(size, 1000), device)
    assert torch.equal(got.cpu(), wanted)
    assert torch.equal(places_of(size, key, got).cpu(), torch.arange(len(got)))
    strangers = torch.tensor([-1, -2, size, 2 * size - 1, -(2**63), 2**63 - 1])
    assert bool((places_of(size, key, strangers.to(device)).cpu() == size).all())
    assert bool((Permutation(size, key).place_of(strangers) == size).all())


def test_number_of_threads_changes_nothing() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(_first_classes(100003, 3, 100003))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_keys_depend_on_every_number() -> None:
    numbers = [(s, r, t) for s in range(8) for r in range(8) for t in range(64)]
    assert len({draw_key(*n) for n in numbers}) == len(numbers)
    assert 0 <= draw_key(-1, 2**70, 0) < 2**64
    draws = {
        tuple(sample_classes(_labels(), 1000, 8, seed=s, rank=r, step=t)[0].tolist())
        for s, r, t in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
    }
    assert len(draws) == 6


# --- the sample -----------------------------------------------------------------------------------


def _labels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


CASES = {
    "few": (_labels(3, 999, 3, -1, 500), 1000, 100),
    "all-in-the-draw": (torch.arange(7), 7, 7),
    "more-positives-than-places": (torch.randperm(64, generator=torch.manual_seed(3)), 64, 10),
    "more-labels-than-places": (_labels(*[4, 9, -2, 9] * 10), 50, 6),
    "as-many-positives-as-places": (_labels(8, 2, 5, 2), 9, 3),
    "one-place": (_labels(41), 1000, 1),
    "no-place": (_labels(41, 2), 1000, 0),
    "every-class": (_labels(1, 5), 100, 100),
    "more-places-than-classes": (_labels(1, -1), 5, 9),
    "no-positive": (_labels(-1, -2, -1), 30, 4),
    "no-label": (_labels(), 30, 4),
    "no-class": (_labels(-1, -2), 0, 0),
    "nothing": (_labels(), 0, 0),
    "one-class": (_labels(0, 0, -1), 1, 1),
    "large": (torch.randint(-2, 10**9, (4096,), generator=torch.manual_seed(5)), 10**9, 10**5),
}


@each_device
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("name", CASES)
def test_sample(name: str, step: int, device: str) -> None:
    labels, size, wanted = CASES[name]
    drawn = draw_classes(labels.to(device), size, wanted, draw_key(1, 2, step)).cpu()
    index, positions = sample_classes(labels.to(device), size, wanted, seed=1, rank=2, step=step)
    index, positions = index.cpu(), positions.cpu()
    known = labels >= 0
    distinct = labels[known].unique()
    assert index.dtype == positions.dtype == torch.int64
    assert len(index) == max(min(wanted, size), len(distinct))
    assert torch.equal(index, drawn.sort().values)
    assert bool((index[1:] > index[:-1]).all())
    assert bool(((index >= 0) & (index < size)).all())
    assert torch.equal(index[positions[known]], labels[known])
    assert torch.equal(positions[~known], labels[~known])
    # Negatives come in the permutation's order: the first of them take part.
    order = _first_classes(size, draw_key(1, 2, step), len(index))
    negatives = order[~torch.isin(order, distinct)][: len(index) - len(distinct)]
    assert torch.equal(drawn[~torch.isin(drawn, distinct)], negatives)


@pytest.mark.parametrize("name", CASES)
def test_torch_draws_the_same(name: str, monkeypatch) -> None:
    labels, size, wanted = CASES[name]
    found = sample_classes(labels, size, wanted, seed=7, rank=0, step=3)
    monkeypatch.setattr(dispatch, "row_kernels", lambda device: None)
    for got, other in zip(
        sample_classes(labels, size, wanted, seed=7, rank=0, step=3), found, strict=True
    ):
        assert torch.equal(got, other)


def test_random_cases_against_sets() -> None:
    random = torch.Generator().manual_seed(0)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    for step in range(500):
        size = integer(1, 40)
        wanted = integer(0, size + 1)
        labels = torch.randint(-2, size, (integer(0, 30),), generator=random)
        index, positions = sample_classes(labels, size, wanted, seed=0, rank=1, step=step)
        positives = {c for c in labels.tolist() if c >= 0}
        order = _first_classes(size, draw_key(0, 1, step), size).tolist()
        negatives = [c for c in order if c not in positives]
        negatives = negatives[: max(wanted - len(positives), 0)]
        assert len(index) == len(positives) + len(negatives)
        assert set(index.tolist()) == positives | set(negatives)
        for label, position in zip(labels.tolist(), positions.tolist(), strict=True):
            assert position == label if label < 0 else index[position] == label


# --- uniformity -----------------------------------------------------------------------------------

DRAWS = 6000


def _draws(size: int, wanted: int, *positives: int) -> Tensor:
    """(DRAWS, wanted - positives) negatives of as many steps, in the order of their places."""
    labels = _labels(*positives)
    found = []
    for step in range(DRAWS):
        index = draw_classes(labels, size, wanted, draw_key(11, 0, step))
        found.append(index[~torch.isin(index, labels)] if positives else index)
    return torch.stack(found)


def _check_classes(draws: Tensor, classes: list[int]) -> None:
    """Number of draws of each class."""
    number, expected = draws.shape[1], len(draws) * draws.shape[1] / len(classes)
    counts = torch.bincount(draws.flatten(), minlength=max(classes) + 1)
    assert int(counts.sum()) == int(counts[classes].sum())
    check_uniform(counts[classes], expected, (len(classes) - number) / (len(classes) - 1))


def _check_pairs(draws: Tensor, classes: list[int]) -> None:
    """Which two classes were drawn first."""
    size = max(classes) + 1
    counts = torch.bincount(draws[:, 0] * size + draws[:, 1], minlength=size * size)
    cells = torch.tensor([a * size + b for a in classes for b in classes if a != b])
    check_uniform(counts[cells], len(draws) / len(cells))


def _check_sets(draws: Tensor, classes: list[int]) -> None:
    """Which set of classes was drawn."""
    sets = [sum(1 << c for c in s) for s in combinations(classes, draws.shape[1])]
    counts = torch.bincount((1 << draws).sum(dim=1), minlength=max(sets) + 1)
    check_uniform(counts[sets], len(draws) / len(sets))


@pytest.mark.parametrize(("size", "wanted"), [(3, 2), (7, 3), (8, 4), (9, 2), (12, 5)])
def test_draws_are_uniform(size: int, wanted: int) -> None:
    draws, classes = _draws(size, wanted), list(range(size))
    _check_classes(draws, classes)
    _check_pairs(draws, classes)
    if size < 9:
        _check_sets(draws, classes)


def test_negatives_are_uniform_beside_positives() -> None:
    draws, classes = _draws(9, 5, 2, 6), [0, 1, 3, 4, 5, 7, 8]
    assert draws.shape[1] == 3
    _check_classes(draws, classes)
    _check_pairs(draws, classes)
    _check_sets(draws, classes)


@pytest.mark.extended
def test_a_biased_draw_is_noticed(monkeypatch, in_torch) -> None:
    """The checks reject samplers that look random and are not."""
    classes = list(range(8))
    random = torch.Generator().manual_seed(0)
    # The remainder of a power of two: five classes come more often, four times instead of three.
    remainders = torch.randint(0, 2**5, (DRAWS, 1), generator=random) % 9
    with pytest.raises(AssertionError, match="chi-square"):
        _check_classes(remainders, list(range(9)))
    # A random rotation: every class is drawn as often, neighbors together.
    shifts = torch.randint(0, 8, (DRAWS, 1), generator=random)
    rotations = (shifts + torch.arange(4)) % 8
    _check_classes(rotations, classes)
    for check in (_check_pairs, _check_sets):
        with pytest.raises(AssertionError, match="chi-square"):
            check(rotations, classes)
    # The network with parts of a bit or two: they mix slowly.
    monkeypatch.setattr(permutations, "FEWEST_BITS", 1)
    monkeypatch.setattr(permutations, "ROUNDS", 8)
    with pytest.raises(AssertionError, match="chi-square"):
        _check_sets(_draws(8, 4), classes)
