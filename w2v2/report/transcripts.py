"""What a recogniser got wrong: which words and letters, and how its worst utterances align."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jiwer

from w2v2.evaluate.scores import worst_utterances
from w2v2.finetune.normalisation import lacks_spaces
from w2v2.report.grids import draw_bars
from w2v2.report.playback import embed_audio
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import Section, Table, Utterance, percent

MOST_CONFUSED, MOST_WORST = 12, 10
EDITS = ("substitutions", "deletions", "insertions")  # as results.json names them
KINDS = {"substitute": "Substituted", "delete": "Deleted", "insert": "Inserted"}  # jiwer's names; a fourth is `equal`


class Pair(NamedTuple):
    """Words (or letters) that stand beside each other; one is empty where something was left out or put in."""

    kind: str
    reference: str
    hypothesis: str


def scored_lines(predictions: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The predictions with a reference, and the key of their hypothesis: a language model's, where there is one."""
    lines = [dict(line) for line in predictions if line.get("reference") and line.get("hypothesis") is not None]
    return lines, "lm_hypothesis" if lines and "lm_hypothesis" in lines[0] else "hypothesis"


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


def count_confusions(alignments: Sequence[Sequence[Pair]]) -> dict[str, Counter]:
    """How often which unit was written for which (`ours → theirs`), left out, or put in, by kind of error."""
    counted = {kind: Counter() for kind in KINDS}
    for kind, *units in (pair for pairs in alignments for pair in pairs if pair.kind in KINDS):
        counted[kind][" → ".join(unit.replace(" ", "␣") for unit in units if unit)] += 1
    return counted


def tell_errors(sets: Mapping[str, Mapping[str, Any]]) -> Section:
    """Errors by type and by set."""
    edits = {name: scores["edits"] for name, scores in sets.items() if "edits" in scores}
    if not edits:
        return Section("Errors by type", notes=["No set with references was scored."])
    rows = [(name, *(counts.get(key) for key in ("words", "hits", *EDITS))) for name, counts in edits.items()]
    table = Table("Counts, greedy decoding", ["Set", "Words", "Right", *map(str.title, EDITS)], rows)
    charts = []
    for name, counts in edits.items():
        shares = {key: counts.get(key, 0) / (counts.get("words") or 1) for key in EDITS}
        items = [(key, share, percent(share)) for key, share in shares.items()]
        charts.append(draw_bars(name, items, "per word of the reference"))
    return Section("Errors by type", charts, [table])


def tell_commonest(run: RunFiles) -> Section:
    """The commonest errors of words and letters, over all sets."""
    lines, key = scored_lines(run.predictions)
    if not lines:
        return Section("Commonest errors", notes=["There are no predictions with references (predictions.jsonl)."])
    texts = [line["reference"] for line in lines], [line[key] for line in lines]
    subtitle, charts = "over all sets" + (", with LM" if key.startswith("lm_") else ""), []
    units = {"letters": True} if lacks_spaces(texts[0]) else {"words": False, "letters": True}
    for unit, by_letters in ({"tokens": False} if "per" in lines[0] else units).items():
        for kind, counts in count_confusions(align(*texts, by_letters)).items():
            items = [(name, count, f"{count:,}") for name, count in counts.most_common(MOST_CONFUSED)]
            charts.append(draw_bars(f"{KINDS[kind]} {unit}", items, subtitle))
    return Section("Commonest errors", charts, notes=[] if any(charts) else ["Every transcript is right."])


def tell_worst(run: RunFiles, num_audio: int) -> Section:
    """The utterances of the highest error rates, aligned."""
    section, (lines, key) = Section("Worst utterances"), scored_lines(run.predictions)
    prefix = key.removesuffix("hypothesis")
    rate = next((name for name in (f"{prefix}wer", f"{prefix}per") if lines and name in lines[0]), None)
    worst = worst_utterances(lines, rate, max(MOST_WORST, num_audio)) if rate else []
    if not worst:
        section.notes.append("There are none.")
        return section
    by_letters = lacks_spaces(line["reference"] for line in lines)
    aligned = align(*([line[name] for line in worst] for name in ("reference", key)), by_letters)
    for line, pairs in zip(worst, aligned, strict=True):
        score = f"{rate.removeprefix(prefix).upper()} {line[rate]:.0%}"
        section.utterances.append(Utterance(str(line.get("set", "")), str(line["id"]), score, pairs))
    hint = "Their audio is put into the page by report.py --embed_audio 10."
    section.notes += embed_audio(run, section.utterances[:num_audio]) if num_audio else [hint]
    return section
