"""How many labels does pretraining save? Fine-tuning with shares of the labels, from pretrained and random weights.

    python benchmarks/learning/label_efficiency.py configs/finetune/small.yaml --pretrained runs/small_1 runs/small_2 \
        --config_name small --train_data train.jsonl --validation_data valid.jsonl --test_data test.jsonl \
        --data_root SPEECH --output_dir runs/labels [--shares 1 0.3 0.1] [--learning_rates 7e-4 3e-4] [-- --seed 2 …]

Both starts try the same learning rates with the largest share, of the first model; the one that validates best then
serves that start's other runs. Random weights are drawn once for each pretrained model. Finished runs are kept, and a
run that was cut short goes on: give the same command again. The output folder then holds results.json and labels.png.
What follows `--` goes to finetune_ctc.py as it is.
"""

import statistics
from pathlib import Path

from studies import ERRORS, fine_tune, group, keep, parse_words, show, start_parser

from w2v2.cli import run_script
from w2v2.evaluate.plots import make_figure, save_figure

STARTS = ("pretrained", "random weights")
DATA = ("train_data", "validation_data", "test_data", "data_root")


def learn(args, flags: list[str], start: str, number: int, share: float, rate: float) -> dict:
    """One run's scores; the hours of labels that it may use are a share of `args.hours`."""
    folder = args.output_dir / f"{start.split()[0]}_{number}_{share:g}_{rate:g}"
    random = ["--model_name_or_path=", "--config_name", args.config_name]
    weights = ["--model_name_or_path", args.pretrained[number - 1]] if start == STARTS[0] else random
    data = [word for name in DATA if getattr(args, name) for word in (f"--{name}", getattr(args, name))]
    hours = ["--train_hours", f"{share * args.hours:.4f}"] if share < 1 else []
    own = ["--seed", str(number), *hours, "--learning_rate", str(rate)]
    found = fine_tune(folder, args.finetune_ctc, [*data, *own, *flags], *weights)
    return dict(start=start, number=number, share=share, rate=rate) | found


def choose_rates(searched: list[dict]) -> dict[str, float]:
    """Of each start the learning rate that validated best."""
    best = (min(some, key=lambda run: run["validation"]) for some in group(searched, "start").values())
    return {run["start"]: run["rate"] for run in best}


def draw_shares(runs: list[dict], path: Path) -> None:
    figure = make_figure(6, 4)
    axes = figure.subplots()
    for (start,), some in group(runs, "start").items():
        shares = sorted(group(some, "share").items())
        minutes = [60 * equal[0]["hours"] for _, equal in shares]
        means = [100 * statistics.mean(run["wer"] for run in equal) for _, equal in shares]
        axes.plot(minutes, means, marker="o", label=start)
    axes.set(xscale="log", xlabel="minutes of labelled speech", ylabel="test WER, %", ylim=(0, None))
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    parser = start_parser(__doc__, "finetune_ctc")
    parser.add_argument("--pretrained", nargs="+", required=True, help="pretrained folders, one a seed")
    parser.add_argument("--config_name", default="small", help="shape of the random weights")
    for name in DATA:
        parser.add_argument(f"--{name}", required=name != "data_root")
    parser.add_argument("--hours", type=float, required=True, help="hours of all the labels")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.3, 0.1])
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[7e-4, 3e-4])
    args, (flags,) = parse_words(parser, num=1)
    largest = max(args.shares)
    runs = [learn(args, flags, start, 1, largest, rate) for start in STARTS for rate in args.learning_rates]
    rates = choose_rates(runs)
    for number in range(1, len(args.pretrained) + 1):
        for share in args.shares:
            if (number, share) != (1, largest):
                runs += [learn(args, flags, start, number, share, rates[start]) for start in STARTS]
            keep(runs, args.output_dir)
            chosen = [run for run in runs if run["rate"] == rates[run["start"]]]
            draw_shares(chosen, args.output_dir / "labels.png")
    rows = [run | {"labels": f"{run['share']:.0%}", "minutes": 60 * run["hours"]} for run in chosen]
    show(rows, {"labels": "labels", "start": "start"}, {"minutes": "minutes"} | ERRORS)


if __name__ == "__main__":
    run_script(main)
