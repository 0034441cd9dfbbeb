"""The streaming ROC against scikit-learn's, and the command that writes it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as listed_curve
from support.training import tiny, train, write_faces

from train import evaluate
from train.data.loader import open_images
from train.data.orl import scan_orl
from train.errors import UserError
from train.evaluation.roc import FARS, Roc, roc_curve
from train.evaluation.verification import all_pairs


@pytest.fixture(scope="module")
def orl() -> tuple[np.ndarray, np.ndarray]:
    """Centered pixels of all 400 photographs: 79 800 pairs, none of them easy."""
    source = open_images(scan_orl(), 16, on_error="fail", cache="always")
    pixels = source.stacked()[:, 0].flatten(1).numpy().astype(np.float32)
    return pixels - pixels.mean(0), source.images.labels


def test_points_are_those_of_the_list_of_all_pairs(orl: tuple[np.ndarray, np.ndarray]) -> None:
    features, labels = orl
    curve = roc_curve(features, labels)
    scores, same = all_pairs(features, labels)
    assert (curve.positives, curve.negatives) == (same.sum(), (~same).sum()) == (1800, 78000)
    assert (curve.far[0], curve.tar[0]) == (1.0, 1.0)
    assert (curve.thresholds[-1], curve.far[-1], curve.tar[-1]) == (np.inf, 0.0, 0.0)
    assert (np.diff(curve.thresholds) > 0).all()
    assert (np.diff(curve.far) <= 0).all()
    assert (np.diff(curve.tar) <= 0).all()
    # Every point, by counting; a float32 score may lie on the other side of an edge.
    for values, rates in ((scores[same], curve.tar), (scores[~same], curve.far)):
        ordered = np.sort(values)
        accepted = len(ordered) - np.searchsorted(ordered, curve.thresholds[1:-1])
        assert np.abs(accepted - rates[1:-1] * len(ordered)).max() < 2.01
    assert curve.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-6)
    # As a step function it is scikit-learn's, but for the scores within a bin.
    fars, tars, _ = listed_curve(same, scores, drop_intermediate=False)
    ours = curve.tar[::-1][np.searchsorted(curve.far[::-1], fars, side="right") - 1]
    theirs = tars[np.searchsorted(fars, fars, side="right") - 1]
    assert np.abs(ours - theirs).max() < 0.005


def test_usual_rates_are_exact_where_there_are_negatives_enough(
    orl: tuple[np.ndarray, np.ndarray],
) -> None:
    features, labels = orl
    curve = roc_curve(features, labels)
    scores, same = all_pairs(features, labels)
    fars, tars, _ = listed_curve(same, scores, drop_intermediate=False)
    assert [p.far for p in curve.at] == [1e-4, 1e-3, 1e-2, 1e-1]
    for point in curve.at:
        assert point.tar == tars[fars <= point.far].max()
        assert point.achieved_far == fars[fars <= point.far].max()
        # The point is on the curve, at its threshold.
        place = np.flatnonzero(curve.tar == point.tar)
        assert curve.far[place].min() <= point.achieved_far
    assert curve.unresolved == (1e-6, 1e-5)
    assert "TAR@FAR=1e-05 not resolved: needs 100000 negative pairs, there are 78000" in str(curve)
    assert [line.split()[0] for line in str(curve).splitlines()] == [f"TAR@FAR={f:g}" for f in FARS]
    values = curve.to_dict()["tar_at_far"]
    assert values["1e-06"] is None
    assert values["0.01"]["tar"] == curve.at[2].tar


def test_a_perfect_model_has_area_one_and_one_below() -> None:
    labels = np.repeat(np.arange(5), 3)
    assert roc_curve(np.eye(5)[labels], labels).auc == 1.0
    rng = np.random.default_rng(0)
    noise: Roc = roc_curve(rng.standard_normal((200, 8)), rng.integers(0, 50, 200))
    assert 0.4 < noise.auc < 0.6


def test_pairs_command_writes_curve_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=4, images=4)
    train(tiny(data, tmp_path / "run", train={"epochs": 1}))
    out = tmp_path / "out"
    given = ["pairs", str(tmp_path / "run"), str(data), "--workers", "0"]
    assert evaluate.run([*given, "--roc", "--last", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "3 identities, 66 pairs" in text
    assert "TAR@FAR=0.01 not resolved: needs 100 negative pairs, there are 48" in text
    figures = json.loads((out / "pairs.json").read_text())
    assert figures["roc"]["auc"] == pytest.approx(figures["auc"], abs=1e-6)
    rate = figures["roc"]["tar_at_far"]["0.1"]
    assert rate["tar"] == pytest.approx(figures["tar_at_far"]["0.1"])
    with open(out / "roc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (rows[0]["far"], rows[-1]["far"]) == ("1.0", "0.0")
    assert (rate["achieved_far"], rate["tar"]) in [(float(r["far"]), float(r["tar"])) for r in rows]
    assert (out / "roc.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for wrong, message in (
        (["--roc"], "name a folder with --out"),
        (["--last", "5"], "--last: expected 0 to 4"),
        (["--last", "1"], "form no negative pair"),
        (["--out", str(out / "roc.csv")], "--out: cannot make the folder"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.run([*given, *wrong])
