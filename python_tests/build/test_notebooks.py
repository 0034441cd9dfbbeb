"""The notebooks of docs/: without outputs, and run in a kernel as a notebook's server runs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.helpers import ROOT
from support.notebooks import code_cells

NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
#: Longest time of a cell, beside other work on the machine.
LIMIT_S = 300


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert {*cell} >= {"cell_type", "id", "metadata", "source"}
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for code in code_cells(path):
        compile(code, "cell", "exec")


def _executed(name: str, expression: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What an expression of the notebook's names is in the end."""
    import nbclient
    import nbformat

    # The kernel is a process of its own.
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(ROOT / "docs" / name, as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell(f"import json; print(json.dumps({expression}))")
    )
    nbclient.NotebookClient(
        notebook,
        timeout=LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT / "docs")}},
    ).execute()
    (output,) = notebook.cells[-1].outputs
    return json.loads(output.text)


@pytest.mark.extended
def test_a_loss_in_ten_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    (code, *_) = code_cells(ROOT / "docs" / "first_loss.ipynb")
    assert len([line for line in code.splitlines() if line]) <= 10
    loss, eager, difference, course, gap = _executed(
        "first_loss.ipynb",
        "[loss.item(), eager.item(), difference.item(), course, float(gap.gap)]",
        monkeypatch,
    )
    assert loss == pytest.approx(eager, rel=1e-4)
    assert difference < 1e-3
    assert sum(course[-10:]) < 0.5 * sum(course[:10])
    assert abs(gap) < 0.3


@pytest.mark.extended
def test_train_on_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, tar, learned, best = _executed(
        "train_on_faces.ipynb",
        "[losses, rates.tar.tolist(), learned, [best.threshold, best.accuracy]]",
        monkeypatch,
    )
    assert losses[-1] < losses[0]
    assert 0.2 < tar[0] < tar[1]
    assert best[1] > 0.75
    assert abs(learned - best[0]) < 0.3
