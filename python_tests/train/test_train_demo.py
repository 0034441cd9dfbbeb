"""The demo's report: its figures, its honesty, its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.training import ROOT  # noqa: F401

from train.errors import exit_code
from train.evaluation.verification import Verification
from train.tools import demo
from train.tools.report import layout


def result(
    auc: float, accuracy: float, threshold: float | None = None, *, negatives: int = 100
) -> Verification:
    return Verification(
        pairs=4 + negatives,
        positives=4,
        accuracy=accuracy,
        accuracy_std=0.01,
        auc=auc,
        tar_at_far={"0.01": 0.5, "0.1": 0.75},
        threshold=threshold,
        accuracy_at_threshold=None if threshold is None else 0.6,
        best_threshold=0.3,
    )


def printed(results: dict[str, Verification]) -> str:
    return layout(demo.table("method", {name: [r] for name, r in results.items()}, folds=True))


def test_table_has_one_row_per_method_and_a_dash_without_a_threshold() -> None:
    text = printed({"pixels": result(0.9, 0.8), "ours": result(0.95, 0.85, threshold=0.25)})
    header, _, pixels, ours = text.splitlines()
    assert [c.strip() for c in header.split("|")[1:-1]] == [
        "method",
        "accuracy",
        "AUC",
        "TAR@FAR=0.01",
        "TAR@FAR=0.1",
        "accuracy at threshold",
        "learned threshold",
    ]
    assert [c.strip() for c in pixels.split("|")[1:-1]][-2:] == ["-", "-"]
    cells = [c.strip() for c in ours.split("|")[1:-1]]
    assert cells == ["ours", "0.850 ± 0.010", "0.950", "0.500", "0.750", "0.600", "0.250"]
    assert len({len(line) for line in text.splitlines()}) == 1
    # With 99 negative pairs none may be accepted at 0.01.
    few = printed({"pixels": result(0.9, 0.8, negatives=99)}).splitlines()[-1]
    assert [c.strip() for c in few.split("|")[4:6]] == ["not resolved", "0.750"]


def test_verdict_of_a_model_below_the_better_baseline() -> None:
    results = {"pixels": result(0.90, 0.84), "PCA": result(0.92, 0.83), "ours": result(0.91, 0.85)}
    text = demo.verdict(results, ["ours"])
    assert "AUC 0.910 against 0.920 of the better baseline (NOT better)" in text
    assert "accuracy 0.850 against 0.840 (better)" in text


@pytest.mark.extended
def test_demo_writes_report_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        demo, "QUICK", ["model.input_size=16", "train.max_steps=2", "train.device=cpu"]
    )
    assert demo.run(["--quick", "--out", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    names = {p.name for p in out.iterdir()}
    assert names == {
        "report.md",
        "report.html",
        "report.json",
        "cosface",
        "unitsface",
    }
    values = json.loads((out / "report.json").read_text())
    assert values["smoke"] is True
    assert values["train_identities"] == 30
    assert values["test_identities"] == 10
    assert list(values["results"]) == ["raw pixels", "PCA", "CosFace", "CosFace + USS-m"]
    for figures in values["results"].values():
        assert (figures["pairs"], figures["positives"]) == (4950, 450)
    # The baselines do not depend on training: their figures at 16 x 16 are fixed.
    assert values["results"]["raw pixels"]["auc"] == pytest.approx(0.92, abs=0.02)
    assert values["results"]["CosFace"]["threshold"] is None
    assert values["results"]["CosFace + USS-m"]["accuracy_at_threshold"] is not None
    text = (out / "report.md").read_text()
    assert "Smoke run" in text
    assert "AT&T Laboratories Cambridge" in text
    assert "`make losses` compares more losses" in text
    page = (out / "report.html").read_text()
    assert page.count("<svg ") == 6  # scores of four methods, ROC, loss
    assert page.count("<svg role") == page.count("aria-label") - 1  # and a table
    for run in ("cosface", "unitsface"):  # a page for each run, its features among it
        assert "has no features" not in (out / run / "report.html").read_text()
    assert "Smoke run" in capsys.readouterr().out


def test_demo_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: demo.run(["--fast"])) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --fast\n"
    file = tmp_path / "file"
    file.write_text("x")
    assert exit_code(lambda: demo.run(["--quick", "--out", str(file)])) == 2
    assert "is not a folder" in capsys.readouterr().err
