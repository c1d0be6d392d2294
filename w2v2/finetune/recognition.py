"""What a recogniser is scored by, greedily and, with a language model, by beam search, and what is written about it."""

import json
from pathlib import Path
from typing import Any

from w2v2.errors import UserError
from w2v2.evaluate.error_rates import CHARACTERS, NAMES, RATES, count_edits, word_error_rate, worst_utterances
from w2v2.finetune.arguments import PREDICTIONS_FILE, RESULTS_FILE, SKIPPED_FILE, FineTuningArguments
from w2v2.finetune.ctc import CTCTrainer
from w2v2.finetune.ctc_data import SpeechDataset, read_skipped
from w2v2.finetune.decoding import BeamDecoder, tuning_grid
from w2v2.finetune.subsets import draw_order, num_hours
from w2v2.finetune.task_arguments import CTCArguments
from w2v2.finetune.text import unit_of, unknown_units


def load_decoder(text_args: CTCArguments, vocabulary: dict[str, int], args: FineTuningArguments) -> BeamDecoder | None:
    """The beam search that the flags ask for; made before any training, so that a wrong file shows up at once."""
    if text_args.lm is None:
        return None
    if text_args.tune_lm and not args.validation_data:
        raise UserError("--tune_lm chooses on the validation data: give --validation_data")
    decoder = BeamDecoder(
        text_args.lm, vocabulary, [text_args.setting], beam_size=text_args.beam_size, lexicon=text_args.lexicon
    )
    left = f", {decoder.unspelled} more cannot be spelled" if decoder.unspelled else ""
    args.print_once(f"language model: {text_args.lm}, {len(decoder.words)} words{left}")
    return decoder


def describe_units(sets: dict[str, SpeechDataset], trainer: CTCTrainer) -> None:
    """What the model can write, and a warning for each set with units that it cannot."""
    unit = unit_of(trainer.vocabulary)
    units = [token for token in trainer.vocabulary if not token.startswith("<")]
    listed = ("" if unit == CHARACTERS else " ").join(units)
    trainer.args.print_once(f"  vocabulary: {len(trainer.vocabulary)}: {listed}")
    for name, data in sets.items():
        if unknown := unknown_units(data.table["text"], trainer.vocabulary):
            listed = ", ".join(f"{token!r} × {count}" for token, count in list(unknown.items())[:10])
            trainer.args.print_once(
                f"     warning: {name} has {sum(unknown.values())} {unit} that the vocabulary lacks: {listed}"
            )


