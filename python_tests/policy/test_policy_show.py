"""``python -m unitsface_kernels.policy show``: what becomes of a formula, for its author."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT

from unitsface_kernels import policy
from unitsface_kernels.losses import circle, npt
from unitsface_kernels.policy.__main__ import main
from unitsface_kernels.policy.formula import Formula
from unitsface_kernels.policy.show import shown

SOURCE = """
from unitsface_kernels import policy


class Contrastive(policy.Pair):
    margin: policy.Number = 0.4

    def positive(self, c):
        return 1 - c

    def negative(self, c):
        return policy.square(policy.maximum(c - self.margin, 0))


class Wrong:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "losses_to_show.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text(SOURCE.replace("1 - c", "policy.log(c)"))
    return tmp_path


def _run(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unitsface_kernels.policy", "show", name],
        cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_formula_derivatives_and_kernels_are_printed(folder: Path) -> None:
    done = _run(folder, "losses_to_show:Contrastive")
    assert done.returncode == 0, done.stderr
    for line in (
        "positive = 1 - cosine",
        "d positive / d cosine = -1",
        "margin = 0.4",
        "struct Contrastive {",
        "  float margin;",
        "def term(cosine, threshold, positive, params):",
        "POLICY = SumTermsPolicy(term)",
    ):
        assert line in done.stdout.splitlines(), done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("losses_to_show:Wrong", "policy must be module:Class of a policy"),
        ("losses_to_show", "policy must be module:Class of a policy"),
        ("losses_to_show:Missing", "policy must be module:Class of a policy"),
        ("missing_module:Contrastive", "No module named 'missing_module'"),
        (":Contrastive", "Empty module name"),
        ("broken:Contrastive", "not finite at cosine -1"),
    ],
)
def test_a_wrong_name_is_an_error(
    folder: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(folder)
    assert main(["show", name]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


class WithVariable(policy.Class):
    scale: policy.Scalar

    def negative(self, c):
        return policy.softplus(self.scale * c)


@pytest.mark.parametrize(
    ("formula", "wanted"),
    [
        (
            npt.Npt.formula,
            ("triplet = where(x0 <= 0, 0, x0)", "d triplet / d nearest = where(is0, 0, 2)"),
        ),
        (
            circle.Circle.formula,
            ("finish = softplus(positives + negatives)", "d finish / d positives = x0"),
        ),
    ],
)
def test_formulas_of_rows_are_shown(formula: Formula, wanted: tuple[str, ...]) -> None:
    lines = shown(formula).splitlines()
    assert set(wanted) <= {*lines}
    assert ("POLICY" in shown(formula)) == (formula.triplet is None)


def test_derivatives_by_variables_are_shown() -> None:
    lines = shown(WithVariable.formula).splitlines()
    assert "x0 = sigmoid(scale * cosine)" in lines
    assert "d negative / d scale = x0 * cosine" in lines
    assert "struct WithVariable {" in lines
    assert "def term(cosine, threshold, positive, params, variables):" in lines
    assert lines[-1] == "POLICY = SumTermsPolicy(term, heavy=True)"
