"""Which utterances a run hears, and what it will do with them: everything that is known before the first update."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from w2v2.audio import SAMPLING_RATE, AudioError, probe
from w2v2.batching import CHUNK, Cursor, EffectiveBatches, crop_length
from w2v2.collate import Framing
from w2v2.cutting import cut, padded_sizes
from w2v2.errors import UserError
from w2v2.manifest import read_manifests
from w2v2.table_file import hold

NUM_PROBED = 64  # files whose headers are read before a run begins
RECOMMENDED_BATCH_HOURS = 1.6
MOST_SAMPLES = 2**31 - 1  # of an utterance: lengths are int32, and offsets of crops are drawn below 2³¹


@dataclass
class Utterances:
    """The eligible utterances of some manifests."""

    table: datasets.Dataset  # id, audio, start, num_samples, …
    num_samples: np.ndarray  # (n,) int32, at 16 kHz
    dropped: dict[str, int]  # how many were left out, by reason

    @property
    def hours(self) -> float:
        return float(self.num_samples.sum(dtype=np.int64)) / SAMPLING_RATE / 3600


class SkippedAudio:
    """Unreadable files: listed once each in `skipped_audio.jsonl`, and too many of them end the run.

    A line's `step` is the update that met the file, 0 where it was met before the first one. A resumed run forgets what came after
    its checkpoint (and meets it again), so its counts are those of an uninterrupted one.
    """

    def __init__(self, output_dir, num_utterances: int, max_fraction: float, first_step: int = 0, is_main: bool = True):
        self.path = Path(output_dir) / "skipped_audio.jsonl"
        self.num_utterances, self.max_fraction, self.is_main = num_utterances, max_fraction, is_main
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        entries = [entry for line in lines if (entry := _parse(line)) and 0 < entry["step"] <= first_step]
        self.ids: set[str] = {entry["id"] for entry in entries}
        if is_main and len(entries) < len(lines):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(_line(entry) for entry in entries), encoding="utf-8")
            temporary.replace(self.path)

    def add(self, skipped: Sequence[dict[str, Any]], step: int = 0) -> None:
        """Note utterances that could not be read. Raises `UserError` beyond the tolerated fraction."""
        if not skipped:
            return
        new = {entry["id"]: entry | {"step": step} for entry in skipped if entry["id"] not in self.ids}
        self.ids |= new.keys()
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, new.values()))
        if len(self.ids) > self.max_fraction * self.num_utterances:
            first = skipped[0]
            raise UserError(
                f"{first['audio']}: {first['reason']}; {len(self.ids)} of {self.num_utterances} files cannot be read, more than "
                f"--max_skipped_fraction {self.max_fraction:g} allows: mend or remove them (listed in {self.path})"
            )


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    """None for a line that a kill cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def load_utterances(manifests: Sequence[str], args, framing: Framing) -> tuple[Utterances, list[dict]]:
    """Read manifests and leave out what is too short or too long.

    Returns: the utterances, and the files whose length had to be measured and could not. Raises `UserError` when nothing is left.
    """
    cache_dir = Path(args.output_dir) / "cache"
    table, unmeasured = read_manifests(list(manifests), data_root=args.data_root, cache_dir=cache_dir, probe=probe)
    kept, num_samples, dropped = _eligible(table, args, framing)
    dropped |= {"unreadable": len(unmeasured)}
    if not len(num_samples):
        raise UserError(
            f"{', '.join(manifests)}: no utterance is left of {len(table) + len(unmeasured)} ({dropped['too_short']} shorter than "
            f"{_least_samples(args, framing) / SAMPLING_RATE:g} s, {dropped['too_long']} longer than --max_seconds, "
            f"{len(unmeasured)} unreadable"
            + (f", the first: {unmeasured[0]['audio']}: {unmeasured[0]['reason']}" if unmeasured else "")
            + f"); lower --min_seconds, raise --crop_seconds (a mask span needs {framing.min_samples / SAMPLING_RATE:.2f} s), or "
            "give other audio"
        )
    held = hold(table, cache_dir, None if kept.all() else kept)
    return Utterances(held, num_samples, dropped), unmeasured


