"""A reference curve of one recipe, from runs that differ in their seed: what validations are usual after which hours.

    python benchmarks/make_reference.py runs/small_1 runs/small_2 runs/small_3 --name "our small model" \\
        --data "the demo's synthesized speech" --output w2v2/plan/reference_curves/small.json

`pretrain.py` and `report.py` compare runs of the same model and of nearly the same batch with it. The band at each
validation is the mean plus and minus two standard deviations, times √(1 + 1/n) because the mean too is of n seeds. The
deviation is pooled over five validations in a row: a few seeds alone say little of it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from common import make_parser

from w2v2.cli import run_script
from w2v2.errors import UserError
from w2v2.plan.expectations import FLAGS, MODEL_KEYS, has_finite
from w2v2.train.log import METRICS_FILE, read_metrics
from w2v2.train.state import SETTINGS

MEASURES = ("accuracy", "contrastive_loss", "diversity_loss", "codebook_perplexity", "codebook_perplexity_hard")
SAME = (*SETTINGS, "train_data", "batch_hours", "crop_seconds", *FLAGS)
MOST_POINTS, DEVIATIONS = 40, 2.0
BAND = "Mean of the seeds, plus and minus two standard deviations, pooled over five validations, times √(1 + 1/n)."
COMPARE = "Hours, accuracy, losses and perplexities are this program's own, of the validation data named above."


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of finished runs, alike but for --seed")
    parser.add_argument("--name", required=True, help="the recipe in a few words, as sentences name it")
    parser.add_argument("--data", required=True, help="what was heard and validated on, in a few words")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    flags, model = check_alike([Path(run) for run in args.runs])
    points = find_band([read_metrics(Path(run) / METRICS_FILE) for run in args.runs])
    curve = {"batch_hours": flags["batch_hours"], "learning_rate": flags["learning_rate"], "num_runs": len(args.runs)}
    file = {
        "name": args.name,
        "source": f"benchmarks/make_reference.py, {len(args.runs)} seeds",
        "citation": "this repository (Apache-2.0)",
        "data": args.data,
        "model": model,
        "band": BAND,
        "compare": COMPARE,
        "curves": [curve | {"points": points}],
    }
    text = json.dumps(file, indent=2, ensure_ascii=False)
    text = re.sub(r"\[\s+([\d.][^\[\]]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text)  # a row a line
    Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(f"{args.output}: {len(points['eval_accuracy'])} points of {len(args.runs)} seeds")


def check_alike(runs: Sequence[Path]) -> tuple[dict, dict]:
    """The flags that the runs share, and the model they are of. Raises `UserError` where they are no seeds of one recipe."""
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run given: a band takes two or more, with different seeds")
    files = ("pretrain_config.yaml", "config.json", METRICS_FILE)
    if missing := [str(run / name) for run in runs for name in files if not (run / name).exists()]:
        raise UserError(f"{missing[0]} is missing: give the folders of finished runs")
    flags = [yaml.safe_load((run / files[0]).read_text(encoding="utf-8")) for run in runs]
    models = [json.loads((run / files[1]).read_text(encoding="utf-8")) for run in runs]
    for run, own, model in zip(runs, flags, models, strict=True):
        for name, ours, theirs in [(n, own.get(n), flags[0].get(n)) for n in SAME] + [
            (n, model.get(n), models[0].get(n)) for n in MODEL_KEYS
        ]:
            if ours != theirs:
                raise UserError(f"{run}: {name} is {ours}, that of {runs[0]} {theirs}; give runs alike but for --seed")
    if len({own["seed"] for own in flags}) < len(runs):
        raise UserError("two of the runs have the same --seed: they are no spread")
    return flags[0], {name: models[0][name] for name in MODEL_KEYS} | {name: flags[0][name] for name in FLAGS}


def find_band(runs: Sequence[Sequence[dict]]) -> dict[str, list[list[float]]]:
    """Measure → (hours, low, mean, high) of the runs' validations, at the hours of the first run's that all have heard.

    Raises `UserError` where a run has no validations without NaN.
    """
    names = [f"eval_{name}" for name in MEASURES]
    found = [[record for record in records if "eval_accuracy" in record] for records in runs]
    validations = [[record for record in records if has_finite(record, *names)] for records in found]
    if left_out := sum(map(len, found)) - sum(map(len, validations)):
        print(f"{left_out} validations are left out, as not all of their measures are finite")
    if not all(validations):
        raise UserError("a run has no finite validations: give runs with --validation_data")
    heard = [np.array([record["audio_hours"] for record in records]) for records in validations]
    start, end = max(hours[0] for hours in heard), min(hours[-1] for hours in heard)
    grid = heard[0][(heard[0] >= start * 0.999) & (heard[0] <= end * 1.001)]  # seeds crop a little differently
    grid = grid[np.unique(np.linspace(0, len(grid) - 1, min(MOST_POINTS, len(grid))).round().astype(int))]
    n, points = len(runs), {}
    for measure in names:
        values = np.array(
            [
                np.interp(np.log(grid), np.log(hours), [record[measure] for record in records])
                for hours, records in zip(heard, validations, strict=True)
            ]
        )
        mean, variance = values.mean(0), values.var(0, ddof=1)
        pooled = np.array([variance[max(0, k - 2) : k + 3].mean() for k in range(len(grid))])
        spread = DEVIATIONS * np.sqrt(pooled * (1 + 1 / n))
        rows = np.stack([grid, np.maximum(mean - spread, 0), mean, mean + spread], axis=1)
        points[measure] = [[float(f"{value:.4g}") for value in row] for row in rows]
    return points


if __name__ == "__main__":
    run_script(main)
