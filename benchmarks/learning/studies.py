"""What the studies share: runs of the program that are kept and go on, their scores, a table and a picture.

A study's command gives flags of the scripts that it runs: what follows the first `--` goes to the first script, what
follows the second to the second.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, environment, make_parser, make_rows, print_table, write_lines

from w2v2.arguments import PretrainArguments
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.cli import parse_command_line
from w2v2.errors import UserError
from w2v2.evaluate.plots import make_figure, save_figure
from w2v2.model.loading import build_config
from w2v2.train.log import METRICS_FILE, read_metrics

ACCURACY = {"accuracy": "accuracy", "guess": "constant guess", "above": "above it"}
ACCURACY |= {"perplexity": "hard perplexity", "loss": "contrastive loss"}
ERRORS = {"cer": "CER", "wer": "WER", "lm_wer": "WER with n-gram"}
DRAWN = {"above": "accuracy above a constant guess", "cer": "test CER", "wer": "test WER"}
FORMATS = dict.fromkeys(ERRORS, ".1%") | dict.fromkeys(ACCURACY, ".3f") | {"perplexity": ".1f", "minutes": ".1f"}


# -- runs


def start_parser(description: str, *recipes: str) -> argparse.ArgumentParser:
    """The parser of a study, with a YAML file for each of these scripts and the folder of its runs."""
    parser = make_parser(description)
    for script in recipes:
        parser.add_argument(script, help=f"YAML file of {script}.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def parse_words(parser: argparse.ArgumentParser, num: int = 2) -> tuple[argparse.Namespace, list[list[str]]]:
    """The process's own arguments, and the flags of up to `num` scripts, each after a `--`. Raises UserError for more."""
    parts = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    if len(parts) > num + 1:
        raise UserError(f"`--` stands {len(parts) - 1} times: flags of {num} scripts at most")
    args = parser.parse_args(parts[0])
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return args, parts[1:] + [[] for _ in range(num + 1 - len(parts))]


def launch(command: Sequence[str], log: TextIO) -> int:
    """Exit status of a script of this repository, whose path is the first word."""
    return subprocess.run([sys.executable, ROOT / command[0], *command[1:]], stdout=log, stderr=log).returncode


