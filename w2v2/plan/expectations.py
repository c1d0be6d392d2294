"""Whether a run's curve is usual, and what more hours are worth.

`reference_curves/*.json` hold curves of public runs, and of our own recipes with their seeds, against hours heard. Each
file names its source, what its band spans and how far its measures are ours. A run is compared with curves of its own
model and masks (`MODEL_KEYS` of the configuration and `FLAGS` are equal), from fresh weights, and of at most twice or
half its effective batch. Compared is the accuracy of validations alone: in training, dropout and Gumbel noise lower it.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from w2v2.plan.budget import span_rates, study_rows, why_unknown
from w2v2.plan.description import say_hours, say_time
from w2v2.train.collapse import TIMES_GUESS
from w2v2.train.launch import on_main_process
from w2v2.train.log import METRICS_FILE, announce, read_metrics

FOLDER = Path(__file__).with_name("reference_curves")
MEASURE, GUESS = "eval_accuracy", "eval_constant_guess_accuracy"
MODEL_KEYS = "hidden_size num_hidden_layers num_codevector_groups num_codevectors_per_group num_negatives".split()
FLAGS = ("mask_time_prob", "mask_time_length")
NEAR = 2.0  # times the batch, or a part of it
REPEAT_EVERY = 20  # validations after which an unchanged verdict is said again
SEEDS_DIFFER = 0.01  # in accuracy: the standard deviation of NVIDIA's eight seeds


class Reference(NamedTuple):
    """One curve with its band."""

    name: str
    data: str
    batch_hours: float
    points: dict[str, np.ndarray]  # measure of a validation record → (points, 4): hours heard, low, middle, high

    def band_at(self, hours: float) -> tuple[float, float] | None:
        """(low, high) of accuracy between the curve's points, straight against log hours; None outside of them."""
        at, low, _, high = self.points[MEASURE].T
        if not at[0] <= hours <= at[-1]:
            return None
        low, high = (float(np.interp(math.log(hours), np.log(at), values)) for values in (low, high))
        return low, high


