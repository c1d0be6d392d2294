"""Scores of classifiers (accuracy, unweighted average recall, macro-F1) and verifiers (equal error rate, cost).

Unweighted average recall (UAR, the measure of emotion recognition) is the mean over the true classes of the share
recognised, so that a rare class counts as much as a common one; chance is 1 / classes. The equal error rate is where
the line through the points of the ROC (misses and false alarms at every threshold) crosses misses = false alarms.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

MEASURES = ("accuracy", "uar", "macro_f1")


def classification_scores(references: Sequence, predictions: Sequence) -> dict[str, float]:
    """`accuracy`, `uar` and `macro_f1` as fractions; the last over classes among references or predictions."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are no class of the references, which is no fault
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "uar": float(balanced_accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0)),
        }


def describe_scores(scores: Mapping[str, float]) -> str:
    return f"accuracy {scores['accuracy']:.1%}, UAR {scores['uar']:.1%}, macro-F1 {scores['macro_f1']:.1%}"


def confusion_counts(references: Sequence[str], predictions: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Utterances by true label (row) and predicted label (column), in the order of `labels`."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(references, predictions, labels=list(labels)).tolist()


def mean_and_deviation(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`{"mean": {…}, "std": {…}}` of the measures over folds; the sample's deviation (n - 1), 0 for one fold."""
    table = {name: np.array([score[name] for score in scores]) for name in scores[0] if name in MEASURES}
    return {
        "mean": {name: float(values.mean()) for name, values in table.items()},
        "std": {name: float(values.std(ddof=1)) if len(values) > 1 else 0.0 for name, values in table.items()},
    }


def error_curve(targets: Sequence[int], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of missed targets and of false alarms at every threshold, highest first; 1 marks a target trial."""
    from sklearn.metrics import roc_curve

    assert len(set(map(int, targets))) == 2, "the trials have to hold targets and non-targets"
    false_alarms, hits, _ = roc_curve(targets, scores, drop_intermediate=False)
    return 1.0 - hits, false_alarms


def equal_error_rate(targets: Sequence[int], scores: Sequence[float]) -> float:
    """Where the line through the points of `error_curve` has as many misses as false alarms; a fraction."""
    misses, false_alarms = error_curve(targets, scores)
    # The first threshold with no more misses than false alarms, and how far before it the two are equal.
    gap = misses - false_alarms  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    part = gap[after - 1] / (gap[after - 1] - gap[after])
    return float(misses[after - 1] + part * (misses[after] - misses[after - 1]))


def min_detection_cost(targets: Sequence[int], scores: Sequence[float], p_target: float = 0.01) -> float:
    """NIST's minimum detection cost at costs of 1, over the better constant answer's: 1 is no better than that."""
    misses, false_alarms = error_curve(targets, scores)
    return float((p_target * misses + (1 - p_target) * false_alarms).min() / min(p_target, 1 - p_target))
