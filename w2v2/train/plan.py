"""The plan of a run: all that is known before its first update."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches
from w2v2.data.cutting import cut, padded_sizes
from w2v2.data.utterances import Utterances
from w2v2.train.log import announce

RECOMMENDED_BATCH_HOURS = 1.6
ASSUMED_SECONDS = 200.0  # of a micro-batch whose size is still to be found


def build_batches(utterances: Utterances, args, seed: int | None = None) -> EffectiveBatches:
    """The flags in hours and seconds, as samples; drawn by `seed`, or by that of the flags."""
    return EffectiveBatches(
        utterances.num_samples,
        batch_samples=round(args.batch_hours * 3600 * SAMPLING_RATE),
        crop_samples=round(args.crop_seconds * SAMPLING_RATE),
        grid_samples=round(args.length_grid_seconds * SAMPLING_RATE),
        seed=args.seed if seed is None else seed,
    )


def make_plan(
    utterances: Utterances, batches: EffectiveBatches, args, num_ranks: int, micro_batch_seconds: float | None
) -> dict[str, Any]:
    """What the run would do, as in plan.json; the figures of a batch are means over the first few.

    A micro-batch size that is still to be found (None) is assumed, as at least the longest crop's.
    """
    seconds = micro_batch_seconds or max(ASSUMED_SECONDS, batches.longest / SAMPLING_RATE)
    micro_batch_samples = round(seconds * SAMPLING_RATE)
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
        "passed_over": utterances.passed_over,
        "batch_hours": float(np.mean(samples)) / SAMPLING_RATE / 3600,
        "micro_batch_seconds": seconds,
        "micro_batches_per_update": float(np.mean(rounds)),
        "updates_per_epoch": updates_per_epoch,
        "epochs": args.max_steps / updates_per_epoch,
        "cropped_fraction": 1.0 - heard_samples / float(utterances.num_samples.sum(dtype=np.int64)),
        "padded_fraction": 1.0 - sum(samples) / float(sum(padded)),
        "num_processes": num_ranks,
    }
    of_manifests = [{"code": "manifest", "message": line} for line in utterances.warnings]
    return plan | {"warnings": _warnings(plan, args, is_found=micro_batch_seconds is not None) + of_manifests}


def _warnings(plan: dict[str, Any], args, is_found: bool) -> list[dict[str, str]]:
    per_epoch, num_left = plan["updates_per_epoch"], plan["utterances"]
    num_dropped = sum(plan["dropped"].values())
    total = num_left + num_dropped
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
        "many_dropped": num_dropped > 0.1 * total
        and f"{num_dropped} of {total} utterances are left out: {plan['dropped']}",
        "no_validation": not args.validation_data
        and "no validation_data: a run that learns nothing would show in the training figures alone",
    }
    return [{"code": code, "message": message} for code, message in warnings.items() if message]


def describe(plan: dict[str, Any]) -> str:
    """The plan for people."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in plan["dropped"].items())
    rows = [
        f"data          {plan['hours']:.2f} h in {plan['utterances']:,} utterances"
        + (f" (left out: {left_out})" if left_out else ""),
        f"update        {plan['batch_hours']:.3f} h of speech in {plan['micro_batches_per_update']:.1f} micro-batches on each of "
        f"{plan['num_processes']} device(s), {plan['padded_fraction']:.1%} padding, {plan['cropped_fraction']:.1%} cropped away",
        f"run           {plan['updates_per_epoch']:.1f} updates an epoch, {plan['epochs']:.1f} epochs",
    ]
    # The reader of manifests has said its warnings already.
    return "\n".join(rows + [f"warning       {w['message']}" for w in plan["warnings"] if w["code"] != "manifest"])


def present_plan(
    utterances: Utterances, batches: EffectiveBatches, args, accelerator: Accelerator, micro_batch_seconds: float | None
) -> None:
    """Print what the run will do, and write plan.json into its folder."""
    plan = make_plan(utterances, batches, args, accelerator.num_processes, micro_batch_seconds)
    announce(accelerator, describe(plan))
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")


def write_config(args, micro_batch_seconds: float) -> None:
    """Write `pretrain_config.yaml`: the flags to repeat the run with, and the size that was found, to cut it alike."""
    once = ("overwrite_output_dir", "resume_from_checkpoint", "accept_changed_batches", "dry_run")
    flags = {name: value for name, value in vars(args).items() if name not in once}
    text = yaml.safe_dump(flags | {"micro_batch_seconds": micro_batch_seconds}, sort_keys=False, allow_unicode=True)
    (Path(args.output_dir) / "pretrain_config.yaml").write_text(text, encoding="utf-8")
