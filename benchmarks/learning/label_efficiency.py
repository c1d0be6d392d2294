"""How many labels does pretraining save? Fine-tuning with shares of the labels, from pretrained and random weights.

    python benchmarks/learning/label_efficiency.py configs/finetune/small.yaml --pretrained runs/small_1 runs/small_2 \
        --config_name small --train_data train.jsonl --validation_data valid.jsonl --test_data test.jsonl \
        --data_root SPEECH --output_dir runs/labels [--shares 1 0.3 0.1] [--learning_rates 7e-4 3e-4] [-- --seed 2 …]

Both starts try the same learning rates; validation chooses. Random weights are drawn once for each pretrained model.
Finished runs are kept, and a run that was cut short goes on: give the same command again. The output folder then holds
results.json and labels.png. What follows `--` goes to finetune_ctc.py as it is.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import environment, make_parser, print_table

from w2v2.cli import run_script
from w2v2.errors import UserError
from w2v2.evaluate.plots import make_figure, save_figure

ROOT = Path(__file__).resolve().parents[2]
STARTS = ("pretrained", "random weights")


def fine_tune(args, passed: list[str], start: str, number: int, share: float, rate: float) -> dict:
    """One run's scores; the hours of labels that it may use are a share of `args.hours`."""
    folder = args.output_dir / f"{start.split()[0]}_{number}_{share:g}_{rate:g}"
    if not (folder / "results.json").exists():
        model = args.pretrained[number - 1]
        weights = (
            ["--model_name_or_path", model]
            if start == STARTS[0]
            else ["--model_name_or_path=", "--config_name", args.config_name]
        )
        data = [word for name in ("train_data", "validation_data", "test_data", "data_root") if getattr(args, name)
                for word in (f"--{name}", getattr(args, name))]  # fmt: skip
        hours = ["--train_hours", f"{share * args.hours:.4f}"] if share < 1 else []
        flags = ["--seed", str(number), *hours, "--learning_rate", str(rate), "--output_dir", str(folder)]
        command = ["finetune_ctc.py", args.recipe, *weights, *data, *flags, "--resume_from_checkpoint", "auto", *passed]
        print("$ python", *command, flush=True)
        with open(args.output_dir / f"{folder.name}.log", "a") as log:
            status = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log).returncode
        if status:
            raise UserError(f"finetune_ctc.py ended with status {status}: see {log.name}")
    scores = json.loads((folder / "results.json").read_text())
    test = next(name for name in scores if name not in ("validation", "run"))
    return dict(start=start, number=number, share=share, rate=rate, hours=scores["run"]["train_hours"],
                validation=scores["validation"]["wer"], wer=scores[test]["wer"], cer=scores[test]["cer"],
                lm_wer=scores[test].get("lm", {}).get("wer"))  # fmt: skip


def choose(runs: list[dict]) -> list[dict]:
    """Of each model and share the learning rate that validated best."""
    best = {}
    for run in sorted(runs, key=lambda run: -run["validation"]):
        best[run["start"], run["number"], run["share"]] = run
    return list(best.values())


def tabulate(chosen: list[dict]) -> list[list[str]]:
    """A row for each start and share: mean and range of the error rates over the models."""
    rows = []
    for start, share in sorted({(run["start"], run["share"]) for run in chosen}, key=lambda key: (-key[1], key[0])):
        some = [run for run in chosen if (run["start"], run["share"]) == (start, share)]
        row = [f"{share:.0%}", f"{60 * some[0]['hours']:.1f}", start, str(len(some))]
        for measure in ("cer", "wer", "lm_wer"):
            values = [run[measure] for run in some if run[measure] is not None]
            row.append(f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})" if values else "")
        rows.append(row)
    return rows


def draw(chosen: list[dict], path: Path) -> None:
    figure = make_figure(6, 4)
    axes = figure.subplots()
    for start in STARTS:
        shares = sorted({run["share"] for run in chosen if run["start"] == start})
        some = [[run for run in chosen if (run["start"], run["share"]) == (start, share)] for share in shares]
        minutes = [60 * runs[0]["hours"] for runs in some]
        axes.plot(
            minutes, [100 * statistics.mean(run["wer"] for run in runs) for runs in some], marker="o", label=start
        )
    axes.set(xscale="log", xlabel="minutes of labelled speech", ylabel="test WER, %", ylim=(0, None))
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("recipe", help="YAML file of finetune_ctc.py")
    parser.add_argument("--pretrained", nargs="+", required=True, help="pretrained folders, one a seed")
    parser.add_argument("--config_name", default="small", help="shape of the random weights")
    for name in ("train_data", "validation_data", "test_data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--data_root")
    parser.add_argument("--hours", type=float, required=True, help="hours of all the labels")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.3, 0.1])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[7e-4, 3e-4])
    parser.add_argument("--output_dir", type=Path, required=True)
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, passed = parser.parse_args(words[:cut]), words[cut + 1 :]
    args.output_dir = Path(os.path.abspath(args.output_dir))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = []
    for share in args.shares:
        for number in range(1, len(args.pretrained) + 1):
            runs += [
                fine_tune(args, passed, start, number, share, rate) for start in STARTS for rate in args.learning_rates
            ]
            chosen = choose(runs)
            (args.output_dir / "results.json").write_text(
                json.dumps(dict(runs=runs, environment=environment()), indent=2)
            )
            draw(chosen, args.output_dir / "labels.png")
    print_table(tabulate(chosen), ["labels", "minutes", "start", "models", "CER", "WER", "WER with n-gram"])


if __name__ == "__main__":
    run_script(main)
