"""Scores against brute force over every threshold and against closed forms."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from w2v2.evaluate.scores import (
    classification_scores,
    confusion_counts,
    equal_error_rate,
    mean_and_deviation,
    min_detection_cost,
)


def operating_points(targets, scores):
    """(misses, false alarms) of `score >= threshold` at every threshold, as exact fractions, by counting."""
    positives = [s for t, s in zip(targets, scores, strict=True) if t]
    negatives = [s for t, s in zip(targets, scores, strict=True) if not t]
    points = []
    for threshold in [max(scores) + 1, *sorted(set(scores), reverse=True)]:
        misses = Fraction(sum(s < threshold for s in positives), len(positives))
        points.append((misses, Fraction(sum(s >= threshold for s in negatives), len(negatives))))
    return points


def brute_force_eer(targets, scores):
    """Rate at which a coin between two neighbouring thresholds makes misses and false alarms equal; exact."""
    points = operating_points(targets, scores)
    for (m0, f0), (m1, f1) in zip(points, points[1:], strict=False):
        if m0 >= f0 and m1 <= f1:
            coin = (m0 - f0) / ((m0 - f0) - (m1 - f1))
            return m0 + coin * (m1 - m0)
    raise AssertionError


@pytest.mark.parametrize("seed", range(30))
def test_eer_and_detection_cost_equal_brute_force_with_ties(seed):
    random = np.random.default_rng(seed)
    targets = [1, 0, *random.integers(0, 2, random.integers(1, 40))]
    scores = (random.integers(0, random.choice([3, 8, 1000]), len(targets)) + 2 * np.array(targets)).tolist()
    assert equal_error_rate(targets, scores) == pytest.approx(float(brute_force_eer(targets, scores)), abs=1e-12)
    for p in (0.01, 0.5, 0.8):
        costs = [p * float(m) + (1 - p) * float(f) for m, f in operating_points(targets, scores)]
        assert min_detection_cost(targets, scores, p) == pytest.approx(min(costs) / min(p, 1 - p))


@pytest.mark.parametrize(("scores", "expected"), [([3, 2, 1, 0], 0.0), ([0, 1, 2, 3], 1.0), ([5, 5, 5, 5], 0.5)])
def test_eer_at_the_ends_and_of_no_information(scores, expected):
    assert equal_error_rate([1, 1, 0, 0], scores) == pytest.approx(expected)


def test_classification_scores_are_their_definitions():
    random = np.random.default_rng(2)
    for classes in (2, 3, 7):
        references = random.integers(0, classes, 60)
        predictions = np.where(random.random(60) < 0.6, references, random.integers(0, classes, 60))
        scores = classification_scores(references, predictions)
        recalls, f1 = [], []
        for label in set(references) | set(predictions):
            hit = sum(r == p == label for r, p in zip(references, predictions, strict=True))
            true, guessed = sum(references == label), sum(predictions == label)
            recalls += [hit / true] if true else []
            f1.append(2 * hit / (true + guessed))
        assert scores["accuracy"] == pytest.approx(np.mean(references == predictions))
        assert scores["uar"] == pytest.approx(np.mean(recalls))
        assert scores["macro_f1"] == pytest.approx(np.mean(f1))


def test_confusions_are_counted_by_row_and_column():
    labels = ["x", "y", "z"]
    pairs = list(product(labels, labels)) + [("x", "z")]
    counts = confusion_counts([t for t, _ in pairs], [p for _, p in pairs], labels)
    assert counts == [[1, 1, 2], [1, 1, 1], [1, 1, 1]]


def test_spread_over_folds_is_the_sample_deviation():
    folds = [{"accuracy": value, "uar": value / 2, "macro_f1": 0.5, "loss": 9.0} for value in (0.2, 0.4, 0.9)]
    spread = mean_and_deviation(folds)
    assert spread["mean"] == pytest.approx({"accuracy": 0.5, "uar": 0.25, "macro_f1": 0.5})
    assert spread["std"]["accuracy"] == pytest.approx((((0.3**2) + (0.1**2) + (0.4**2)) / 2) ** 0.5)
    assert mean_and_deviation(folds[:1])["std"]["uar"] == 0.0