def run(folder: Path, product: str, *words) -> None:
    """Run a script with this `--output_dir`, unless its `product` is there; a run that was cut short goes on.

    Raises UserError where it fails, and for a folder that another command made.
    """
    command = [*map(str, words), "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    note = folder.with_name(folder.name + ".json")
    recipes = {word: Path(word).read_text(encoding="utf-8") for word in command if word.endswith((".yaml", ".yml"))}
    made_by = {"command": command, "recipes": recipes}
    if note.exists() and json.loads(note.read_text()) != made_by:
        raise UserError(
            f"{folder}: another command or recipe made it ({note}): delete both, or give another --output_dir"
        )
    note.write_text(json.dumps(made_by))
    if (folder / product).exists():
        return
    print("$ python", shlex.join(command), flush=True)
    with open(folder.with_name(folder.name + ".log"), "a") as log:
        if status := launch(command, log):
            raise UserError(f"{command[0]} ended with status {status}: see {log.name}")


def pretrain(folder: Path, recipe: str, flags: Sequence[str]) -> None:
    """Collapsed codes are a result: they end no run."""
    run(folder, "model.safetensors", "pretrain.py", recipe, "--collapse_action", "warn", *flags)


def validate(folder: Path, recipe: str, flags: Sequence[str]) -> dict[str, float]:
    """A model's figures on held-out speech by the masks and distractors of recipe and flags, not by its own.

    pretrain.py validates after an update, so it gets one that changes nothing.
    """
    (args,) = parse_command_line([PretrainArguments], [recipe, *flags, "--output_dir", str(folder)])
    changes = ["--config_overrides", f"num_negatives={build_config(args).num_negatives}", "--config_name="]
    still = "--max_steps 1 --eval_steps 1 --learning_rate 1e-12 --report_to none".split()
    where = folder.with_name(folder.name + "_validation")
    run(where, "model.safetensors", "pretrain.py", recipe, *flags, *changes, *still, "--model_name_or_path", folder)
    found = read_metrics(where / METRICS_FILE)[-1]
    accuracy, guess = found["eval_accuracy"], found["eval_constant_guess_accuracy"]
    return dict(accuracy=accuracy, guess=guess, above=accuracy - guess,
                perplexity=found["eval_codebook_perplexity_hard"], loss=found["eval_contrastive_loss"])  # fmt: skip


def fine_tune(folder: Path, recipe: str, flags: Sequence[str], *start) -> dict[str, float]:
    """Error rates after fine-tuning from `start`, words that name the weights."""
    run(folder, "results.json", "finetune_ctc.py", recipe, *start, *flags)
    scores = json.loads((folder / "results.json").read_text())
    test = next(name for name in scores if name not in ("validation", "run"))
    found = dict(validation=scores["validation"]["wer"], wer=scores[test]["wer"], cer=scores[test]["cer"])
    return found | dict(lm_wer=scores[test].get("lm", {}).get("wer"), hours=scores["run"]["train_hours"])


def list_hours(hours: float, args: PretrainArguments, folder: Path) -> str:
    """A manifest of so many hours of --train_data. Raises UserError where it holds fewer."""
    rows = make_rows(folder, hours, args.train_data, args.data_root)
    found = sum(row["num_samples"] for row in rows) / SAMPLING_RATE / 3600
    if found < 0.95 * hours:
        raise UserError(
            f"--train_data holds {found:.2f} h, the study asks for {hours:g}: give more, or leave --variants out"
        )
    return write_lines(folder / f"{hours:g}_hours.jsonl", rows)


def judge(model: Path, args: argparse.Namespace, pretraining: list[str], finetuning: list[str], seed: int) -> dict:
    """What a pretrained model is worth: validated, and fine-tuned if a recipe says how."""
    seeded = ["--seed", str(seed)]
    found = validate(model, args.pretrain, pretraining + seeded)
    if args.finetune_ctc:
        where, start = model.with_name(model.name + "_ctc"), ["--model_name_or_path", model]
        found |= fine_tune(where, args.finetune_ctc, finetuning + seeded, *start)
    return found


# -- what they found


def keep(runs: list[dict], folder: Path) -> None:
    """Write results.json: every run, and where it was measured."""
    (folder / "results.json").write_text(json.dumps(dict(runs=runs, environment=environment()), indent=2) + "\n")


def group(runs: Sequence[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Runs that are alike in these keys, in the order in which they come."""
    groups = {}
    for one in runs:
        groups.setdefault(tuple(one[key] for key in keys), []).append(one)
    return groups


def show(runs: Sequence[dict], keys: dict[str, str], measures: dict[str, str]) -> None:
    """Print a row for runs alike in `keys`, with each measure's mean and range over them."""
    measures, rows = found_in(runs, measures), []
    for labels, some in group(runs, *keys).items():
        row = [*map(str, labels), str(len(some))]
        for name in measures:
            values = [one[name] for one in some]
            mean, *ends = [f"{x:{FORMATS[name]}}" for x in (statistics.mean(values), min(values), max(values))]
            row.append(f"{mean} ({ends[0]} to {ends[1]})" if len(values) > 1 else mean)
        rows.append(row)
    print_table(rows, [*keys.values(), "runs", *measures.values()])


def found_in(runs: Sequence[dict], measures: dict[str, str]) -> dict[str, str]:
    """Those of the measures that all runs have."""
    return {name: title for name, title in measures.items() if all(one.get(name) is not None for one in runs)}


def draw(runs: Sequence[dict], key: str, measures: dict[str, str], path: Path) -> None:
    """A panel for each measure: every run as a dot, the mean of runs alike in `key` as a line."""
    measures, groups = found_in(runs, measures), group(runs, key)
    figure = make_figure(2 + 3 * len(measures), 1 + 0.35 * len(groups))
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, (name, title) in zip(panels, measures.items(), strict=True):
        for place, some in enumerate(groups.values()):
            values = [one[name] for one in some]
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
            axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
        axes.set(xlabel=title, yticks=range(len(groups)), yticklabels=[str(label) for (label,) in groups])
    panels[0].invert_yaxis()
    save_figure(figure, path)