def _least_samples(args, framing: Framing) -> int:
    return max(math.ceil(args.min_seconds * SAMPLING_RATE), framing.min_samples)


def _eligible(table: pa.Table, args, framing: Framing) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Which rows are kept, (rows,) bool; the lengths of those, (n,) int32; and how many are too short and too long.

    Raises UserError for an utterance of 2³¹ samples (37 h) or more that `max_seconds` does not leave out.
    """
    least, most = (
        _least_samples(args, framing),
        np.inf if args.max_seconds is None else args.max_seconds * SAMPLING_RATE,
    )
    crop = round(args.crop_seconds * SAMPLING_RATE), round(args.length_grid_seconds * SAMPLING_RATE)
    masks, lengths, dropped = [], [], {"too_short": 0, "too_long": 0}
    for batch in table.to_batches(max_chunksize=CHUNK):
        num_samples = batch.column("num_samples").to_numpy()
        short = (num_samples < least) | (crop_length(num_samples, *crop) < framing.min_samples)
        long = num_samples > most
        masks.append(~short & ~long)
        if (endless := np.flatnonzero(masks[-1] & (num_samples > MOST_SAMPLES))).size:
            row = int(endless[0])
            raise UserError(
                f"utterance {batch.column('id')[row]} has {num_samples[row] / SAMPLING_RATE / 3600:.1f} h, more than "
                f"{MOST_SAMPLES / SAMPLING_RATE / 3600:.1f}: cut it into several, or leave it out with --max_seconds"
            )
        lengths.append(num_samples[masks[-1]].astype(np.int32))
        dropped["too_short"] += int(short.sum())
        dropped["too_long"] += int(long.sum())
    return np.concatenate(masks), np.concatenate(lengths), dropped


def probe_some(utterances: Utterances) -> list[dict]:
    """Read the headers of a few files, evenly spread: a wrong root or format is found before the first update."""
    rows = np.unique(np.linspace(0, len(utterances.num_samples) - 1, NUM_PROBED).astype(int))
    unreadable = []
    for row in rows:
        entry = utterances.table[int(row)]
        try:
            probe(entry["audio"])
        except AudioError as error:
            unreadable.append({"id": entry["id"], "audio": entry["audio"], "reason": error.reason})
    return unreadable


def check_validation(utterances: Utterances, unmeasured: list[dict], max_fraction: float) -> None:
    """Raises `UserError` where more of the validation set is unreadable than tolerated: its figures would mislead."""
    unreadable = unmeasured + probe_some(utterances)
    num_files = len(utterances.num_samples) + len(unmeasured)
    if len(unreadable) > max_fraction * num_files:
        first = unreadable[0]
        raise UserError(
            f"--validation_data: {first['audio']}: {first['reason']}; {len(unreadable)} of {num_files} files cannot be read, more "
            f"than --max_skipped_fraction {max_fraction:g} allows: mend or remove them"
        )


def identity(args, utterances: Utterances) -> dict[str, Any]:
    """What the effective batches depend on: a resumed run has to agree in all of it."""
    digest, lengths = hashlib.sha256(), utterances.num_samples
    for first in range(0, len(lengths), CHUNK):
        digest.update(lengths[first : first + CHUNK].astype("<i8"))
    names = ("seed", "batch_hours", "crop_seconds", "length_grid_seconds")
    masks = ("mask_time_prob", "mask_time_length", "mask_time_min_masks")
    values = {name: getattr(args, name) for name in names + masks}
    return values | {"utterances": len(lengths), "lengths_sha256": digest.hexdigest()[:16]}


def check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises `UserError` with the two values where a resumed run would draw other batches than the checkpoint's run."""
    for name, value in current.items():
        if saved.get(name) != value:
            raise UserError(
                f"{name} is {value}, but the checkpoint's run had {saved.get(name)}: its batches would change; use the old value, or "
                "start a new run from the weights with --model_name_or_path"
            )


def build_batches(utterances: Utterances, args) -> EffectiveBatches:
    """The flags in hours and seconds, as samples."""
    return EffectiveBatches(
        utterances.num_samples,
        batch_samples=round(args.batch_hours * 3600 * SAMPLING_RATE),
        crop_samples=round(args.crop_seconds * SAMPLING_RATE),
        grid_samples=round(args.length_grid_seconds * SAMPLING_RATE),
        seed=args.seed,
    )


