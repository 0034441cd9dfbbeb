"""Unified thresholds, thresholds per identity, and one against many: against plain counting."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from support.training import tiny, train, write_faces

from train import evaluate
from train.config import Config
from train.data.dataset import scan
from train.data.loader import open_images
from train.data.orl import scan_orl
from train.evaluation import commands, plots, thresholds
from train.evaluation.commands import table, unique_names
from train.evaluation.test_sets import BinSet
from train.evaluation.verification import all_pairs, balanced_accuracy
from train.evaluation.verification import best_threshold as best_of_list

LEARNED = 0.55


@pytest.fixture(scope="module")
def orl() -> tuple[np.ndarray, np.ndarray]:
    """Centered pixels, in another order than that of the people."""
    source = open_images(scan_orl(), 16, on_error="fail", cache="always")
    pixels = source.stacked()[:, 0].flatten(1).numpy().astype(np.float32)
    order = np.random.default_rng(0).permutation(len(pixels))
    return (pixels - pixels.mean(0))[order], source.images.labels[order]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) for x in (a, b))
    return (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


def test_unified_threshold_of_features_is_that_of_their_pairs(
    orl: tuple[np.ndarray, np.ndarray],
) -> None:
    features, labels = orl
    scores, same = all_pairs(features, labels)
    found = thresholds.unify(features, labels, LEARNED)
    assert (found.pairs, found.positives) == (79800, 1800)
    wanted = best_of_list(scores, same)
    assert found.best == pytest.approx(wanted, abs=1e-6)
    best, learned = (balanced_accuracy(scores, same, t) for t in (wanted, LEARNED))
    assert found.accuracy_at_best == pytest.approx(best, abs=1e-9)
    assert found.accuracy_at_learned == pytest.approx(learned, abs=1e-9)
    assert learned < best
    assert found.gap == pytest.approx(LEARNED - wanted, abs=1e-6)
    none = thresholds.unify(features, labels)
    assert (none.best, none.learned, none.gap) == (found.best, None, None)


def test_identification_by_counting(
    orl: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = orl
    monkeypatch.setattr(thresholds, "TILE_ROWS", 7)
    monkeypatch.setattr(thresholds, "TILE_COLUMNS", 11)
    found = thresholds.identify(features, labels, LEARNED)
    assert found is not None
    assert (found.identities, found.probes) == (40, 360)
    first = [int(np.flatnonzero(labels == k)[0]) for k in range(40)]
    probes = np.setdiff1d(np.arange(400), first)
    scores, own = cosines(features[probes], features[first]), labels[probes]
    target = scores[np.arange(360), own]
    scores[np.arange(360), own] = -2
    other = scores.max(1)
    assert found.sample_wise == (target > other).mean()
    assert found.class_wise == (target > scores.max(0)[own]).mean()

    def uniform(t: float) -> float:
        return float(((target >= t) & (other < t)).mean())

    assert found.uniform == pytest.approx(max(uniform(t) for t in target))
    assert found.uniform == pytest.approx(uniform(found.uniform_threshold))
    assert found.uniform_at_learned == pytest.approx(uniform(LEARNED))
    assert found.uniform_at_learned < found.uniform <= found.class_uniform <= found.sample_wise
    assert thresholds.identify(features[first], labels[first], LEARNED) is None
    without = thresholds.identify(features, labels)
    assert without is not None
    assert without.uniform_at_learned is None


@pytest.mark.parametrize("tile", [(7, 11), (11, 7), (1024, 8192)])
def test_a_threshold_per_identity_by_counting(
    orl: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]
) -> None:
    features, labels = (x[:90] for x in orl)
    # An identity with one image has no positive pair, and no threshold.
    labels = np.append(labels, 1000)
    features = np.append(features, features[:1] * 0.5 + features[1:2], axis=0)
    monkeypatch.setattr(thresholds, "TILE_ROWS", tile[0])
    monkeypatch.setattr(thresholds, "TILE_COLUMNS", tile[1])
    spread = thresholds.per_identity(features, labels)
    known = [k for k, n in zip(*np.unique(labels, return_counts=True), strict=True) if n > 1]
    assert spread.identities.tolist() == known
    assert 1000 not in known
    scores = cosines(features, features)
    for i, k in enumerate(known):
        own = labels == k
        positive = scores[own][:, own][~np.eye(own.sum(), dtype=bool)]
        negative = scores[own][:, ~own].ravel()
        assert spread.lowest_positive[i] == pytest.approx(positive.min(), abs=1e-6)
        assert spread.highest_negative[i] == pytest.approx(negative.max(), abs=1e-6)
        both, same = np.append(positive, negative), np.arange(len(positive) + len(negative))
        same = same < len(positive)
        accuracy = balanced_accuracy(both, same, spread.thresholds[i])
        assert accuracy == pytest.approx(spread.accuracies[i], abs=1e-9)
        best = balanced_accuracy(both, same, best_of_list(both, same))
        assert accuracy == pytest.approx(best, abs=0.02)  # bins are 2 / 1024 wide
    wanted = (spread.highest_negative < 0.5) & (spread.lowest_positive >= 0.5)
    assert spread.separated_by(0.5) == wanted.mean()


def test_figures_of_a_spread() -> None:
    spread = thresholds.Spread(
        identities=np.array([3, 5, 9]),
        thresholds=np.array([0.4, 0.2, 0.6]),
        accuracies=np.array([1.0, 1.0, 0.7]),
        lowest_positive=np.array([0.5, 0.3, 0.5]),
        highest_negative=np.array([0.3, 0.1, 0.8]),
    )
    unified = thresholds.Unified(100, 10, 0.4, 0.9, 0.3, 0.8)
    figures = spread.to_dict(unified)
    assert figures["identities"] == 3
    assert (figures["smallest_threshold"], figures["largest_threshold"]) == (0.2, 0.6)
    assert figures["mean_threshold"] == pytest.approx(0.4)
    assert figures["std_of_thresholds"] == pytest.approx(np.sqrt(0.08 / 3))
    assert figures["separated_by_best"] == pytest.approx(1 / 3)
    # Accepted at the threshold itself, whether positive or negative.
    assert figures["separated_by_learned"] == pytest.approx(1 / 3)
    axes = plots.identity_thresholds(spread, 0.3, 0.4).axes[0]
    dots = np.asarray(axes.collections[-1].get_offsets())
    assert dots[:, 1].tolist() == [0.2, 0.4, 0.6]
    lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert lines == {"best for all: 0.400": 0.4, "learned b/s: 0.300": 0.3}


def test_command_prints_a_row_per_set_and_writes_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_faces(tmp_path / "a" / "faces", identities=3, images=4)
    second = write_faces(tmp_path / "b" / "faces", identities=4, images=3, seed=1)
    trainer = train(tiny(first, tmp_path / "run", train={"epochs": 1}))
    out = tmp_path / "out"
    given = ["thresholds", str(tmp_path / "run"), "--workers", "0", "--out", str(out), "--data"]
    assert evaluate.run([*given, str(first), str(second)]) == 0
    names = {p.name for p in out.iterdir()}
    stems = ("faces", "faces-2")
    assert names == {"thresholds.json", *(f"{n}{s}" for n in stems for s in (".png", ".csv"))}
    reports = json.loads((out / "thresholds.json").read_text())
    learned = trainer.threshold()
    for name, pairs in (("faces", 66), ("faces-2", 66)):
        unified = reports[name]["unified"]
        assert (unified["pairs"], unified["learned"]) == (pairs, learned)
        assert unified["gap"] == pytest.approx(learned - unified["best"])
    assert reports["faces-2"]["identification"]["probes"] == 8
    with open(out / "faces.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["identity"] for row in rows] == ["person1", "person2", "person3"]
    text = capsys.readouterr().out
    cells = [c.strip() for c in text.splitlines()[2].split("|")[1:-1]]
    assert cells[:2] == ["faces", "66"]
    assert cells[4] == f"{learned:.3f}"


class Pairs(BinSet):
    """A verification set with metrics that differ clearly from others."""

    def score(
        self, features: np.ndarray, *, threshold: float | None = None, device: object = "cpu"
    ) -> dict[str, float]:
        figures = {"accuracy": 0.75, "best_threshold": 0.25, "pairs": len(features) // 2}
        return figures if threshold is None else {**figures, "accuracy_at_threshold": 0.625}


def test_verification_sets_are_evaluated_at_the_unified_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    trainer = train(tiny(data, tmp_path / "run", train={"epochs": 1}))
    asked = []

    def opened(path: str, config: Config) -> Pairs:
        asked.append((path, config.data.on_error))
        source = open_images(scan(str(data)), 16, on_error="fail")
        return Pairs("pairs", source, np.arange(len(source.images) // 2) % 2 == 0)

    monkeypatch.setattr(commands, "open_bin_set", opened)
    out = tmp_path / "out"
    given = ["thresholds", str(tmp_path / "run"), "--on-error", "skip", "--out", str(out)]
    assert evaluate.run([*given, "--data", "x/lfw.bin"]) == 0
    assert asked == [("x/lfw.bin", "skip")]
    learned = trainer.threshold()
    report = json.loads((out / "thresholds.json").read_text())["lfw.bin"]
    assert report["unified"] == {
        "pairs": 6,
        "best": 0.25,
        "accuracy": 0.75,
        "learned": learned,
        "accuracy_at_learned": 0.625,
        "gap": learned - 0.25,
    }
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[2].split("|")[1:-1]]
    assert cells[:4] == ["lfw.bin", "6", "0.250", "0.750"]
    assert cells[5:] == ["0.625", f"{learned - 0.25:+.3f}", "-", "-", "-", "-"]


def test_a_model_without_a_threshold_gets_dashes() -> None:
    unified = thresholds.Unified(10, 4, 0.4, 0.9, None, None)
    spread = {"mean_threshold": 0.4, "std_of_thresholds": 0.1}
    report = {"unified": unified.to_dict(), "per_identity": spread, "identification": None}
    cells = [c.strip() for c in table({"x": report}).splitlines()[2].split("|")[1:-1]]
    assert cells == ["x", "10", "0.400", "0.900", "-", "-", "-", "0.400 ± 0.100", "-", "-", "-"]
    assert unique_names(["orl", "a/orl", "b/x/", "c/orl"]) == ["orl", "orl-2", "x", "orl-3"]
