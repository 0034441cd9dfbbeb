"""docs/custom_losses.md and its notebook: the code runs, and its results are as described."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.helpers import ROOT
from support.notebooks import run
from support.tolerances import SAME_LOSS, check_same

import unitsface_kernels as uk
from train.examples import policies as examples
from unitsface_kernels import policy

PAGE = (ROOT / "docs" / "custom_losses.md").read_text()
NOTEBOOK = ROOT / "docs" / "custom_loss.ipynb"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
EXAMPLES = ["Contrastive", "Verification", "ClassMargin", "Circle", "AdaptiveMargin"]


def test_the_first_snippet_runs() -> None:
    names: dict[str, Any] = {"feats": torch.randn(9, 8), "labels": torch.arange(9) % 3}
    exec(SNIPPETS[0], names)
    other = uk.PairLoss(examples.Contrastive(margin=0.3))(names["feats"], names["labels"])
    check_same("loss", names["loss"], other, SAME_LOSS)


def test_examples_are_those_of_the_file() -> None:
    source = (ROOT / "train" / "examples" / "policies.py").read_text()
    shown = [code for code in SNIPPETS[1:] if code.startswith("class ")]
    assert [re.match(r"class (\w+)", code)[1] for code in shown] == EXAMPLES  # type: ignore[index]
    for code in shown:
        assert code in source
    assert [name for name in vars(examples) if name[0].isupper()] == EXAMPLES


def test_every_word_of_the_vocabulary_is_there() -> None:
    for name in policy.__all__:
        assert re.search(rf"\b{name}\b", PAGE) or name in ("Expression", "Policy"), name


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 if c > 0.3 else 0", "the value of a pair decides a branch of Python"),
        ("return math.exp(c)", "a formula is written with policy's functions, not with those of"),
        ("return policy.log(c)", "negative is not finite at cosine -1"),
        ("return policy.sqrt(1 + c)", "the derivative of negative by cosine is not finite"),
        ("return c > 0.3", "must return a number, got a mask"),
    ],
)
def test_errors_of_formulas_are_as_shown(body: str, message: str) -> None:
    assert message in PAGE
    code = "class Mine(policy.Pair):\n    def negative(self, c):\n        " + body
    import math

    with pytest.raises(policy.FormulaError, match=re.escape(message).replace(r"\ ", r"\s")):
        exec(code, {"policy": policy, "math": math, "__name__": __name__})


@pytest.mark.extended
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(NOTEBOOK)
    printed = capsys.readouterr().out
    check_same("by hand", names["first"], names["by_hand"], SAME_LOSS)
    assert names["report"].ok
    assert "return policy.sqrt(c)" in printed
    results = names["results"]
    # Unseen people are distinguished better than by their pixels.
    assert results["contrastive"] > results["pixels"] + 0.01
    assert results["verification"] > results["pixels"] + 0.02
    assert "PairLoss(Contrastive(margin=0.3)" in printed
