"""Verification figures against values worked out by hand, and against sklearn's definitions."""

from __future__ import annotations

import numpy as np
import pytest
from support import training  # noqa: F401

from train.evaluation import verification
from train.evaluation.baselines import gray_vectors, pca, raw_pixels
from train.evaluation.rates import tar_at_fars
from train.evaluation.verification import (
    all_pairs,
    balanced_accuracy,
    best_threshold,
    count_pairs,
    evaluate_features,
    evaluate_pairs,
    kfold_accuracy,
)


def tar_at_far(scores: np.ndarray, same: np.ndarray, far: float) -> float:
    (rate,) = tar_at_fars(scores, same, (far,)).values()
    return rate


# Four positive and six negative pairs; one positive (0.3) lies among the negatives.
SCORES = np.array([0.9, 0.8, 0.7, 0.3, 0.6, 0.4, 0.2, 0.1, 0.0, -0.5])
SAME = np.array([True] * 4 + [False] * 6)


def test_all_pairs_gives_each_unordered_pair_once() -> None:
    features = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    scores, same = all_pairs(features, np.array([0, 1, 0]))
    assert scores == pytest.approx([0.0, np.sqrt(0.5), np.sqrt(0.5)])
    assert same.tolist() == [False, True, False]


def test_all_pairs_of_a_zero_feature_is_finite() -> None:
    scores, _ = all_pairs(np.zeros((2, 3)), np.array([0, 0]))
    assert scores.tolist() == [0.0]


def test_balanced_accuracy_weighs_both_kinds_equally() -> None:
    assert balanced_accuracy(SCORES, SAME, 0.65) == pytest.approx((3 / 4 + 1) / 2)
    assert balanced_accuracy(SCORES, SAME, 0.25) == pytest.approx((1 + 4 / 6) / 2)
    assert balanced_accuracy(SCORES, SAME, 2.0) == 0.5  # says "different" to everything
    assert balanced_accuracy(SCORES, SAME, -2.0) == 0.5
    assert balanced_accuracy(SCORES, SAME, 0.9) == pytest.approx((1 / 4 + 1) / 2)  # >= accepts


def test_best_threshold_lies_midway_between_the_scores_it_separates() -> None:
    assert best_threshold(SCORES, SAME) == pytest.approx(0.65)
    assert best_threshold(-SCORES, ~SAME) == pytest.approx(-0.65)


def test_best_threshold_of_inverted_scores_is_still_a_number() -> None:
    threshold = best_threshold(-SCORES, SAME)
    assert np.isfinite(threshold)
    assert balanced_accuracy(-SCORES, SAME, threshold) >= 0.5


def test_tar_at_far_by_hand() -> None:
    assert tar_at_far(SCORES, SAME, 0.0) == 0.75  # above 0.6, the highest negative
    assert tar_at_far(SCORES, SAME, 0.1) == 0.75  # one negative of six is already 0.167
    assert tar_at_far(SCORES, SAME, 2 / 6) == 1.0
    assert tar_at_far(-SCORES, SAME, 0.0) == 0.0


def test_tar_at_far_matches_the_definition_on_random_scores() -> None:
    rng = np.random.default_rng(0)
    same = rng.random(500) < 0.2
    scores = np.round(rng.normal(same.astype(float), 1.0), 1)  # many ties
    for far in (0.01, 0.1, 0.5):
        candidates = [np.inf, *np.unique(scores)]
        allowed = [t for t in candidates if (scores[~same] >= t).mean() <= far]
        expected = max((scores[same] >= t).mean() for t in allowed)
        assert tar_at_far(scores, same, far) == pytest.approx(expected)


def test_auc_counts_ordered_pairs_of_pairs() -> None:
    # 0.3 is below two of the six negatives: 22 of 24 comparisons are right.
    assert evaluate_pairs(SCORES, SAME).auc == pytest.approx(22 / 24)