@functools.cache
def read_references() -> tuple[tuple[dict[str, Any], Reference], ...]:
    """Each curve of the package with what it shares with the runs that it is for."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        for curve in file["curves"]:
            points = {measure: np.array(rows, dtype=float) for measure, rows in curve["points"].items()}
            found.append((file["model"], Reference(file["name"], file["data"], curve["batch_hours"], points)))
    return tuple(found)


def find_references(config, args) -> list[Reference]:
    """The curves that a run may be compared with, those of the nearest batch first; none for continued weights."""
    if args.model_name_or_path:
        return []
    own = {name: getattr(config, name) for name in MODEL_KEYS} | {name: getattr(args, name) for name in FLAGS}
    near = [
        (distance, reference)
        for model, reference in read_references()
        if model == own
        and (distance := abs(math.log(args.batch_hours / reference.batch_hours))) <= math.log(NEAR) + 1e-3
    ]
    return [reference for _, reference in sorted(near, key=lambda pair: pair[0])]


def place_in_band(records: Sequence[Mapping[str, Any]], references: Sequence[Reference]) -> tuple[str, str] | None:
    """Where the newest validation of some records lies: a verdict, and a sentence for people.

    The verdict is `inside`, `above`, `below`, `guess` (no better than always guessing) or `unknown`. Of each validation
    the first reference judges that has its hours. None without validation or without a reference, and where the newest validation has no finite accuracy.
    """
    validations = [record for record in records if any(name.startswith("eval_") for name in record)]
    if not validations or not references or not has_finite(validations[-1], MEASURE):
        return None
    newest = validations[-1]
    hours, accuracy, (verdict, reference) = newest["audio_hours"], newest[MEASURE], _judge(newest, references)
    alike = takewhile(
        lambda one: _judge(one, references)[0] == verdict, (r for r in reversed(validations) if has_finite(r, MEASURE))
    )
    since = [record["audio_hours"] for record in alike][-1]
    if verdict == "guess":
        text = f"accuracy {accuracy:.3f} says nothing: always guessing an utterance's commonest codes earns {newest[GUESS]:.3f}"
    elif reference is None:
        ends = [reference.points[MEASURE][[0, -1], 0] for reference in references]
        first, last = (say_hours(choose(end)) for choose, end in zip((min, max), zip(*ends, strict=True), strict=True))
        text = f"{say_hours(hours)} are outside of the curves for this batch, which begin at {first} and end at {last}"
    else:
        low, high = reference.band_at(hours)
        what = f"{reference.name} ({reference.data}) with batches of {say_time(3600 * reference.batch_hours)}, {low:.3f} to {high:.3f}"
        lasting = f", since {say_hours(since)}" if since < hours else ""
        text = f"accuracy {accuracy:.3f} at {say_hours(hours)} is {verdict} the band of {what}{lasting}"
    return verdict, text


def has_finite(record: Mapping[str, Any], *names: str) -> bool:
    """Whether a record has finite values under these names (metrics.jsonl has null for others)."""
    return all(record.get(name) is not None and math.isfinite(record[name]) for name in names)


def _judge(record: Mapping[str, Any], references: Sequence[Reference]) -> tuple[str, Reference | None]:
    accuracy, hours = record[MEASURE], record["audio_hours"]
    reference = next((reference for reference in references if reference.band_at(hours)), None)
    if accuracy < TIMES_GUESS * (record.get(GUESS) or 0.0):
        return "guess", reference
    if reference is None:
        return "unknown", None
    low, high = reference.band_at(hours)
    return "below" if accuracy < low else "above" if accuracy > high else "inside", reference


class BandWatch:
    """Says after validations where the run stands: when that changes, and now and then."""

    def __init__(self, args, config, accelerator: Accelerator, first_step: int = 0):
        """`metrics.jsonl` holds what an earlier part of the run logged, up to `first_step`. Call on all ranks."""
        self.accelerator, self.references = accelerator, find_references(config, args)
        self.records, self.said = [], None
        path = Path(args.output_dir) / METRICS_FILE
        if first_step:
            logged = on_main_process(accelerator, lambda: read_metrics(path) if path.exists() else [])
            self.records = [r for r in logged if MEASURE in r and r["step"] <= first_step]

    def see(self, record: Mapping[str, Any]) -> None:
        """Take the next validation."""
        self.records.append(record)
        verdict, text = place_in_band(self.records, self.references) or (self.said, "")
        if text and (verdict != self.said or len(self.records) % REPEAT_EVERY == 0):
            announce(self.accelerator, f"curve         {text}")
            self.said = verdict


def advise_stop(records: Sequence[Mapping[str, Any]], args, config) -> list[str]:
    """What the last tenth of the hours brought, and what twice the hours are worth by the study: lines for people."""
    hours = max((record["audio_hours"] for record in records), default=0.0)
    return [line for line in (_describe_gain(records, hours), _describe_doubling(hours, args, config)) if line]


def _describe_gain(records: Sequence[Mapping[str, Any]], hours: float) -> str | None:
    """Means over the last tenth of the hours against those over the tenth before; of validations where both have some."""
    for prefix, where in (("eval_", "validation"), ("", "training")):
        names = (prefix + "accuracy", prefix + "contrastive_loss")
        known = [record for record in records if has_finite(record, *names)]
        before = [r for r in known if 0.8 * hours < r["audio_hours"] <= 0.9 * hours]
        last = [r for r in known if r["audio_hours"] > 0.9 * hours]
        if before and last:
            accuracy, loss = ([float(np.mean([r[name] for r in part])) for part in (before, last)] for name in names)
            return (
                f"the last tenth of {say_hours(hours)} changed the {where} accuracy by {accuracy[1] - accuracy[0]:+.3f} to "
                f"{accuracy[1]:.3f} (seeds of BASE differ by about {SEEDS_DIFFER}), the contrastive loss by "
                f"{loss[1] - loss[0]:+.3f} to {loss[1]:.3f}"
            )
    return None


def _describe_doubling(hours: float, args, config) -> str | None:
    """What the study has for twice the hours, or for its last doubling where the hours are more."""
    if why_unknown(args, config):
        return None
    first, last = (end(row.hours for row in study_rows()) for end in (min, max))
    if hours < first:
        return f"the study (arXiv 2402.13723) says nothing of less than {first:,.0f} h"
    start = min(hours, last / 2)
    before, after = (
        [math.sqrt(low * high) for low, high in span_rates(heard, study_rows())] for heard in (start, 2 * start)
    )
    what = "twice the hours" if hours == start else f"the study ends at {last:,.0f} h; its last doubling"
    return (
        f"{what}, from {start:,.0f} to {2 * start:,.0f} h, took BASE's word error rate from {before[0]:.1f} to {after[0]:.1f} % on "
        f"test-clean, {before[1]:.1f} to {after[1]:.1f} % on test-other (arXiv 2402.13723); it takes a new run, with its own schedule"
    )
