"""Where a score is counted: the bins themselves, and the tile kernels against loops over pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.helpers import DEVICES, run_python
from torch import Tensor

from unitsface_kernels import dispatch
from unitsface_kernels.backends.histogram import (
    Binning,
    HistogramTile,
    ReferenceScores,
    score_key,
    score_of_key,
)
from unitsface_kernels.backends.native import loader, score_engine

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 1.0000001, -1.0000001, 3.0, -3.0, 0.25, -0.5]
SPECIAL += [math.inf, -math.inf, math.nan]


def engines() -> list:
    found = [ReferenceScores(torch.device(device)) for device in DEVICES]
    for device in DEVICES:
        if dispatch.unavailable("native", device, torch.float32) is None:
            found.append(score_engine(torch.device(device)))
    return found


def test_both_engines_are_tested() -> None:
    assert len(engines()) >= 2 * len(DEVICES)


def test_keys_are_ordered_neighbors() -> None:
    values = torch.tensor(sorted(v for v in SPECIAL if not math.isnan(v)))
    keys = score_key(values)
    assert torch.equal(keys, keys.sort().values)
    assert score_key(torch.tensor(0.0)) == score_key(torch.tensor(-0.0))
    assert torch.equal(score_of_key(keys), values)
    up = score_key(torch.nextafter(values[1:-1], torch.tensor(math.inf)))
    assert torch.equal(up, keys[1:-1] + 1)


@pytest.mark.parametrize(
    "binning", [Binning(1), Binning(7), Binning(2**14), Binning(1000, -0.3, 0.1), Binning(3, 0, 1)]
)
def test_edges_are_where_the_bin_changes(binning: Binning) -> None:
    edges = score_of_key(binning.edge_keys)
    bins = torch.arange(1, binning.bins + 2)
    below = torch.nextafter(edges, torch.tensor(-math.inf))
    assert bool((binning.bin_of(edges) >= bins).all())
    assert bool((binning.bin_of(below) < bins).all())
    uniform = torch.linspace(binning.low, binning.high, binning.bins + 1)
    assert (edges - uniform).abs().max() < 1e-6
    scores = torch.cat([torch.randn(1000), torch.tensor(SPECIAL[:-1])])
    by_edges = torch.searchsorted(edges, scores, right=True)
    assert torch.equal(binning.bin_of(scores), by_edges)
    assert binning.bin_of(torch.tensor(math.nan)) == binning.bins + 2


def _loop(cosines: Tensor, tile: HistogramTile) -> Tensor:
    """The counts that a tile has to add."""
    counts = torch.zeros_like(tile.counts)
    bins = tile.binning.bin_of(cosines)
    keys = score_key(cosines)
    for i, j in itertools.product(*map(range, cosines.shape)):
        a, b = int(tile.a_labels[i]), int(tile.b_labels[j])
        place = math.inf if tile.diagonal is None else j - i - tile.diagonal
        if a < 0 or b < 0 or place == 0 or (tile.upper and place < 0):
            continue
        slot = int(bins[i, j])
        if tile.range_of_bin is not None:
            which = int(tile.range_of_bin[slot])
            if which < 0:
                continue
            low, size, shift, first = tile.ranges[which].tolist()
            offset = int(keys[i, j]) - low
            if not 0 <= offset < size:
                continue
            slot = first + offset // 2**shift
        histogram = counts[i] if counts.dim() == 3 else counts
        histogram[int(a != b), slot] += 1
    return counts


def _tile(n: int, m: int, skip: int | None, upper: bool, per_row: bool, ranges: bool):
    cosines = torch.randn(n, m) / 4
    special = torch.rand(n, m) < 0.2
    cosines[special] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (int(special.sum()),))]
    binning, slots, range_of_bin, table = Binning(37), 40, None, None
    if ranges:
        # Bins of 0 and of 1/4 in groups of 2^20 values, what lies above 1 in single ones.
        of = [int(binning.bin_of(torch.tensor(v))) for v in (0.0, 0.25, 1.0)]
        keys = [*binning.edge_keys[[of[0] - 1, of[0], of[1] - 1, of[1]]].tolist(), 0x3F800000]
        sizes = [keys[1] - keys[0], keys[3] - keys[2], 2]
        spans = [-(-sizes[0] >> 20), -(-sizes[1] >> 20), 2]
        table = torch.tensor(
            [
                [keys[0], sizes[0], 20, 0],
                [keys[2], sizes[1], 20, spans[0]],
                [keys[4], sizes[2], 0, spans[0] + spans[1]],
            ]
        )
        slots = sum(spans)
        range_of_bin = torch.full((40,), -1, dtype=torch.int32)
        range_of_bin[of] = torch.arange(3, dtype=torch.int32)
    shape = (n, 2, slots) if per_row else (2, slots)
    counts = torch.full(shape, 5)
    labels = torch.randint(-1, 4, (n,)), torch.randint(-1, 4, (m,))
    return cosines, HistogramTile(binning, *labels, skip, upper, counts, range_of_bin, table)


@pytest.mark.parametrize("engine", engines(), ids=lambda e: f"{type(e).__name__}-{e.device.type}")
@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "skip", "upper"),
    [
        (1, 1, None, False),
        (1, 1, 0, True),
        (17, 33, None, False),
        (33, 17, 0, False),
        (33, 33, 0, True),
        (20, 40, -5, True),
        (20, 40, 12, False),
        (3, 2050, 1023, True),
        (3, 2050, 1022, False),
        (0, 4, 0, False),
        (4, 0, 0, True),
    ],
)
def test_tile(engine, n, m, skip, upper, per_row, ranges) -> None:
    cosines, tile = _tile(n, m, skip, upper, per_row, ranges)
    wanted = tile.counts + _loop(cosines, tile)
    if n * m > 500:
        assert not torch.equal(wanted, tile.counts)
    a_labels, b_labels = engine.prepare_labels(
        tile.a_labels.to(engine.device), tile.b_labels.to(engine.device)
    )
    moved = HistogramTile(
        tile.binning,
        a_labels,
        b_labels,
        skip,
        upper,
        tile.counts.to(engine.device),
        None if tile.range_of_bin is None else tile.range_of_bin.to(engine.device),
        None if tile.ranges is None else tile.ranges.to(engine.device),
    )
    engine.histogram_tile(cosines.to(engine.device), moved)
    assert torch.equal(moved.counts.cpu(), wanted)


SUMS = """
import torch
from unitsface_kernels.backends.histogram import Binning, HistogramTile
from unitsface_kernels.backends.native import score_engine
torch.manual_seed(0)
cosines, labels = torch.randn(100, 2000) / 3, torch.randint(-1, 5, (2000,), dtype=torch.int32)
cosines[3, 7] = torch.nan
engine = score_engine(torch.device("cpu"))
for counts in (torch.zeros(2, 1003, dtype=torch.int64), torch.zeros(100, 2, 1003).long()):
    engine.histogram_tile(
        cosines, HistogramTile(Binning(1000), labels[:100], labels, 5, True, counts)
    )
    weights = torch.arange(counts.numel()) % 10007
    print(int((counts.flatten() * weights).sum()), int(counts.sum()))
"""


@pytest.mark.extended
def test_every_instruction_set_counts_the_same() -> None:
    isas = loader.extension().cpu.usable_isas()
    answers = set()
    for isa in isas:
        done = run_python("-c", SUMS, UNITSFACE_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        answers.add(done.stdout)
    assert len(answers) == 1
    assert len(answers.pop().split()) == 4
