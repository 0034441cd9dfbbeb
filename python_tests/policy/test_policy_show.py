"""``python -m unitsface_kernels.policy show``: what becomes of a formula, for its author."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import ROOT

from unitsface_kernels import policy
from unitsface_kernels.policy.__main__ import main
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
    (tmp_path / "own_losses.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text(SOURCE.replace("1 - c", "policy.log(c)"))
    return tmp_path


def _run(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unitsface_kernels.policy", "show", name],
        cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_formula_derivatives_and_kernels_are_printed(folder: Path) -> None:
    done = _run(folder, "own_losses:Contrastive")
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
        ("own_losses:Wrong", "policy must be module:Class of a policy"),
        ("own_losses", "policy must be module:Class of a policy"),
        ("own_losses:Missing", "policy must be module:Class of a policy"),
        ("missing_module:Contrastive", "No module named 'missing_module'"),
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


def test_derivatives_by_variables_are_shown() -> None:
    lines = shown(WithVariable.formula).splitlines()
    assert "x0 = sigmoid(scale * cosine)" in lines
    assert "d negative / d scale = x0 * cosine" in lines
    assert "struct WithVariable {" in lines
    assert lines[lines.index("Triton") + 2] == "none: the formula reads variables"
