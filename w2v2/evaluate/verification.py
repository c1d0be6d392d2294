"""Speaker verification: trial lists, and the cosine scores of their pairs.

A list has a pair a line, `1 a.wav b.wav` for the same speaker and `0 a.wav b.wav` for two (the format of VoxCeleb1).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from w2v2.errors import UserError, one_line

_MOST_PAIRS = 2_000_000  # that are listed, to draw from


@dataclass(frozen=True)
class Trial:
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
        if not (fields := line.split()):
            continue
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise UserError(f"{path}, line {number}: {line[:80]!r} is no `1 a.wav b.wav` or `0 a.wav b.wav`: mend it")
        trials.append(Trial(int(fields[0]), fields[1], fields[2]))
    if len({trial.target for trial in trials}) < 2:
        raise UserError(f"--trials {path}: an equal error rate needs pairs of one speaker (1) and of two (0)")
    return trials


def draw_trials(speakers: Mapping[str, str], num_trials: int, seed: int = 0) -> list[Trial]:
    """Trials among these utterances (name → speaker): half of one speaker, half of two, each pair at most once.

    Where there are fewer pairs of a kind than half of `num_trials`, all of them. Raises UserError where a kind is
    missing.
    """
    names = sorted(name for name, speaker in speakers.items() if speaker)
    if len(names) * (len(names) - 1) // 2 > _MOST_PAIRS:
        names = sorted(np.random.default_rng([seed, 0]).permutation(names)[: int((2 * _MOST_PAIRS) ** 0.5)].tolist())
    pairs: dict[int, list[tuple[str, str]]] = {1: [], 0: []}
    for first, second in combinations(names, 2):
        pairs[int(speakers[first] == speakers[second])].append((first, second))
    if not pairs[0] or not pairs[1]:
        kind = "two speakers" if pairs[1] else "one speaker"
        raise UserError(
            f"--manifest: its utterances make no pair of {kind}: give more speakers, with two utterances each"
        )
    random = np.random.default_rng([seed, 1])
    trials = []
    for target, found in pairs.items():
        chosen = random.permutation(len(found))[: max(1, num_trials // 2)]
        trials += [Trial(target, *found[i]) for i in sorted(chosen.tolist())]
    return trials


def write_trials(path: str | os.PathLike, trials: Sequence[Trial]) -> None:
    lines = (f"{trial.target} {trial.first} {trial.second}\n" for trial in trials)
    Path(path).write_text("".join(lines), encoding="utf-8")


def cosine_scores(trials: Sequence[Trial], embeddings: Mapping[str, np.ndarray]) -> np.ndarray:
    """Cosine of the angle between the embeddings (D,) of each pair, shape (trials,)."""
    unit = {name: vector / max(np.linalg.norm(vector), 1e-12) for name, vector in embeddings.items()}
    return np.array([float(unit[trial.first] @ unit[trial.second]) for trial in trials])
