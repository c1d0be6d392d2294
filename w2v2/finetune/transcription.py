"""What a recogniser writes of whole sets: scores and predictions with the times of words, and subtitles."""

import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import jiwer
from datasets import Dataset
from transformers import Wav2Vec2Config

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.audio.files import split_address
from w2v2.evaluate import scores
from w2v2.evaluate.scores import CHARACTERS, NAMES, RATES
from w2v2.finetune.arguments import PREDICTIONS_FILE, RESULTS_FILE
from w2v2.finetune.beam_search import BeamDecoder, tune_decoder
from w2v2.finetune.ctc import CTCTrainer
from w2v2.finetune.ctc_data import SpeechDataset, num_hours
from w2v2.finetune.evaluation import write_results
from w2v2.finetune.normalisation import NO_SPACES, describe_counts, describe_unit
from w2v2.finetune.text import SPECIAL, CTCArguments, align_words, count_units, frames_needed, split_units, unit_of
from w2v2.model.feature_encoder import num_frames

MOST_SHOWN = 300  # units of the vocabulary on the console
_LONGEST_CUE, _LONGEST_LINE, _LONGEST_PAUSE = 7.0, 80, 1.0  # seconds, characters, seconds


def find_unknown(table: Dataset, vocabulary: dict[str, int]) -> dict[str, int]:
    """Units that the vocabulary lacks, with their counts, commonest first."""
    counts = count_units(table["text"], unit_of(vocabulary))
    return {token: n for token, n in counts.most_common() if token not in vocabulary}


def count_short(table: Dataset, config: Wav2Vec2Config, unit: str) -> int:
    """Utterances that CTC cannot align: they have fewer latent frames than their text needs."""
    rows = zip(table["num_samples"], table["text"], strict=True)
    return sum(num_frames(config, n) < frames_needed(split_units(text, unit)) for n, text in rows)


def describe_units(sets: dict[str, SpeechDataset], trainer: CTCTrainer) -> None:
    """What the model can write, and a warning for each set with units that it cannot, or with too few frames."""
    unit, say, train = unit_of(trainer.vocabulary), trainer.args.print_once, trainer.train_dataset
    counts = count_units(train.table["text"] if train else [], unit)
    units = [token for token in trainer.vocabulary if token not in SPECIAL]
    listed = ", ".join(describe_unit(token) + (f" × {counts[token]}" if train else "") for token in units[:MOST_SHOWN])
    more = f" and {len(units) - MOST_SHOWN} more" if len(units) > MOST_SHOWN else ""
    say(f"  vocabulary: {len(trainer.vocabulary)}: {listed}{more}")
    for name, data in sets.items():
        if unknown := find_unknown(data.table, trainer.vocabulary):
            listed = describe_counts(unknown, most=10)
            say(f"     warning: {name} has {sum(unknown.values())} {unit} that the vocabulary lacks: {listed}")
        if num_short := count_short(data.table, trainer.model.config, unit):
            say(f"     warning: {name} has {num_short} utterances with fewer frames than their text needs")


