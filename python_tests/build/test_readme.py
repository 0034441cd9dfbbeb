"""README and docs/: the table comes from the registry, snippets run and agree."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import run_ranks
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import unitsface_kernels

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def snippets(page: str = "README.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_support_table_is_generated_from_the_registry() -> None:
    table = runpy.run_path(str(ROOT / "docs" / "support_table.py"))
    assert table["updated"](README) == README
    assert table["updated"](README.replace("| uss |", "| sus |")) == README


def test_the_first_snippet_equals_the_eager_code_it_replaces() -> None:
    fused, eager = snippets()[:2]
    torch.manual_seed(0)
    values = {"feats": torch.randn(60, 32), "labels": torch.randint(0, 12, (60,))}
    found = []
    for code in (fused, eager):
        names = {
            "F": F,
            "torch": torch,
            "labels": values["labels"],
            "feats": values["feats"].clone().requires_grad_(),
            "b": torch.tensor(20.0, requires_grad=True),
        }
        exec(code, names)
        found.append((names["loss"].detach(), names["feats"].grad, names["b"].grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("page", "place"), [("README.md", 2), ("docs/usage.md", 0)])
def test_the_module_snippet_runs(page: str, place: int) -> None:
    code = snippets(page)[place]
    names = {
        "num_classes": 5,
        "backbone": torch.nn.Linear(7, 512),
        "images": torch.randn(6, 7),
        "labels": torch.arange(6) % 5,
    }
    exec(code, names)
    assert names["loss"].isfinite()
    feats = names["backbone"](names["images"])
    first = unitsface_kernels.uss_threshold_init(feats, names["labels"])
    assert names["threshold"].item() == pytest.approx(float(first) / 64)


def test_the_memory_snippet_runs() -> None:
    names = {
        "num_identities": 5,
        "feats": torch.randn(6, 512),
        "labels": torch.arange(6) % 5,
    }
    exec(snippets("docs/usage.md")[1], names)
    assert names["loss"].isfinite()
    assert torch.equal(names["memory"].labels, torch.arange(5))


def test_the_partial_fc_snippet_runs() -> None:
    names = {
        "backbone": torch.nn.Linear(7, 512),
        "images": torch.randn(6, 7),
        "labels": torch.arange(6),
        # A stand-in: one process without a group.
        "DistributedDataParallel": lambda module: module,
    }
    code = snippets("docs/usage.md")[2]
    assert "num_classes=10_000_000" in code
    exec(code.replace("10_000_000", "1000"), names)
    before = names["head"].weight.detach().clone()
    names["loss"].backward()
    assert names["head"].weight.grad is None
    moved = (names["head"].weight != before).any(dim=1)
    # Without momentum or decay, of those drawn the ones with a gradient: at least the batch's.
    assert moved[:6].all()
    assert moved.sum() <= 100


def test_the_metrics_snippet_runs(capsys: pytest.CaptureFixture) -> None:
    names = {
        "feats": torch.randn(40, 16),
        "labels": torch.arange(40) % 8,
        "b": torch.tensor(20.0),
    }
    exec(snippets("docs/usage.md")[3], names)
    assert names["rates"].tar.shape == (3,)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:loss .* runs in operations of Torch")
def test_the_snippet_of_learned_numbers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Formulas are compiled by other tests.
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    names = {
        "num_classes": 5,
        "feats": torch.randn(6, 512),
        "labels": torch.arange(6) % 5,
        "b": torch.tensor(5.0),
        "log_scale": torch.tensor(3.0, requires_grad=True),
    }
    code = next(code for code in snippets("docs/usage.md") if "nn.Parameter" in code)
    exec(code, names)
    names["loss"].backward()
    assert names["log_scale"].grad != 0.0


def test_the_snippet_of_two_towers_runs() -> None:
    names = {name: torch.randn(6, 16) for name in ("a", "b", "queries", "keys")}
    names |= {name: torch.arange(6) % 3 for name in ("labels", "key_labels")}
    names["log_scale"] = torch.tensor(3.0, requires_grad=True)
    code = next(code for code in snippets("docs/usage.md") if "SigLIPLoss" in code)
    exec(code, names)
    assert torch.isfinite(names["loss"])


def test_the_debugging_snippet_runs(capsys: pytest.CaptureFixture) -> None:
    (code,) = snippets("docs/debugging.md")
    names = {
        "fused_uss_loss": unitsface_kernels.fused_uss_loss,
        "feats": torch.randn(40, 16),
        "labels": torch.arange(40) % 8,
        "b": torch.tensor(20.0),
    }
    exec(code, names)
    native, exact = map(float, capsys.readouterr().out.split())
    assert native == pytest.approx(exact, rel=1e-5)


def test_the_metric_learning_snippet_runs() -> None:
    names = {
        "embeddings": torch.randn(8, 512, requires_grad=True),
        "labels": torch.arange(8) % 4,
        "others": torch.randn(6, 512),
        "other_labels": torch.arange(6) % 4,
    }
    (code,) = snippets("docs/metric_learning.md")
    exec(code, names)
    names["loss"].backward()
    assert names["embeddings"].grad.isfinite().all()


def _in_your_own_trainer(rank: int, path: str) -> float:
    torch.manual_seed(0)
    names = {
        name: getattr(unitsface_kernels, name)
        for name in ("PartialFC", "SampledSGD", "clip_grad_norm_")
    }
    names |= {
        "ShardedGradScaler": ShardedGradScaler,
        "DistributedDataParallel": DistributedDataParallel,
        "backbone": torch.nn.Linear(7, 512),
        "images": torch.randn(6, 7),
        "labels": torch.arange(6) + 500 * rank,
    }
    step, checkpoint = snippets("docs/distributed.md")
    step = step.replace("10_000_000", "1000").replace('device="cuda"', 'device="cpu"')
    exec(step, names)
    weight = names["head"].weight.detach().clone()
    exec(checkpoint, names | {"path": path, "step": 3})
    assert torch.equal(names["head"].weight, weight)
    return float(weight[:6].std())


@pytest.mark.extended
def test_the_distributed_snippets_run(tmp_path: Path) -> None:
    spread = run_ranks(2, _in_your_own_trainer, str(tmp_path / "last"))
    # Initial weights have 0.01, and the batch's classes have moved.
    assert all(0.0101 < of_rank < 1.0 for of_rank in spread)


#: Snippets with a test of their own, above or in the file named.
CHECKED = {
    "README.md": {0, 1, 2},
    "docs/usage.md": {0, 1, 2, 3, 4, 5},
    "docs/debugging.md": {0},
    "docs/distributed.md": {0, 1},
    "docs/metric_learning.md": {0},
    # test_policy_page.py
    "docs/custom_losses.md": set(range(20)),
    # It needs a CUDA device; what it does is tested there by test_cuda_graphs.py.
    "docs/cuda_graphs.md": {0},
}


def _sentences(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"sentence_embedding": features["text"]}


def _taken_for_granted(page: str) -> dict[str, Any]:
    """Names of the surrounding program, by page."""
    if page == "docs/usage.md":
        return {"feats": torch.randn(6, 8), "labels": torch.arange(6) // 2}
    if page == "docs/math.md":
        feats, weight = torch.randn(6, 8), torch.randn(3, 8)
        return {
            "F": F,
            "torch": torch,
            "feats": feats,
            "weight": weight,
            "labels": torch.arange(6) % 3,
        } | {"fused_margin_softmax_loss": unitsface_kernels.fused_margin_softmax_loss}
    if page == "docs/from_sentence_transformers.md":
        columns = ({"text": torch.randn(4, 8)} for _ in range(3))
        names = ("anchors", "positives", "hard_negatives")
        return {"model": _sentences, "labels": None, **dict(zip(names, columns, strict=True))}
    if page == "docs/from_insightface.md":
        cfg = SimpleNamespace(
            **{"margin_list": (1.0, 0.5, 0.0), "embedding_size": 8, "num_classes": 12},
            **{"sample_rate": 0.5, "lr": 0.1, "weight_decay": 5e-4},
        )
        return {
            **{"cfg": cfg, "backbone": torch.nn.Linear(3, 8)},
            **{"local_embeddings": torch.randn(4, 8), "local_labels": torch.arange(4)},
        }
    return {}


def _other_snippets() -> list[tuple[str, int]]:
    pages = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    return [
        (page, place)
        for page in pages
        for place in range(len(snippets(page)))
        if place not in CHECKED.get(page, ())
    ]


@pytest.mark.filterwarnings("ignore:loss .* runs in operations of Torch")
@pytest.mark.parametrize(("page", "place"), _other_snippets())
def test_all_other_snippets_run(page: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Formulas are compiled by other tests.
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    code = snippets(page)[place]
    names = _taken_for_granted(page)
    # A formula is read from the lines of its class.
    exec(compile(code, page, "exec"), names)
    loss = names.get("loss", names.get("value"))
    assert loss is None or isinstance(loss, torch.nn.Module) or loss.isfinite()


def test_every_snippet_is_a_program() -> None:
    for page in CHECKED:
        for code in snippets(page):
            compile(code, page, "exec")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
