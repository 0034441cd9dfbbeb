"""Exact search of the nearest rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from unitsface_kernels import metrics

each_backend = pytest.mark.parametrize("backend", ["native", "reference"])


@each_backend
@pytest.mark.parametrize("k", [1, 7])
def test_all_cosines_sorted(backend: str, k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    feats = 3 * torch.randn(1030, 24, generator=draw)
    other = torch.randn(2100, 24, generator=draw)  # several tiles either way
    found = metrics.nearest(feats, other, k, backend=backend)
    cosines = torch.nn.functional.normalize(feats) @ torch.nn.functional.normalize(other).T
    torch.testing.assert_close(found.scores, cosines.topk(k).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(cosines.gather(1, found.index), found.scores, atol=1e-6, rtol=0)


@each_backend
def test_of_equal_scores_the_first_rows_are_found(backend: str) -> None:
    other = torch.eye(4).repeat(700, 1)  # every row 700 times, over several tiles
    found = metrics.nearest(torch.eye(4), other, 5, backend=backend)
    assert found.index.tolist() == [[i, i + 4, i + 8, i + 12, i + 16] for i in range(4)]
    assert (found.scores == found.scores[0, 0]).all()


def test_a_gallery_may_be_a_file_mapped_into_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(20_000, 32)).astype(np.float32)
    np.save(tmp_path / "g.npy", gallery)
    mapped = torch.from_numpy(np.load(tmp_path / "g.npy", mmap_mode="c"))
    found = metrics.nearest(mapped[[5, 19_999]].clone(), mapped, 1)
    assert found.index.tolist() == [[5], [19_999]]


def test_mistakes() -> None:
    feats, other = torch.ones(2, 3), torch.ones(4, 3)
    for k in (0, 5):
        with pytest.raises(ValueError, match="k must be"):
            metrics.nearest(feats, other, k)
    with pytest.raises(ValueError, match="other must have D = 3"):
        metrics.nearest(feats, torch.ones(4, 2), 1)
    other[3, 0] = math.nan
    with pytest.raises(ValueError, match="2 scores that are NaN"):
        metrics.nearest(feats, other, 1)
    assert metrics.nearest(feats[:0], other[:3], 1).index.shape == (0, 1)
