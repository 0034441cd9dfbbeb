"""docs/metric_learning.md: its table of losses against what they take and refuse."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from support.adapted import stand_in
from support.helpers import ROOT

from unitsface_kernels.adapters import metric_learning as ours
from unitsface_kernels.adapters.metric_learning.pair_loss import PairLoss
from unitsface_kernels.adapters.metric_learning.weighted import ClassLoss

PAGE = (ROOT / "docs" / "metric_learning.md").read_text()
TABLE = PAGE.split("<!-- losses: begin -->\n")[1].split("<!-- losses: end -->")[0]
ROWS = {
    name: [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in TABLE.splitlines()[2:]
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
}


@dataclass(frozen=True)
class _Kind:
    """Distances of one word of the table."""

    distances: tuple[object, ...]
    default: object


KINDS = {
    "similarity": _Kind(
        (stand_in("CosineSimilarity"), stand_in("DotProductSimilarity")),
        stand_in("CosineSimilarity"),
    ),
    "inner": _Kind((stand_in("DotProductSimilarity", normalize=False),), None),
    "distance": _Kind(
        (stand_in("LpDistance"), stand_in("LpDistance", power=1.5)), stand_in("LpDistance")
    ),
    "raw": _Kind((stand_in("LpDistance", normalize=False),), None),
}
SQUARED = stand_in("LpDistance", power=2)
OTHERS = (
    stand_in("LpDistance", p=1),
    stand_in("CosineSimilarity", power=2),
    stand_in("SNRDistance"),
    stand_in("BatchedDistance"),
    object(),
)


def _made(name: str, **options: Any) -> Any:
    cls = getattr(ours, name)
    return cls(3, 8, **options) if issubclass(cls, ClassLoss) else cls(**options)


def test_the_table_has_every_loss() -> None:
    assert sorted(ROWS) == sorted({*ours.__all__} - {"CrossBatchMemory"})


@pytest.mark.parametrize("name", ROWS)
def test_distances_are_those_of_the_table(name: str) -> None:
    cell = ROWS[name][2]
    squared_alone = "`power=2`" in cell
    taken = set(re.findall(r"\b(similarity|inner|distance|raw)\b", cell))
    (default,) = re.findall(r"\*\*(\w+)\*\*", cell)
    for word, kind in KINDS.items():
        for distance in kind.distances:
            if word in taken and not (squared_alone and word == "distance"):
                assert _made(name, distance=distance).distance is distance
            else:
                with pytest.raises(ValueError, match=r"distance must be .*, got "):
                    _made(name, distance=distance)
    if "distance" in taken:
        assert _made(name, distance=SQUARED).distance is SQUARED
    for other in OTHERS:
        with pytest.raises(ValueError, match=r"distance must be .*, got "):
            _made(name, distance=other)
    chosen = SQUARED if squared_alone else KINDS[default].default
    assert _made(name).measure == _made(name, distance=chosen).measure


@pytest.mark.parametrize("name", ROWS)
def test_reducers_and_lists_are_those_of_the_table(name: str) -> None:
    _, _, _, reducer, lists = ROWS[name]
    loss = _made(name)
    assert reducer == f"`{loss.default_reducer.__name__}`"
    assert lists == ("pairs" if isinstance(loss, PairLoss) else "weights")
    assert isinstance(loss, PairLoss | ClassLoss)


@pytest.mark.parametrize("name", ROWS)
def test_what_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="collect_stats must be None, got bool"):
        _made(name, collect_stats=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'margins'"):
        _made(name, margins=1)