def score(
    trainer: CTCTrainer, sets: dict[str, SpeechDataset], decoder: BeamDecoder | None, text_args: CTCArguments
) -> None:
    """Score each set with the model as it is now, and write and print the results; the beam search is tuned first."""
    trainer.decoder, unit = decoder, unit_of(trainer.vocabulary)
    tuned = tune_decoder(trainer, sets["validation"], text_args) if text_args.tune_lm else {}
    scored = {name: score_set(trainer, name, data) for name, data in sets.items()}
    if not trainer.is_world_process_zero():
        return

    results, say = {name: result for name, (result, _) in scored.items()}, trainer.args.print_once
    run = trainer.summary() | {"target_unit": unit, "vocabulary_size": len(trainer.vocabulary)}
    unknown = {name: result[f"unknown_{unit}"]["counts"] for name, result in results.items() if "edits" in result}
    run[f"unknown_{unit}"] = {name: counts for name, counts in unknown.items() if counts}
    if is_trained := trainer.train_dataset is not None:
        run["warnings"] = trainer.warnings
    if decoder is not None:
        lm = {"path": decoder.lm_path, "beam_size": decoder.beam_size, "words": len(decoder.words)}
        run["lm"] = lm | decoder.settings[0]._asdict() | tuned
    lines = [line for _, lines in scored.values() for line in lines]
    write_results(trainer.args.output_dir, results | {"run": run}, lines)
    if text_args.subtitles:
        folder = Path(trainer.args.output_dir, "subtitles")
        num_files = sum(write_subtitles(folder / name, text_args.subtitles, scored[name][1], data.table)
                        for name, data in sets.items())  # fmt: skip
        say(f"   subtitles: of {num_files} audio files in {folder}")
    for name, result in results.items():
        say(f"{name:>12}: {_describe_result(result, unit)}")
    best = f"        best: update {trainer.best_update}; " if trainer.best_update else ""
    say(f"{best}{'model and ' if is_trained else ''}{RESULTS_FILE} in {trainer.args.output_dir}")


