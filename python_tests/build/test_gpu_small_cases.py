"""The small cases of bench/gpu_small_cases.py, as far as they go without a GPU."""

from __future__ import annotations

import pytest
import torch

import unitsface_kernels
from bench import gpu_small_cases
from unitsface_kernels.losses import REGISTRY, TOWERS


def test_small_cases_cover_every_loss_and_kind_of_columns() -> None:
    found = list(gpu_small_cases.cases())
    functions = {spec.function for spec in (*REGISTRY.values(), *TOWERS.values())}
    assert {case.function for case in found} >= functions
    assert {case.columns for case in found} == {"batch", "memory", "classes", "subset", "towers"}
    each = {case.function for case in found if case.threshold == "each"}
    wanted = {spec.function for spec in REGISTRY.values() if spec.threshold == "per_column"}
    assert each == wanted
    assert len(set(found)) == len(found)


def test_small_cases_pass_on_a_backend_that_is_right(capsys: pytest.CaptureFixture) -> None:
    options = ["--device", "cpu", "--backends", "native", "--dtypes", "float32"]
    try:
        assert gpu_small_cases.main([*options, "--match", "mean"]) == 0
        assert gpu_small_cases.main([*options, "--match", "histogram"]) == 0
        assert gpu_small_cases.main([*options, "--match", "rows"]) == 0
        # Nothing to run is no success.
        assert gpu_small_cases.main([*options, "--match", "no such case"]) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert "0 failed" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient", "error"])
def test_small_cases_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    right = unitsface_kernels.fused_uss_loss

    def wrong(feats, labels, b, *, backend: str, **options):
        if backend == "reference":
            return right(feats, labels, b, backend=backend, **options)
        if what == "error":
            raise RuntimeError("launch failed")
        if what == "gradient":
            feats = feats + torch.zeros_like(feats)
            feats.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([138]), 0.0))
        loss = right(feats, labels, b, backend=backend, **options)
        return loss * 1.001 if what == "loss" else loss

    monkeypatch.setitem(gpu_small_cases.FUNCTIONS, "fused_uss_loss", wrong)
    # signature() follows it to the parameters of the original.
    monkeypatch.setattr(wrong, "__wrapped__", right, raising=False)
    case = gpu_small_cases.SmallCase("fused_uss_loss", "batch", "one", "mean")
    if what == "error":
        with pytest.raises(RuntimeError):
            gpu_small_cases.check(case, torch.float32, "native", "cpu")
        return
    found = gpu_small_cases.check(case, torch.float32, "native", "cpu")
    assert found is not None
    assert ("loss" in found) == (what == "loss")