def score(
    trainer: CTCTrainer, sets: dict[str, SpeechDataset], decoder: BeamDecoder | None, text_args: CTCArguments
) -> dict[str, dict]:
    """Results of each set with the model as it is now, and `predictions.jsonl`; the beam search is tuned first."""
    trainer.decoder = decoder
    tuned = tune_decoder(trainer, sets["validation"], text_args) if decoder is not None and text_args.tune_lm else {}
    results, lines = {}, []
    for name, data in sets.items():
        results[name], found = score_set(trainer, name, data)
        lines += found
    if trainer.is_world_process_zero():
        with open(Path(trainer.args.output_dir, PREDICTIONS_FILE), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if decoder is not None:
        lm = {"path": decoder.lm_path, "beam_size": decoder.beam_size, "words": len(decoder.words)}
        results["run"] = {"lm": lm | decoder.settings[0]._asdict() | tuned}
    return results


def tune_decoder(trainer: CTCTrainer, data: SpeechDataset, text_args: CTCArguments) -> dict[str, Any]:
    """Search some utterances with every setting of a small grid, and go on with the best. Returns the error rates."""
    unit, decoder = unit_of(trainer.vocabulary), trainer.decoder
    grid, name = tuning_grid(unit), RATES[unit][0]
    some = data.take(sorted(draw_order(data.table, text_args.subset_seed)[: text_args.tune_utterances]))
    decoder.use(grid)
    trainer.predict(some, metric_key_prefix="tuning")
    rates = [trainer.rates(some.table["text"][:], texts)[name] for texts in trainer.beam_texts]
    best = min(range(len(grid)), key=lambda k: (rates[k], k))
    decoder.use([grid[best]])
    axes = zip(grid[best], map(sorted, map(set, zip(*grid, strict=True))), strict=True)
    at_edge = any(len(values) > 1 and value in (values[0], values[-1]) for value, values in axes)
    hint = ", at the grid's edge: try further by hand" if at_edge else ""
    trainer.args.print_once(
        f"      tuning: lm_weight {grid[best].lm_weight}, word_score {grid[best].word_score}: {NAMES[name]} "
        f"{rates[best]:.1%} on {len(some)} validation utterances{hint}"
    )
    listed = [setting._asdict() | {name: round(rate, 5)} for setting, rate in zip(grid, rates, strict=True)]
    return {"tuned_on": len(some), "grid": listed}


def score_set(trainer: CTCTrainer, name: str, data: SpeechDataset) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `results.json` says of a set, and its lines for `predictions.jsonl`; unreadable audio has none."""
    output = trainer.predict(data, metric_key_prefix=name)
    beams = trainer.beam_texts[0] if trainer.decoder is not None else [None] * len(output.predictions)
    unit = unit_of(trainer.vocabulary)
    rate = RATES[unit][0]
    scored = f"{name}_{rate}" in output.metrics  # not without transcripts
    lines = []
    for row, greedy, beam in zip(data.table, output.predictions, beams, strict=True):
        if greedy is None:
            continue
        line = {"set": name, "id": row["id"], "reference": row["text"] if scored else None, "hypothesis": greedy}
        line |= {rate: word_error_rate(row["text"], greedy)} if scored else {}
        if beam is not None:
            line |= {"lm_hypothesis": beam} | ({f"lm_{rate}": word_error_rate(row["text"], beam)} if scored else {})
        lines.append(line)
    result: dict[str, Any] = {"utterances": len(lines), "hours": round(num_hours(data.table), 4)}
    if scored:
        unknown = unknown_units(data.table["text"], trainer.vocabulary)
        result = {key: output.metrics[f"{name}_{key}"] for key in (*RATES[unit], "loss")} | result
        result |= {
            "edits": count_edits([line["reference"] for line in lines], [line["hypothesis"] for line in lines]),
            f"unknown_{unit}": {"total": sum(unknown.values()), "counts": unknown},
            "worst_utterances": worst_utterances(lines, rate),
        }
        if trainer.decoder is not None:
            rates = trainer.rates(data.table["text"][:], beams)
            result["lm"] = rates | {"worst_utterances": worst_utterances(lines, f"lm_{rate}")}
    return result, lines


def write_results(trainer: CTCTrainer, sets: dict[str, SpeechDataset], results: dict[str, dict]) -> None:
    """`results.json`, and its gist on the console. The main process alone calls this."""
    args, train, vocabulary = trainer.args, trainer.train_dataset, trainer.vocabulary
    unit = unit_of(vocabulary)
    unknown = {name: results[name].get(f"unknown_{unit}", {}).get("counts") for name in sets}
    run = {
        "model": args.model_name_or_path,
        "config": args.config_name,
        "target_unit": unit,
        "vocabulary_size": len(vocabulary),
        "seed": args.seed,
        "skipped_audio": len(read_skipped(Path(args.output_dir, SKIPPED_FILE))),
        f"unknown_{unit}": {name: counts for name, counts in unknown.items() if counts},
    }
    if train is not None:
        run |= {
            "updates": trainer.state.global_step,
            "best_update": trainer.best_update,
            "train_utterances": len(train),
            "train_hours": round(num_hours(train.table), 4),
            "warnings": trainer.blanks.warnings,
        }
    results = results | {"run": run | results.get("run", {})}
    path = Path(args.output_dir, RESULTS_FILE)
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in sets:
        print(f"{name:>12}: {_describe_result(results[name], unit)}", flush=True)
    best = f"        best: update {trainer.best_update}; " if trainer.best_update else ""
    print(f"{best}{'model and ' if train else ''}{RESULTS_FILE} in {args.output_dir}", flush=True)


def _describe_result(result: dict[str, Any], unit: str) -> str:
    if RATES[unit][0] not in result:
        return f"{result['utterances']} utterances transcribed in {PREDICTIONS_FILE}"
    greedy = ", ".join(f"{NAMES[name]} {result[name]:.1%}" for name in RATES[unit])
    beam = ", ".join(f"{NAMES[name]} {result['lm'][name]:.1%}" for name in RATES[unit]) if "lm" in result else ""
    return greedy + (f"; with the language model {beam}" if beam else "") + f" over {result['utterances']} utterances"