def score_set(trainer: CTCTrainer, name: str, data: SpeechDataset) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `results.json` says of a set, and its lines for `predictions.jsonl`; unreadable audio has none."""
    output = trainer.predict(data, metric_key_prefix=name)
    hypotheses = {"": output.predictions} | ({"lm_": trainer.beam_texts[0]} if trainer.decoder is not None else {})
    unit, config = unit_of(trainer.vocabulary), trainer.model.config
    rate = RATES[unit][0]
    is_scored = f"{name}_{rate}" in output.metrics  # not without transcripts
    lines, words = [], []
    for row, units, *texts in zip(data.table, trainer.units, *hypotheses.values(), strict=True):
        if texts[0] is None:
            continue
        line = {"set": name, "id": row["id"], "reference": row["text"] if is_scored else None}
        for prefix, text in zip(hypotheses, texts, strict=True):
            line[f"{prefix}hypothesis"] = text
            line |= {f"{prefix}{rate}": jiwer.wer(row["text"], text)} if is_scored else {}
        lines.append(line)
        words.append({"words": time_words(units, unit, config, row["start"])})
    result: dict[str, Any] = {"utterances": len(lines), "hours": round(num_hours(data.table), 4)}
    if num_long := sum(length > trainer.chunk_seconds * SAMPLING_RATE for length in data.lengths):
        result["in_chunks"] = num_long
    if is_scored:
        unknown = find_unknown(data.table, trainer.vocabulary)
        measured = (*RATES[unit], *(() if num_long else ("loss",)))  # recordings in chunks have no loss
        result |= {key: output.metrics[f"{name}_{key}"] for key in measured}
        pairs = ([line[key] for line in lines] for key in ("reference", "hypothesis"))
        result["edits"] = scores.count_edits(*pairs)
        result["too_few_frames"] = count_short(data.table, config, unit)
        result[f"unknown_{unit}"] = {"total": sum(unknown.values()), "counts": unknown}
        result["worst_utterances"] = scores.worst_utterances(lines, rate)
        if trainer.decoder is not None:
            rates = trainer.rates(data.table["text"][:], hypotheses["lm_"])
            result["lm"] = rates | {"worst_utterances": scores.worst_utterances(lines, f"lm_{rate}")}
    return result, [line | timed for line, timed in zip(lines, words, strict=True)]


def _describe_result(result: Mapping[str, Any], unit: str) -> str:
    if "edits" not in result:
        return f"{result['utterances']} utterances transcribed in {PREDICTIONS_FILE}{_describe_chunks(result)}"
    greedy, beam = (", ".join(f"{NAMES[name]} {rates[name]:.1%}" for name in RATES[unit] if name in rates)
                    for rates in (result, result.get("lm", {})))  # fmt: skip
    over = f" over {result['utterances']} utterances" + _describe_chunks(result)
    return greedy + (f"; with the language model {beam}" if beam else "") + over


def _describe_chunks(result: Mapping[str, Any]) -> str:
    return f", {result['in_chunks']} of them in overlapping chunks" if "in_chunks" in result else ""


def time_words(units: Sequence[tuple[str, int, int]], unit: str, config: Wav2Vec2Config, start: float) -> list[dict]:
    """Words (tokens) of an aligned path with their seconds from the beginning of the audio file.

    In scripts without spaces a word is a character with its marks.
    """
    seconds, words = config.inputs_to_logits_ratio / SAMPLING_RATE, []
    for word, first, end in align_words(units, unit):
        if unit == CHARACTERS and NO_SPACES.search(word):
            inside = [u for u in units if first <= u[1] < end]
            for token, token_first, token_end in inside:
                if unicodedata.category(token[0])[0] == "M" and words:
                    words[-1] = words[-1][0] + token, words[-1][1], token_end
                else:
                    words.append((token, token_first, token_end))
        else:
            words.append((word, first, end))
    return [{"word": word, "start": round(start + first * seconds, 3), "end": round(start + end * seconds, 3)}
            for word, first, end in words]  # fmt: skip


def write_subtitles(folder: Path, kind: str, lines: Sequence[dict[str, Any]], table: Dataset) -> int:
    """One file of subtitles for each audio file, or channel of one, of these predictions. Returns their number.

    It has the audio's name, or at an address in a container, which has none, the first utterance's id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    channels = table["channel"] if "channel" in table.column_names else repeat(None, len(table))
    source_of = dict(zip(table["id"], zip(table["audio"], channels, strict=True), strict=True))
    words: dict[tuple[str, int | None], list[dict]] = {}
    stems: dict[str, str] = {}
    for line in lines:
        audio, channel = source_of[line["id"]]
        words.setdefault((audio, channel), []).extend(line["words"])
        is_range = split_address(audio)[2] is not None
        stems.setdefault(audio, line["id"].replace("/", "_") if is_range else Path(audio).stem)
    taken: set[str] = set()
    for (audio, channel), found in words.items():
        stem = stems[audio] + ("" if channel is None else f"_channel{channel}")
        name = next(name for name in chain([stem], (f"{stem}_{n}" for n in count(2))) if name not in taken)
        taken.add(name)
        cues = [
            _format_cue(kind, i, *cue) for i, cue in enumerate(_cut_cues(sorted(found, key=lambda w: w["start"])), 1)
        ]
        head = "WEBVTT\n\n" if kind == "vtt" else ""
        (folder / f"{name}.{kind}").write_text(head + "\n".join(cues), encoding="utf-8", errors="surrogateescape")
    return len(words)


def _cut_cues(words: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float, str]]:
    """Start, end and text of each subtitle: short enough to be read, and broken at pauses."""
    start = end = 0.0
    text = ""
    for word in words:
        is_joined = NO_SPACES.match(text[-1:]) and NO_SPACES.match(word["word"])
        pause, longer = word["start"] - end, f"{text}{'' if is_joined else ' '}{word['word']}".strip()
        if text and (pause > _LONGEST_PAUSE or word["end"] - start > _LONGEST_CUE or len(longer) > _LONGEST_LINE):
            yield start, end, text
            text = ""
        if not text:
            start, longer = word["start"], word["word"]
        text, end = longer, word["end"]
    if text:
        yield start, end, text


def _format_cue(kind: str, number: int, start: float, end: float, text: str) -> str:
    point = "," if kind == "srt" else "."
    times = []
    for seconds in (start, end):
        minutes, milliseconds = divmod(round(seconds * 1_000), 60_000)
        times.append(f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1_000:02}{point}{milliseconds % 1_000:03}")
    return f"{number}\n{times[0]} --> {times[1]}\n{html.escape(text, quote=False) if kind == 'vtt' else text}\n"
