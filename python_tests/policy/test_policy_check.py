"""policy.check finds nothing wrong with what is right, and what is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.helpers import run_python
from support.own_policies import Contrastive, Cosine, Threshold, Tuplet, Unified

from train.examples import policies as examples
from unitsface_kernels import ClassLoss, PairLoss, policy
from unitsface_kernels.policy.checking import Report
from unitsface_kernels.policy.operations import OPERATIONS

CHECKED = ("reference", "native")


def wrong(report: Report) -> list[str]:
    return [f"{finding.where}: {finding.what}" for finding in report.findings if not finding.ok]


@pytest.mark.parametrize(
    "loss",
    [
        *(Contrastive(margin=0.3), ClassLoss(Cosine(scale=30.0), 8, 3)),
        *(
            pytest.param(loss, marks=pytest.mark.extended)
            for loss in (
                *(Threshold(), Tuplet(), Unified(share=0.3)),
                *(examples.Verification(), examples.AdaptiveMargin()),
                PairLoss(Contrastive(margin=0.1)),
            )
        ),
    ],
    ids=repr,
)
def test_nothing_is_wrong(loss: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = policy.check(loss, backends=CHECKED)
    text = capsys.readouterr().out
    assert report.ok, text
    assert text.strip() == str(report)
    assert ": nothing is wrong\n" in text
    assert {finding.where for finding in report.findings} == {"formula", *CHECKED}
    largest = max(finding.ratio for finding in report.findings if finding.ran)
    assert 0.0 < largest < 1.0


def patched(monkeypatch: pytest.MonkeyPatch, op: str, **changes: Any) -> None:
    monkeypatch.setitem(OPERATIONS, op, dataclasses.replace(OPERATIONS[op], **changes))


def test_a_wrong_derivative_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patched(monkeypatch, "tanh", derivatives=lambda y, x: (1.01 - y * y,))

    class Bent(policy.Pair):
        def positive(self, c):
            return 1 - c

        def negative(self, c):
            return policy.tanh(3 * c) + 1

    report = policy.check(Bent(), backends=CHECKED)
    assert not report.ok
    found = wrong(report)
    assert "formula: negative: derivative by cosine" in found
    assert not any("positive" in what for what in found)
    # The reference differentiates the eager meaning.
    assert any(what.startswith("native") for what in found)
    assert not any(what.startswith("reference") for what in found)
    text = capsys.readouterr().out
    assert f"Bent(): {len(found)} of {len(report.findings)} are wrong" in text
    assert "WRONG  at cosine" in text


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, "tanh", cpp="(1.0001f * tanh_bounded({0}))")

    class Scaled(policy.Pair):
        def positive(self, c):
            return 1 - policy.tanh(c)

        def negative(self, c):
            return policy.tanh(2 * c) + 1

    found = wrong(policy.check(Scaled(), backends=CHECKED, show=False))
    assert found
    assert all(what.startswith("native") for what in found)


def test_numbers_that_make_a_formula_infinite_are_found() -> None:
    class Logarithm(policy.Pair):
        shift: policy.Number = 2.0

        def positive(self, c):
            return -policy.log(self.shift + c)

        def negative(self, c):
            return policy.log(self.shift + c)

    assert policy.check(Logarithm(), backends=CHECKED, show=False).ok
    report = policy.check(Logarithm(shift=0.5), backends=["reference"], show=False)
    assert not report.ok
    assert "not finite" in str(report)


def test_a_constant_of_the_gradient_is_no_error() -> None:
    class Detached(policy.Class):
        combine = "logsumexp"

        def positive(self, c):
            return 8 * (c - 0.3 * policy.detach(policy.square(c)))

        def negative(self, c):
            return 8 * c

    assert policy.check(Detached(), backends=CHECKED, show=False).ok


def test_mistakes() -> None:
    with pytest.raises(TypeError, match=r"an instance, Contrastive\(\), got the class"):
        policy.check(Contrastive)
    with pytest.raises(TypeError, match=r"an instance of a policy.Pair, got int"):
        policy.check(3)
    with pytest.raises(
        ValueError, match="backends must be one of reference, native, eager, triton"
    ):
        policy.check(Contrastive(), backends=["cuda"])
    with pytest.raises(ValueError, match="scale must be > 0"):
        policy.check(Threshold(scale=-1.0))


def test_the_package_does_not_import_it() -> None:
    code = "import sys, unitsface_kernels as u; sys.exit('policy.checking' in str([*sys.modules]))"
    assert run_python("-c", code).returncode == 0