def test_kfold_of_separable_scores_is_perfect_and_of_noise_is_chance() -> None:
    rng = np.random.default_rng(1)
    same = np.arange(4000) % 9 == 0
    assert kfold_accuracy(same + 0.1 * rng.random(4000), same) == (1.0, 0.0)
    mean, std = kfold_accuracy(rng.random(4000), same)
    assert abs(mean - 0.5) < 0.05
    assert std > 0


def test_kfold_evaluates_each_fold_at_the_other_folds_threshold() -> None:
    # No threshold separates all four, and with one positive and one negative per fold the
    # threshold of either fold misclassifies pairs of the other.
    scores = np.array([1.0, 11.0, 0.0, 10.0])
    same = np.array([True, True, False, False])
    mean, _ = kfold_accuracy(scores, same, folds=2)
    assert mean < 1.0
    assert balanced_accuracy(scores, same, best_threshold(scores, same)) == 0.75


def test_evaluation_reports_the_learned_threshold_only_where_there_is_one() -> None:
    without = evaluate_pairs(SCORES, SAME)
    assert without.threshold is None
    assert without.accuracy_at_threshold is None
    assert "b/s" not in str(without)
    given = evaluate_pairs(SCORES, SAME, threshold=0.25)
    assert given.accuracy_at_threshold == pytest.approx((1 + 4 / 6) / 2)
    assert (given.pairs, given.positives) == (10, 4)
    assert given.to_dict()["tar_at_far"] == {"0.01": 0.75, "0.1": 0.75}


def people(count: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of identities that are separated most of the time."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(count), images)
    centers = rng.normal(size=(count, 8))
    features = centers[labels] + 0.7 * rng.normal(size=(len(labels), 8))
    return features.astype(np.float32), labels


def test_pairs_are_counted_without_listing_them() -> None:
    assert count_pairs(np.array([4, 7, 4, 4, 9])) == (10, 3)
    assert count_pairs(np.array([1, 2])) == (1, 0)
    _, labels = people(6, 5)
    same = all_pairs(np.ones((30, 2)), labels)[1]
    assert count_pairs(labels) == (len(same), same.sum())


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_many_pairs_have_the_figures_that_their_list_would_give(
    threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = people(20, 7)
    listed = evaluate_features(features, labels, threshold=threshold)
    scores, same = all_pairs(features, labels)
    assert listed == evaluate_pairs(scores, same, threshold=threshold)
    monkeypatch.setattr(verification, "LISTED_PAIRS", listed.pairs - 1)
    monkeypatch.setattr(verification, "all_pairs", None)  # must do without
    passed = evaluate_features(features, labels, threshold=threshold)
    assert (passed.pairs, passed.positives) == (listed.pairs, listed.positives)
    assert passed.tar_at_far == pytest.approx(listed.tar_at_far, rel=1e-12)
    assert passed.auc == pytest.approx(listed.auc, abs=1e-5)
    assert passed.threshold == threshold
    assert passed.accuracy_at_threshold == pytest.approx(listed.accuracy_at_threshold)
    assert passed.best_threshold == pytest.approx(listed.best_threshold, abs=1e-6)
    # The threshold is fitted to the pairs that it is evaluated on.
    best = balanced_accuracy(scores, same, listed.best_threshold)
    assert passed.accuracy == pytest.approx(best, rel=1e-12)
    assert passed.accuracy_std is None


def test_baselines_use_the_training_images_only_to_fit() -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    gray = gray_vectors(pixels)
    assert gray.shape == (12, 16)
    assert gray[0, 0] == pytest.approx(pixels[0, :, 0, 0].astype(float).mean())
    train, test = gray[:8], gray[8:]
    assert raw_pixels(train, test) == pytest.approx(test - train.mean(0))
    coordinates = pca(train, test)
    assert coordinates.shape == (4, 8)
    # Components are orthonormal: a projection of the mean-free images, never longer than them.
    lengths = np.linalg.norm(test - train.mean(0), axis=1)
    assert (np.linalg.norm(coordinates, axis=1) <= lengths + 1e-9).all()
    assert pca(train, test[:1]) == pytest.approx(coordinates[:1])
