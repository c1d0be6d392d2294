"""What a recogniser got wrong: which words and letters, and how its worst utterances align."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jiwer

from w2v2.evaluate.scores import worst_utterances
from w2v2.report.grids import draw_bars
from w2v2.report.playback import embed_audio
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import Section, Table, Utterance, keep, percent

MOST_CONFUSED, MOST_WORST = 12, 10
EDITS = ("substitutions", "deletions", "insertions")  # as results.json names them
SPACE = "␣"
FEW_WORDS = 1.5  # in a reference, on average: a script without spaces
EQUAL, SUBSTITUTE, DELETE, INSERT = "equal", "substitute", "delete", "insert"  # jiwer's names


class Pair(NamedTuple):
    """Words (or letters) that stand beside each other; one is empty where something was left out or put in."""

    kind: str
    reference: str
    hypothesis: str


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


def tell_errors(sets: Mapping[str, Mapping[str, Any]]) -> Section:
    """Errors by type and by set."""
    section = Section("Errors by type")
    edits = {name: scores["edits"] for name, scores in sets.items() if "edits" in scores}
    if not edits:
        section.notes.append("No set with references was scored.")
        return section
    rows = [(name, *(counts.get(key) for key in ("words", "hits", *EDITS))) for name, counts in edits.items()]
    section.tables.append(Table("Counts, greedy decoding", ["Set", "Words", "Right", *map(str.title, EDITS)], rows))
    for name, counts in edits.items():
        shares = {key: counts.get(key, 0) / (counts.get("words") or 1) for key in EDITS}
        items = [(key, share, percent(share)) for key, share in shares.items()]
        section.charts += keep(draw_bars(name, items, "per word of the reference"))
    return section


def tell_commonest(run: RunFiles) -> Section:
    """The commonest errors of words and letters, over all sets."""
    section = Section("Commonest errors")
    lines, key = scored_lines(run.predictions)
    if not lines:
        section.notes.append("There are no predictions with references (predictions.jsonl).")
        return section
    texts = [line["reference"] for line in lines], [line[key] for line in lines]
    subtitle = "over all sets" + (", with LM" if key.startswith("lm_") else "")
    units = {"letters": True} if lacks_spaces(lines) else {"words": False, "letters": True}
    if "per" in lines[0]:
        units = {"tokens": False}
    for unit, by_letters in units.items():
        found = count_confusions(align(*texts, by_letters))
        for title, counts in {"Substituted": found.pairs, "Deleted": found.left_out, "Inserted": found.put_in}.items():
            items = [(name, count, f"{count:,}") for name, count in counts.most_common(MOST_CONFUSED)]
            section.charts += keep(draw_bars(f"{title} {unit}", items, subtitle))
    if not section.charts:
        section.notes.append("Every transcript is right.")
    return section


def tell_worst(run: RunFiles, num_audio: int) -> Section:
    """The worst utterances, aligned."""
    section = Section("Worst utterances")
    lines, key = scored_lines(run.predictions)
    section.utterances = find_worst(lines, key, max(MOST_WORST, num_audio))
    if not section.utterances:
        section.notes.append("There are none.")
    elif num_audio:
        section.notes += embed_audio(run, section.utterances[:num_audio])
    else:
        section.notes.append("Their audio is put into the page by report.py --embed_audio 10.")
    return section
