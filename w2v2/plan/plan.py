"""The plan of a run: all that is known before its first update."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator

from w2v2.audio.crops import MAX_SHIFT, SAMPLING_RATE
from w2v2.audio.files import split_address
from w2v2.audio.inspection import INSPECTED_SECONDS, AudioFacts, inspect_files
from w2v2.data.batching import LATENT_STRIDE, Cursor, EffectiveBatches, count_slots, find_size
from w2v2.data.cutting import cut
from w2v2.data.sampling import build_batches, build_order
from w2v2.data.shards import describe_shards
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.train.log import announce

RECOMMENDED_BATCH_HOURS = 1.6
UNUSABLE = ("missing", "unreadable", "ends_early")  # kinds of files that a run skips
KINDS = (*UNUSABLE, "silent", "clipped", "resampled", "stereo_mixed", "antiphase")
MOST_REPETITIONS = 100  # in a run, of a source that is heard far more often than it would be by its hours
FAR_MORE = 5.0
ASSUMED_SECONDS = 200.0  # of a micro-batch whose size is still to be found

Data = dict[str, tuple[Utterances, list[dict]]]  # flag → its utterances, and the files that could not be measured


def make_plan(
    utterances: Utterances, batches: EffectiveBatches, args, num_ranks: int, micro_batch_seconds: float | None
) -> dict[str, Any]:
    """What the run would do, as in plan.json; the figures of a batch are means over the first few.

    A micro-batch size that is still to be found (None) is assumed, as at least the longest crop's.
    """
    seconds = micro_batch_seconds or max(ASSUMED_SECONDS, batches.longest / SAMPLING_RATE)
    micro_batch_samples = round(seconds * SAMPLING_RATE)
    batches.check_budget(micro_batch_samples)
    size = find_size(batches, num_ranks, micro_batch_samples)
    cursor, rounds, samples = Cursor(), [], []
    for _ in range(min(8, args.max_steps)):
        crops, cursor = batches.draw(cursor)
        slots = np.sort(count_slots(crops.num_samples))[::-1]
        rounds.append(cut(slots, num_ranks, count_slots(micro_batch_samples))[0])
        samples.append(int(crops.num_samples.sum()))
    heard_samples, whole_samples = _epoch_samples(utterances, batches)
    updates_per_epoch = heard_samples / np.mean(samples)
    plan = summarize(utterances) | {
        "batch_hours": float(np.mean(samples)) / SAMPLING_RATE / 3600,
        "micro_batch_seconds": seconds,
        "micro_batches_per_update": float(np.mean(rounds)),
        "micro_batch_size": size._asdict(),
        "updates_per_epoch": updates_per_epoch,
        "epochs": args.max_steps / updates_per_epoch,
        "cropped_fraction": 1.0 - heard_samples / whole_samples,
        "filler_fraction": 1.0 - sum(samples) / (sum(rounds) * num_ranks * size.slots * LATENT_STRIDE),
        "num_processes": num_ranks,
    }
    if utterances.sources:
        sources = batches.order.summarize()
        plan["sources"] = [s | {"repetitions": s["repetitions_per_epoch"] * plan["epochs"]} for s in sources]
    plan |= {"streaming": utterances.shards.summarize()} if utterances.shards else {}
    of_manifests = [{"code": "manifest", "message": line} for line in utterances.warnings]
    return plan | {"warnings": _warnings(plan, args, is_found=micro_batch_seconds is not None) + of_manifests}


def _epoch_samples(utterances: Utterances, batches: EffectiveBatches) -> tuple[float, float]:
    """Samples that an epoch hears, and those of the same utterances before they are cropped."""
    if not (sources := utterances.sources):
        return float(batches.heard_samples), float(utterances.num_samples.sum(dtype=np.int64))
    heard, whole = zip(*((source.heard_samples, source.num_samples) for source in sources), strict=True)
    return float(batches.order.repetitions @ heard), float(batches.order.repetitions @ whole)


def summarize(utterances: Utterances) -> dict[str, Any]:
    """How much there is, and what was left out of it."""
    dropped = {reason: count for reason, count in utterances.dropped.items() if count}
    size = {"utterances": len(utterances.num_samples), "hours": utterances.hours}
    size |= {"dropped": dropped, "passed_over": utterances.passed_over}
    return size | ({"sources": [s.summarize() for s in utterances.sources]} if utterances.sources else {})


def _warnings(plan: dict[str, Any], args, is_found: bool) -> list[dict[str, str]]:
    per_epoch, num_left = plan["updates_per_epoch"], plan["utterances"]
    num_dropped = sum(plan["dropped"].values())
    total = num_left + num_dropped
    repeated = [
        f"{source['name']} ({source['repetitions']:,.0f} times in the run, {source['repetitions_per_epoch']:.0f} an epoch)"
        for source in plan.get("sources", [])
        if source["repetitions"] > MOST_REPETITIONS and source["repetitions_per_epoch"] >= FAR_MORE
    ]
    warnings = {
        "micro_batch_auto": not is_found
        and f"micro_batch_seconds is auto: planned with {plan['micro_batch_seconds']:g} s; the run tries what its devices hold",
        "small_effective_batch": args.batch_hours < RECOMMENDED_BATCH_HOURS
        and f"batch_hours is {args.batch_hours:g}: BASE needs about {RECOMMENDED_BATCH_HOURS} hours of speech an update; "
        "word error rates rise steadily below it",
        "batch_exceeds_epoch": per_epoch < 1
        and f"an effective batch is {1 / per_epoch:.1f} times the data: it holds utterances more than once",
        "warmup_exceeds_run": args.warmup_steps >= args.max_steps
        and f"warmup_steps {args.warmup_steps:g} of max_steps {args.max_steps}: the learning rate never reaches its peak; "
        "a fraction such as 0.08 follows the run's length",
        "long_crops": args.crop_seconds > 20
        and f"crop_seconds is {args.crop_seconds:g}: beyond 20 s memory grows and nothing is gained",
        "often_repeated": repeated
        and f"utterances are repeated very often of source {', '.join(repeated)}: the model may learn them by heart; lower "
        "the weight, or raise --sampling_alpha_corpus or --sampling_alpha_language",
        "many_dropped": num_dropped > 0.1 * total
        and f"{num_dropped} of {total} utterances are left out: {plan['dropped']}",
        "no_validation": not (args.validation_data or args.eval_split_name)
        and "no validation_data: a run that learns nothing would show in the training figures alone",
    }
    return [{"code": code, "message": message} for code, message in warnings.items() if message]


def describe_mixture(utterances: Utterances, args) -> str:
    """The sources and their shares of what is heard, for a model card; "" where there are none."""
    sources = build_order(utterances, args).summarize() if utterances.sources else []
    return "; ".join(f"{_name(source)}: {source['hours']:,.2f} h, {source['share']:.1%}" for source in sources)


def _name(source: dict[str, Any]) -> str:
    return source["name"] + (f" ({source['language']})" if source["language"] else "")


def describe(plan: dict[str, Any]) -> str:
    """The plan for people."""
    data = {"data": plan} | ({"validation": plan["validation"]} if "validation" in plan else {})
    rows = []
    for name, part in data.items():
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in part["dropped"].items())
        row = f"{name:14}{part['hours']:.2f} h in {part['utterances']:,} utterances"
        rows.append(f"{row} (left out: {left_out})" if left_out else row)
    seconds = plan["micro_batch_size"]["slots"] * LATENT_STRIDE / SAMPLING_RATE
    draws = sum(source["draws_per_epoch"] for source in plan.get("sources", []))
    epoch = f" ({draws:,} draws, about as many hours as the sources hold)" if draws else ""
    for source in plan.get("sources", []):
        rows.append(
            f"source        {_name(source)}: {source['share']:.2%} of what is heard; {source['hours']:.2f} h in "
            f"{source['utterances']:,} utterances, each heard {source['repetitions_per_epoch']:.2f} times an epoch, "
            f"{source['repetitions']:,.1f} in the run"
        )
    rows += [
        f"update        {plan['batch_hours']:.3f} h of speech in {plan['micro_batches_per_update']:.1f} micro-batches of at most "
        f"{seconds:.1f} s on each of {plan['num_processes']} device(s), up to {plan['filler_fraction']:.1%} filler, "
        f"{plan['cropped_fraction']:.1%} cropped away",
        f"run           {plan['updates_per_epoch']:.1f} updates an epoch{epoch}, {plan['epochs']:.1f} epochs",
    ]
    rows += [describe_shards(plan["streaming"])] if "streaming" in plan else []
    # The reader of manifests has said its warnings already.
    return "\n".join(rows + [f"warning       {w['message']}" for w in plan["warnings"] if w["code"] != "manifest"])


def present_plan(data: Data, args, accelerator: Accelerator, micro_batch_seconds: float | None) -> None:
    """Print what the run will do, and write plan.json into its folder.

    A dry run looks into a sample of the files of every manifest besides. Raises `UserError` where the run would stop.
    """
    training, _ = data["train_data"]
    plan = make_plan(training, build_batches(training, args), args, accelerator.num_processes, micro_batch_seconds)
    if "validation_data" in data:
        validation, _ = data["validation_data"]
        plan["validation"] = summarize(validation)
        plan["warnings"] += [{"code": "manifest", "message": line} for line in validation.warnings]
        if any(source.weight != 1 for source in validation.sources):
            line = "weights of --validation_data play no part: every utterance is heard once"
            plan["warnings"].append({"code": "validation_weights", "message": line})
    looks = [inspect_manifests(flag, *found, args.max_skipped_fraction) for flag, found in data.items() if args.dry_run]
    if args.dry_run:
        plan["looked_at"] = {flag: counts for flag, (counts, _, _) in zip(data, looks, strict=True)}
    announce(accelerator, "\n".join([describe(plan), *(line for _, lines, _ in looks for line in lines)]))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    for _, _, problem in looks:
        if problem:
            raise UserError(problem)


def inspect_manifests(
    flag: str, utterances: Utterances, unmeasured: list[dict], max_fraction: float
) -> tuple[dict[str, dict[str, int]], list[str], str | None]:
    """Counts by kind for each manifest, a line for each, and why a run would stop (None: it would not)."""
    counts, lines, unusable = {}, [], {entry["audio"]: entry["reason"] for entry in unmeasured}
    num_looked_at = num_unusable = 0
    for manifest, rows in utterances.samples.items():
        found = defaultdict(list)
        for row, facts in zip(rows, inspect_files([row["audio"] for row in rows], INSPECTED_SECONDS), strict=True):
            for kind, detail in find_faults(row, facts):
                found[kind].append(f"{row['audio']}: {detail}")
                if kind in UNUSABLE:
                    unusable[row["audio"]] = detail
        counts[manifest] = {"files": len(rows)} | {kind: len(found[kind]) for kind in KINDS}
        num_looked_at, num_unusable = num_looked_at + len(rows), num_unusable + sum(len(found[k]) for k in UNUSABLE)
        said = [f"{len(found[kind])} {kind.replace('_', ' ')} ({found[kind][0]})" for kind in KINDS if found[kind]]
        lines.append(f"looked at     {len(rows)} files of {manifest}: {'; '.join(said) or 'nothing unusual'}")
    # A run stops where too many are known to be unusable, and sooner or later where the share of them is too large.
    is_certain = len(unusable) > max_fraction * (len(utterances.num_samples) + len(unmeasured))
    if not (is_certain or (num_unusable > 2 and num_unusable > max_fraction * num_looked_at)):
        return counts, lines, None
    (path, reason), share = next(iter(unusable.items())), f"{num_unusable} of {num_looked_at} files that were looked at"
    limit = f"more than --max_skipped_fraction {max_fraction:g} allows"
    return counts, lines, f"--{flag}: {path}: {reason}; {share} cannot be used, {limit}: a run would stop"


def find_faults(row: dict[str, Any], facts: AudioFacts) -> Iterator[tuple[str, str]]:
    """What is to be said of a row's file: the kind, and a detail for people."""
    if reason := facts.find_reason(row.get("channel")):
        yield "unreadable" if os.path.exists(split_address(row["audio"])[0]) else "missing", reason
        return
    end, length = row["start"] + (row["num_samples"] or 0) / SAMPLING_RATE, facts.num_samples
    if length is not None and end * SAMPLING_RATE > length + MAX_SHIFT:
        yield "ends_early", f"ends at {length / SAMPLING_RATE:.2f} s, its row at {end:.2f} s"
    if facts.is_silent:
        yield "silent", f"its peak is {facts.peak:.2g}"
    if facts.is_clipped:
        yield "clipped", f"many samples at its peak, {facts.peak:.2f}"
    if facts.sample_rate != SAMPLING_RATE:
        yield "resampled", f"{facts.sample_rate:,} Hz"
    if facts.channels > 1 and row.get("channel") is None:
        yield "stereo_mixed", f"{facts.channels} channels"
        if facts.is_antiphase:
            yield "antiphase", "its mix is far quieter than its channels: choose one in a column `channel`"


def write_config(args, micro_batch_seconds: float) -> None:
    """Write `pretrain_config.yaml`: the flags to repeat the run with, and the size that was found, to cut it alike."""
    once = ("overwrite_output_dir", "resume_from_checkpoint", "accept_changed_batches", "dry_run")
    flags = {name: value for name, value in vars(args).items() if name not in once}
    text = yaml.safe_dump(flags | {"micro_batch_seconds": micro_batch_seconds}, sort_keys=False, allow_unicode=True)
    (Path(args.output_dir) / "pretrain_config.yaml").write_text(text, encoding="utf-8")
