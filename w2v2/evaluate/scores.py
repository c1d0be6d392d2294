"""Figures of transcripts (WER, CER, PER), of classes (accuracy, UAR, macro-F1) and of speakers' trials (EER, cost).

An error rate is (substitutions + deletions + insertions) / units of the references over the whole corpus: a fraction
that can exceed 1. Spaces count as characters; an empty reference adds its hypothesis as insertions.
Unweighted average recall (UAR) is the mean over the true classes of the share recognised; chance is 1 / classes.
A list of trials has a pair a line, `1 a.wav b.wav` for one speaker and `0 a.wav b.wav` for two, as VoxCeleb1's.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np

from w2v2.errors import UserError, one_line

CHARACTERS, TOKENS = TARGET_UNITS = ("characters", "tokens")
RATES = {CHARACTERS: ("wer", "cer"), TOKENS: ("per",)}  # the first says which checkpoint is best
NAMES = {"wer": "WER", "cer": "CER", "per": "PER"}
MEASURES = ("accuracy", "uar", "macro_f1")
SHOWN = NAMES | {"uar": "UAR", "accuracy": "accuracy", "macro_f1": "macro-F1"}  # measures, as they are written


# -- transcripts


def error_rates(references: Sequence[str], hypotheses: Sequence[str], unit: str = CHARACTERS) -> dict[str, float]:
    """`{"wer": …, "cer": …}`, or `{"per": …}` for tokens, over the corpus. Raises ValueError without references."""
    references, hypotheses = list(references), list(hypotheses)
    if not any(reference.strip() for reference in references):
        raise ValueError("all references are empty: there is no error rate")
    return {name: (jiwer.cer if name == "cer" else jiwer.wer)(references, hypotheses) for name in RATES[unit]}


def count_edits(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, int]:
    """Words of the references, and how many of them were hit, substituted, deleted, and how many inserted."""
    found = jiwer.process_words(list(references), list(hypotheses))
    counts = {name: getattr(found, name) for name in ("hits", "substitutions", "deletions", "insertions")}
    return {"words": sum(counts.values()) - counts["insertions"]} | counts


def worst_utterances(lines: Sequence[dict[str, Any]], rate: str, most: int = 10) -> list[dict[str, Any]]:
    """The `most` predictions with errors of the highest `rate`; among equals the longest reference comes first."""
    wrong = [line for line in lines if line.get(rate)]
    return sorted(wrong, key=lambda line: (-line[rate], -len(line["reference"]), line["id"]))[:most]


# -- classes


def classification_scores(references: Sequence, predictions: Sequence) -> dict[str, float]:
    """The `MEASURES` as fractions; macro-F1 over the classes among references or predictions."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are no class of the references, which is no fault
        uar = balanced_accuracy_score(references, predictions)
    macro_f1 = f1_score(references, predictions, average="macro", zero_division=0.0)
    return {"accuracy": float(accuracy_score(references, predictions)), "uar": float(uar), "macro_f1": float(macro_f1)}


def describe_scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{SHOWN[name]} {scores[name]:.1%}" for name in MEASURES)


def mean_and_deviation(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`{"mean": {…}, "std": {…}}` of the measures over folds; the sample's deviation (n - 1), 0 for one fold."""
    table = {name: np.array([score[name] for score in scores]) for name in scores[0] if name in MEASURES}
    deviation = {name: float(values.std(ddof=1)) if len(values) > 1 else 0.0 for name, values in table.items()}
    return {"mean": {name: float(values.mean()) for name, values in table.items()}, "std": deviation}


# -- speaker verification


class Trial(NamedTuple):
    target: int  # 1: the same speaker
    first: str
    second: str


def read_trials(path: str | os.PathLike) -> list[Trial]:
    """The trials as written. Raises UserError for anything else, naming the line, and for a list of one kind."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--trials {path}: cannot be read ({one_line(error)}): give `1 a.wav b.wav` lines") from None
    trials = []
    for number, line in enumerate(lines, start=1):
        if not (fields := line.split("\t" if "\t" in line else None)):
            continue
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise UserError(
                f"{path}, line {number}: {line[:80]!r} is not of the form `1 a.wav b.wav` or `0 a.wav b.wav`: mend it"
            )
        trials.append(Trial(int(fields[0]), fields[1], fields[2]))
    if len({trial.target for trial in trials}) < 2:
        raise UserError(
            f"--trials {path}: an equal error rate needs pairs of one speaker (1) and of two (0): add what is missing"
        )
    return trials


def draw_trials(speakers: Mapping[str, str], num_trials: int, seed: int = 0) -> list[Trial]:
    """Trials among utterances (name → speaker): half of one speaker, half of two, or all pairs where there are fewer.

    Utterances without a speaker are in none. Raises UserError where a kind is missing.
    """
    names = sorted((name for name, speaker in speakers.items() if speaker), key=lambda name: (speakers[name], name))
    at = np.arange(len(names))
    ends = np.searchsorted(found := [speakers[name] for name in names], found, side="right")  # of each speaker's rows
    random, trials = np.random.default_rng(seed), []
    for target, first, last in ((1, at + 1, ends), (0, ends, np.full_like(ends, len(names)))):
        pairs = np.cumsum(last - first)  # each utterance's partners are the rows from `first` to `last`
        if not len(names) or not pairs[-1]:
            kind = "one speaker" if target else "two speakers"
            raise UserError(f"--manifest: no pair of {kind} in it: give more speakers, with two utterances each")
        drawn = np.sort(random.choice(pairs[-1], min(pairs[-1], max(1, num_trials // 2)), replace=False))
        rows = np.searchsorted(pairs, drawn, side="right")
        partners = last[rows] - (pairs[rows] - drawn)
        trials += [Trial(target, names[i], names[j]) for i, j in zip(rows, partners, strict=True)]
    return trials


def write_trials(path: str | os.PathLike, trials: Sequence[Trial]) -> None:
    """As VoxCeleb's lists; between tabs where a name holds a space."""
    mark = "\t" if any(" " in name for trial in trials for name in trial[1:]) else " "
    lines = (mark.join(map(str, trial)) + "\n" for trial in trials)
    Path(path).write_text("".join(lines), encoding="utf-8")


def cosine_scores(trials: Sequence[Trial], embeddings: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine of the angle between the embeddings (D,) of each pair, shape (trials,)."""
    unit = {name: vector / max(np.linalg.norm(vector), 1e-12) for name, vector in embeddings.items()}
    return np.array([float(unit[trial.first] @ unit[trial.second]) for trial in trials])


def error_curve(targets: Sequence[int], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of missed targets and of false alarms at every threshold, highest first; 1 marks a target trial."""
    from sklearn.metrics import roc_curve

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
