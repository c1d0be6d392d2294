"""Are two utterances of one speaker? The equal error rate of the cosine between embeddings, over a list of trials.

    python verify_speakers.py --model_name_or_path runs/speakers --trials veri_test.txt \\
        --data_root /data/voxceleb1/wav --output_dir runs/eer

Embeddings are a fine-tuned classifier's projection averaged over time, or, of any model, the mean of a layer's frames
(`--layer`).
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import json
from pathlib import Path

import numpy as np
from datasets import Dataset

from w2v2.audio.crops import AudioError, measure_length
from w2v2.cli import parse_command_line, run_script
from w2v2.errors import UserError
from w2v2.evaluate.scores import (
    Trial,
    cosine_scores,
    draw_trials,
    equal_error_rate,
    min_detection_cost,
    read_trials,
    write_trials,
)
from w2v2.finetune.labels import values_of
from w2v2.probe.arguments import VerificationArguments
from w2v2.probe.features import FrozenModel, read_table
from w2v2.report.page import report_run
from w2v2.train.events import EVENTS_FILE, note_finish, note_start

RESULTS_FILE = "verification.json"
NUM_BINS = 40  # of the histograms of scores


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_command_line((VerificationArguments,), argv)
    folder = args.prepare_output_dir(RESULTS_FILE)
    trials, table = listed_trials(args) if args.trials else drawn_trials(args)
    targets = [trial.target for trial in trials]
    print(f"{len(trials)} trials, {sum(targets)} of one speaker, {len(table)} utterances", flush=True)

    (folder / EVENTS_FILE).unlink(missing_ok=True)  # of the results that are replaced
    note_start(args)

    # Embeddings of every utterance; those of the cohort say what an average voice is.
    model = FrozenModel(args.model_name_or_path, args.config_name, seed=args.seed, device=args.device)
    if args.layer is not None and not 0 <= args.layer < model.num_layers:
        raise UserError(f"--layer {args.layer}: this model has the layers 0 to {model.num_layers - 1}")
    cohort = embed(model, read_table(args.cohort, [], args), args.layer) if args.cohort else None

    # Scores of every trial, for each kind of embedding.
    results = {}
    for name, vectors in embed(model, table, args.layer).items():
        if cohort is not None:
            vectors = (vectors - cohort[name].mean(0)) / np.maximum(cohort[name].std(0), 1e-6)
        scores = cosine_scores(trials, dict(zip(table["id"], vectors, strict=True)))
        edges, kinds = np.histogram_bin_edges(scores, NUM_BINS), {"one speaker": 1, "two speakers": 0}
        counts = {kind: np.histogram(scores[np.equal(targets, n)], edges)[0].tolist() for kind, n in kinds.items()}
        results[name] = {"eer": equal_error_rate(targets, scores),
                         "min_dcf": min_detection_cost(targets, scores, args.p_target),
                         "histogram": {"edges": edges.tolist(), "counts": counts}}  # fmt: skip
        print(f"{name:>10}: EER {results[name]['eer']:.2%}, minDCF {results[name]['min_dcf']:.3f}", flush=True)
    run = {"model": args.model_name_or_path, "config": args.config_name, "trials": len(trials), "targets": sum(targets),
           "p_target": args.p_target, "cohort": bool(args.cohort), "seed": args.seed}  # fmt: skip
    (folder / RESULTS_FILE).write_text(json.dumps(results | {"run": run}, indent=2) + "\n", encoding="utf-8")
    note_finish(args)
    report_run(args)


def embed(model: FrozenModel, table: Dataset, layer: int | None) -> dict[str, np.ndarray]:
    """Name of the embedding → one vector an utterance, (N, D)."""
    if layer is None and model.has_head:
        return {"projection": model.embeddings(table)}
    means = model.means(table)  # (N, L, D)
    return {f"layer {i}": means[:, i] for i in (range(model.num_layers) if layer is None else [layer])}


def listed_trials(args: VerificationArguments) -> tuple[list[Trial], Dataset]:
    """The trials of a list, and a table of the files that they name."""
    trials = read_trials(args.trials)
    base = Path(args.data_root or Path(args.trials).parent).absolute()
    names = sorted({name for trial in trials for name in (trial.first, trial.second)})
    audio = [str(base / name) for name in names]
    try:
        lengths = [measure_length(path) for path in audio]
    except AudioError as error:
        hint = "" if args.data_root else "; --data_root names the folder that the paths start from"
        raise UserError(f"--trials {args.trials}: {error.path}: {error.reason}{hint}") from None
    return trials, Dataset.from_dict({"id": names, "audio": audio, "start": [0.0] * len(names), "num_samples": lengths})


def drawn_trials(args: VerificationArguments) -> tuple[list[Trial], Dataset]:
    """Trials among a manifest's utterances, noted in `trials.txt`, and the utterances that they name."""
    table = read_table(args.manifest, [args.speaker_column], args)
    speakers = values_of(table, args.speaker_column, "speaker_column", ", ".join(args.manifest))
    if without := speakers.count(""):
        print(f"{', '.join(args.manifest)}: {without} utterances without {args.speaker_column} are in no trial")
    trials = draw_trials(dict(zip(table["id"], speakers, strict=True)), args.num_trials, args.seed)
    write_trials(Path(args.output_dir, "trials.txt"), trials)
    used = {name for trial in trials for name in (trial.first, trial.second)}
    return trials, table.select([row for row, name in enumerate(table["id"]) if name in used])


if __name__ == "__main__":
    run_script(main)
