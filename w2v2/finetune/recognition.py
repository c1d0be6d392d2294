"""What a recogniser is scored by, greedily and, with a language model, by beam search, and what is written about it."""

import copy
from collections.abc import Mapping
from typing import Any

from w2v2.errors import UserError
from w2v2.evaluate.error_rates import CHARACTERS, NAMES, RATES, count_edits, word_error_rate, worst_utterances
from w2v2.finetune.arguments import PREDICTIONS_FILE, RESULTS_FILE, FineTuningArguments, write_results
from w2v2.finetune.ctc import CTCTrainer
from w2v2.finetune.ctc_data import SpeechDataset
from w2v2.finetune.decoding import BeamDecoder, Setting, tuning_grid
from w2v2.finetune.subsets import draw_order, num_hours
from w2v2.finetune.text import CTCArguments, unit_of, unknown_units


def load_decoder(text_args: CTCArguments, vocabulary: dict[str, int], args: FineTuningArguments) -> BeamDecoder | None:
    """The beam search that the flags ask for; made before any training, so that a wrong file shows up at once."""
    if text_args.lm is None:
        return None
    if text_args.tune_lm and not args.validation_data:
        raise UserError("--tune_lm chooses on the validation data: give --validation_data")
    settings = [Setting(text_args.lm_weight, text_args.word_score)]
    options = dict(beam_size=text_args.beam_size, lexicon=text_args.lexicon)
    decoder = BeamDecoder(text_args.lm, vocabulary, settings, **options)
    left = f", {decoder.unspelled} more cannot be spelled" if decoder.unspelled else ""
    args.print_once(f"language model: {text_args.lm}, {len(decoder.words)} words{left}")
    return decoder


def describe_units(sets: dict[str, SpeechDataset], trainer: CTCTrainer) -> None:
    """What the model can write, and a warning for each set with units that it cannot."""
    unit, say = unit_of(trainer.vocabulary), trainer.args.print_once
    listed = ("" if unit == CHARACTERS else " ").join(t for t in trainer.vocabulary if not t.startswith("<"))
    say(f"  vocabulary: {len(trainer.vocabulary)}: {listed}")
    for name, data in sets.items():
        if unknown := unknown_units(data.table["text"], trainer.vocabulary):
            listed = ", ".join(f"{token!r} × {count}" for token, count in list(unknown.items())[:10])
            say(f"     warning: {name} has {sum(unknown.values())} {unit} that the vocabulary lacks: {listed}")


def score(
    trainer: CTCTrainer, sets: dict[str, SpeechDataset], decoder: BeamDecoder | None, text_args: CTCArguments
) -> None:
    """Score each set with the model as it is now, and write and print the results; the beam search is tuned first."""
    trainer.decoder = decoder
    tuned = tune_decoder(trainer, sets["validation"], text_args) if text_args.tune_lm else {}
    results, lines = {}, []
    for name, data in sets.items():
        results[name], found = score_set(trainer, name, data)
        lines += found
    if not trainer.is_world_process_zero():
        return

    unit = unit_of(trainer.vocabulary)
    unknown = {name: result.get(f"unknown_{unit}", {}).get("counts") for name, result in results.items()}
    run = trainer.summary() | {"target_unit": unit, "vocabulary_size": len(trainer.vocabulary)}
    run[f"unknown_{unit}"] = {name: counts for name, counts in unknown.items() if counts}
    if is_trained := trainer.train_dataset is not None:
        run["warnings"] = trainer.blanks.warnings
    if decoder is not None:
        lm = {"path": decoder.lm_path, "beam_size": decoder.beam_size, "words": len(decoder.words)}
        run["lm"] = lm | decoder.settings[0]._asdict() | tuned
    write_results(trainer.args.output_dir, results | {"run": run}, lines)
    for name, result in results.items():
        print(f"{name:>12}: {_describe_result(result, unit)}", flush=True)
    best = f"        best: update {trainer.best_update}; " if trainer.best_update else ""
    print(f"{best}{'model and ' if is_trained else ''}{RESULTS_FILE} in {trainer.args.output_dir}", flush=True)


def tune_decoder(trainer: CTCTrainer, data: SpeechDataset, text_args: CTCArguments) -> dict[str, Any]:
    """Search some utterances with every setting of a small grid, and go on with the best. Returns the error rates."""
    unit = unit_of(trainer.vocabulary)
    grid, name = tuning_grid(unit), RATES[unit][0]
    some = copy.copy(data)
    some.table = data.table.select(sorted(draw_order(data.table, text_args.subset_seed)[: text_args.tune_utterances]))
    trainer.decoder.use(grid)
    trainer.predict(some, metric_key_prefix="tuning")
    rates = [trainer.rates(some.table["text"][:], texts)[name] for texts in trainer.beam_texts]
    rate, best = min(zip(rates, range(len(grid)), strict=True))
    trainer.decoder.use([grid[best]])
    chosen = ", ".join(f"{flag} {value}" for flag, value in grid[best]._asdict().items())
    found = f"{chosen}: {NAMES[name]} {rate:.1%} on {len(some)} validation utterances"
    trainer.args.print_once(f"      tuning: {found}")
    listed = [setting._asdict() | {name: round(rate, 5)} for setting, rate in zip(grid, rates, strict=True)]
    return {"tuned_on": len(some), "grid": listed}


def score_set(trainer: CTCTrainer, name: str, data: SpeechDataset) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `results.json` says of a set, and its lines for `predictions.jsonl`; unreadable audio has none."""
    output = trainer.predict(data, metric_key_prefix=name)
    hypotheses = {"": output.predictions} | ({"lm_": trainer.beam_texts[0]} if trainer.decoder is not None else {})
    unit = unit_of(trainer.vocabulary)
    rate = RATES[unit][0]
    is_scored = f"{name}_{rate}" in output.metrics  # not without transcripts
    lines = []
    for row, *texts in zip(data.table, *hypotheses.values(), strict=True):
        if texts[0] is None:
            continue
        line = {"set": name, "id": row["id"], "reference": row["text"] if is_scored else None}
        for prefix, text in zip(hypotheses, texts, strict=True):
            line[f"{prefix}hypothesis"] = text
            line |= {f"{prefix}{rate}": word_error_rate(row["text"], text)} if is_scored else {}
        lines.append(line)
    result: dict[str, Any] = {"utterances": len(lines), "hours": round(num_hours(data.table), 4)}
    if not is_scored:
        return result, lines
    unknown = unknown_units(data.table["text"], trainer.vocabulary)
    result |= {key: output.metrics[f"{name}_{key}"] for key in (*RATES[unit], "loss")}
    result["edits"] = count_edits([line["reference"] for line in lines], [line["hypothesis"] for line in lines])
    result[f"unknown_{unit}"] = {"total": sum(unknown.values()), "counts": unknown}
    result["worst_utterances"] = worst_utterances(lines, rate)
    if trainer.decoder is not None:
        rates = trainer.rates(data.table["text"][:], hypotheses["lm_"])
        result["lm"] = rates | {"worst_utterances": worst_utterances(lines, f"lm_{rate}")}
    return result, lines


def _describe_result(result: Mapping[str, Any], unit: str) -> str:
    if RATES[unit][0] not in result:
        return f"{result['utterances']} utterances transcribed in {PREDICTIONS_FILE}"
    greedy, beam = (
        ", ".join(f"{NAMES[name]} {rates[name]:.1%}" for name in RATES[unit] if name in rates)
        for rates in (result, result.get("lm", {}))
    )
    return greedy + (f"; with the language model {beam}" if beam else "") + f" over {result['utterances']} utterances"