def make_plan(utterances: Utterances, batches: EffectiveBatches, args, num_ranks: int) -> dict[str, Any]:
    """What the run would do, as in plan.json; the figures of a batch are means over the first few."""
    micro_batch_samples = round(args.micro_batch_seconds * SAMPLING_RATE)
    batches.check_budget(micro_batch_samples)
    cursor, rounds, samples, padded = Cursor(), [], [], []
    for _ in range(min(8, args.max_steps)):
        crops, cursor = batches.draw(cursor)
        lengths = np.sort(crops.num_samples)[::-1]
        num_rounds, pieces = cut(lengths, num_ranks, micro_batch_samples)
        rounds.append(num_rounds)
        samples.append(int(lengths.sum()))
        padded.append(int(padded_sizes(lengths, pieces, len(pieces)).sum()))
    heard_samples = float(batches.heard_samples)
    updates_per_epoch = heard_samples / np.mean(samples)
    plan = {
        "utterances": len(utterances.num_samples),
        "hours": utterances.hours,
        "dropped": {reason: count for reason, count in utterances.dropped.items() if count},
        "batch_hours": float(np.mean(samples)) / SAMPLING_RATE / 3600,
        "micro_batches_per_update": float(np.mean(rounds)),
        "updates_per_epoch": updates_per_epoch,
        "epochs": args.max_steps / updates_per_epoch,
        "cropped_fraction": 1.0 - heard_samples / float(utterances.num_samples.sum(dtype=np.int64)),
        "padded_fraction": 1.0 - sum(samples) / float(sum(padded)),
        "num_processes": num_ranks,
    }
    return plan | {"warnings": _warnings(plan, utterances, args)}


def _warnings(plan: dict[str, Any], utterances: Utterances, args) -> list[dict[str, str]]:
    found = {}
    if args.batch_hours < RECOMMENDED_BATCH_HOURS:
        found["small_effective_batch"] = (
            f"batch_hours is {args.batch_hours:g}: BASE needs about {RECOMMENDED_BATCH_HOURS} hours of speech an update; word error "
            "rates rise steadily below it"
        )
    if plan["updates_per_epoch"] < 1:
        found["batch_exceeds_epoch"] = (
            f"an effective batch is {1 / plan['updates_per_epoch']:.1f} times the data: it holds utterances more than once"
        )
    if args.warmup_steps >= args.max_steps:
        found["warmup_exceeds_run"] = (
            f"warmup_steps {args.warmup_steps:g} of max_steps {args.max_steps}: the learning rate never reaches its peak; a fraction "
            "such as 0.08 follows the run's length"
        )
    if args.crop_seconds > 20:
        found["long_crops"] = f"crop_seconds is {args.crop_seconds:g}: beyond 20 s memory grows and nothing is gained"
    total = len(utterances.num_samples) + sum(utterances.dropped.values())
    if sum(utterances.dropped.values()) > 0.1 * total:
        found["many_dropped"] = (
            f"{total - len(utterances.num_samples)} of {total} utterances are left out: {plan['dropped']}"
        )
    if not args.validation_data:
        found["no_validation"] = (
            "no validation_data: a run that learns nothing would show in the training figures alone"
        )
    return [{"code": code, "message": message} for code, message in found.items()]


def describe(plan: dict[str, Any]) -> str:
    """The plan for people."""
    rows = [
        f"data          {plan['hours']:.2f} h in {plan['utterances']:,} utterances"
        + (f" (left out: {', '.join(f'{n:,} {r}' for r, n in plan['dropped'].items())})" if plan["dropped"] else ""),
        f"update        {plan['batch_hours']:.3f} h of speech in {plan['micro_batches_per_update']:.1f} micro-batches on each of "
        f"{plan['num_processes']} device(s), {plan['padded_fraction']:.1%} padding, {plan['cropped_fraction']:.1%} cropped away",
        f"run           {plan['updates_per_epoch']:.1f} updates an epoch, {plan['epochs']:.1f} epochs",
    ]
    return "\n".join(rows + [f"warning       {w['message']}" for w in plan["warnings"]])


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` for people and programs alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
