"""Scores against a textbook edit distance, brute force over every threshold, and closed forms."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate

import jiwer
import numpy as np
import pytest

from w2v2.errors import UserError
from w2v2.evaluate.scores import (
    Trial,
    classification_scores,
    cosine_scores,
    count_edits,
    draw_trials,
    equal_error_rate,
    error_rates,
    mean_and_deviation,
    min_detection_cost,
    read_trials,
    worst_utterances,
    write_trials,
)


def edits(a, b):
    """Levenshtein distance, the textbook way."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = list(accumulate(
            range(1, len(b) + 1),
            lambda left, j, row=row, x=x: min(left + 1, row[j] + 1, row[j - 1] + (x != b[j - 1])),
            initial=i,
        ))  # fmt: skip
    return row[-1]


def test_error_rates_are_edit_distances_over_the_corpus():
    random = np.random.default_rng(1)
    references = [" ".join(random.choice(["A", "BB", "CAB"], 4)) for _ in range(30)]
    hypotheses = [" ".join(random.choice(["A", "BB", "CAB"], n)) for n in random.integers(0, 7, 30)]
    words = sum(edits(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True))
    characters = sum(edits(r, h) for r, h in zip(references, hypotheses, strict=True))
    rates = error_rates(references, hypotheses)
    assert rates["wer"] == pytest.approx(words / sum(len(r.split()) for r in references))
    assert rates["cer"] == pytest.approx(characters / sum(map(len, references)))
    assert error_rates(references, hypotheses, "tokens") == {"per": rates["wer"]}


def test_an_empty_reference_counts_insertions():
    assert error_rates(["A B", ""], ["A B", "C C"]) == {"wer": 1.0, "cer": 1.0}
    with pytest.raises(ValueError, match="all references are empty"):
        error_rates(["", " "], ["A", ""], "tokens")
    found = count_edits(["A B C", "D"], ["A X C Y", ""])
    assert found == {"words": 4, "hits": 2, "substitutions": 1, "deletions": 1, "insertions": 1}


def test_the_worst_utterances_come_first():
    texts = {"a": ("ONE TWO", "ONE"), "b": ("ONE", "ONE"), "c": ("ONE TWO SIX TEN", "ONE TWO"), "d": ("ONE", "TWO TWO")}
    lines = [{"id": i, "reference": r, "hypothesis": h, "wer": jiwer.wer(r, h)} for i, (r, h) in texts.items()]
    assert [line["id"] for line in worst_utterances(lines, "wer")] == ["d", "c", "a"]
    assert [line["id"] for line in worst_utterances(lines, "wer", 1)] == ["d"]


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


def test_eer_at_the_ends_and_of_no_information():
    for scores, expected in (([3, 2, 1, 0], 0.0), ([0, 1, 2, 3], 1.0), ([5, 5, 5, 5], 0.5)):
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


def test_spread_over_folds_is_the_sample_deviation():
    folds = [{"accuracy": value, "uar": value / 2, "macro_f1": 0.5, "loss": 9.0} for value in (0.2, 0.4, 0.9)]
    spread = mean_and_deviation(folds)
    assert spread["mean"] == pytest.approx({"accuracy": 0.5, "uar": 0.25, "macro_f1": 0.5})
    assert spread["std"]["accuracy"] == pytest.approx((((0.3**2) + (0.1**2) + (0.4**2)) / 2) ** 0.5)
    assert mean_and_deviation(folds[:1])["std"]["uar"] == 0.0


SPEAKERS = {f"{speaker}{take}": speaker for speaker in "abcd" for take in range(5)}


def test_a_list_is_read_as_it_was_written(tmp_path):
    trials = [Trial(1, "a/1.wav", "a/2.wav"), Trial(0, "a/1.wav", "b/1.wav")]
    write_trials(tmp_path / "trials.txt", trials)
    assert (tmp_path / "trials.txt").read_text() == "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n"
    assert read_trials(tmp_path / "trials.txt") == trials
    write_trials(tmp_path / "trials.txt", trials := [Trial(1, "my a.wav", "b.wav"), Trial(0, "my a.wav", "c.wav")])
    assert read_trials(tmp_path / "trials.txt") == trials


@pytest.mark.parametrize(("text", "message"), [("1 a b\n2 a c\n", "line 2"), ("1 a b\n\n0 a\n", "line 3"),
                                              ("1 a b\n", "needs pairs"), ("", "needs pairs")])  # fmt: skip
def test_what_is_no_list_of_trials_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "trials.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_trials(tmp_path / "trials.txt")
    with pytest.raises(UserError, match="absent.txt: cannot be read"):
        read_trials(tmp_path / "absent.txt")


def test_drawn_trials_are_true_and_never_twice():
    trials = draw_trials(SPEAKERS, 60, seed=1)
    assert sum(trial.target for trial in trials) == 30 and len(trials) == 60
    assert all(trial.target == (SPEAKERS[trial.first] == SPEAKERS[trial.second]) for trial in trials)
    assert len({frozenset((trial.first, trial.second)) for trial in trials}) == 60
    assert all(trial.first != trial.second for trial in trials)
    assert draw_trials(SPEAKERS, 60, seed=1) == trials != draw_trials(SPEAKERS, 60, seed=2)
    every = draw_trials(SPEAKERS, 10_000)  # all pairs that there are
    assert [sum(trial.target == kind for trial in every) for kind in (1, 0)] == [4 * 10, 6 * 25]
    assert len(set(every)) == len(every)


def test_pairs_of_one_speaker_are_drawn_evenly_from_many_utterances():
    speakers = {f"{take}{speaker}": f"s{speaker}" for speaker in range(5_000) for take in range(1 + speaker % 4)}
    trials = draw_trials(speakers, 8_000)
    assert [sum(trial.target == kind for trial in trials) for kind in (1, 0)] == [4_000, 4_000]
    assert all(trial.target == (speakers[trial.first] == speakers[trial.second]) for trial in trials)
    assert len({frozenset((trial.first, trial.second)) for trial in trials}) == 8_000
    by_size = Counter(int(speakers[trial.first][1:]) % 4 for trial in trials if trial.target)
    assert [by_size[n] / 4_000 for n in range(4)] == pytest.approx([0, 1 / 10, 3 / 10, 6 / 10], abs=0.03)


@pytest.mark.parametrize("speakers", [{"a": "x", "b": "y"}, {"a": "x", "b": "x"}, {"a": "", "b": ""}])
def test_utterances_without_both_kinds_of_pairs_are_refused(speakers):
    with pytest.raises(UserError, match="no pair of"):
        draw_trials(speakers, 10)


def test_scores_are_cosines():
    vectors = {"a": np.array([3.0, 0.0]), "b": np.array([5.0, 5.0]), "c": np.array([-1.0, 0.0])}
    scores = cosine_scores([Trial(1, "a", "b"), Trial(0, "a", "c")], vectors)
    np.testing.assert_allclose(scores, [2**-0.5, -1.0])
