"""What a recogniser got wrong: which words and letters, and how its worst utterances align."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jiwer

from w2v2.evaluate.scores import worst_utterances

MOST_CONFUSED = 12
SPACE = "␣"
FEW_WORDS = 1.5  # in a reference, on average: a script without spaces
EQUAL, SUBSTITUTE, DELETE, INSERT = "equal", "substitute", "delete", "insert"  # jiwer's names


class Pair(NamedTuple):
    """Words (or letters) that stand beside each other; one is empty where something was left out or put in."""

    kind: str
    reference: str
    hypothesis: str


@dataclass
class Utterance:
    """An utterance with errors, aligned or only labelled; `audio` is a data URI."""

    set: str
    id: str
    score: str
    pairs: Sequence[Pair] = ()
    audio: str | None = None


@dataclass
class Confusions:
    """How often which unit was written for which (as `ours → theirs`), which was left out, and which was put in."""

    pairs: Counter
    left_out: Counter
    put_in: Counter


def scored_lines(predictions: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The predictions with a reference, and the key of their hypothesis: a language model's, where there is one."""
    lines = [dict(line) for line in predictions if line.get("reference") and line.get("hypothesis") is not None]
    return lines, "lm_hypothesis" if lines and "lm_hypothesis" in lines[0] else "hypothesis"


def lacks_spaces(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the references are of a script without spaces, so that letters say more than words."""
    return sum(len(line["reference"].split()) for line in lines) <= FEW_WORDS * len(lines)


def align(references: Sequence[str], hypotheses: Sequence[str], by_letters: bool = False) -> list[list[Pair]]:
    """The fewest edits from each reference to its hypothesis, unit by unit."""
    process = jiwer.process_characters if by_letters else jiwer.process_words
    found = process(list(references), list(hypotheses))
    return [list(_pair_units(*one)) for one in zip(found.alignments, found.references, found.hypotheses, strict=True)]


def _pair_units(chunks: Sequence, reference: Sequence[str], hypothesis: Sequence[str]) -> Iterator[Pair]:
    for chunk in chunks:
        ours = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        theirs = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for n in range(max(len(ours), len(theirs))):
            yield Pair(chunk.type, ours[n] if n < len(ours) else "", theirs[n] if n < len(theirs) else "")


def count_confusions(alignments: Sequence[Sequence[Pair]]) -> Confusions:
    counted = {SUBSTITUTE: Counter(), DELETE: Counter(), INSERT: Counter()}
    for kind, reference, hypothesis in (pair for pairs in alignments for pair in pairs):
        if kind != EQUAL:
            ours, theirs = (unit.replace(" ", SPACE) for unit in (reference, hypothesis))
            counted[kind][f"{ours} → {theirs}" if kind == SUBSTITUTE else ours or theirs] += 1
    return Confusions(counted[SUBSTITUTE], counted[DELETE], counted[INSERT])


def find_worst(lines: Sequence[dict[str, Any]], key: str, most: int) -> list[Utterance]:
    """The utterances of the highest error rates, aligned."""
    prefix = key.removesuffix("hypothesis")
    rate = next((name for name in (f"{prefix}wer", f"{prefix}per") if lines and name in lines[0]), None)
    worst = worst_utterances(lines, rate, most) if rate else []
    if not worst:
        return []
    pairs = align(*([line[name] for line in worst] for name in ("reference", key)), lacks_spaces(lines))
    name = rate.removeprefix(prefix).upper()
    return [
        Utterance(str(line.get("set", "")), str(line["id"]), f"{name} {line[rate]:.0%}", aligned)
        for line, aligned in zip(worst, pairs, strict=True)
    ]
