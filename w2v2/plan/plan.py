"""The plan of a run: all that is known before its first update."""

import contextlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import LATENT_STRIDE, Cursor, EffectiveBatches, count_slots, find_size
from w2v2.data.cutting import cut
from w2v2.data.sampling import build_batches, build_order
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.model.loading import make_model
from w2v2.model.pretraining import PretrainingModel
from w2v2.plan.budget import describe_budget, propose_run
from w2v2.plan.description import describe, name_source
from w2v2.plan.preflight import Machine, Preflight, find_warnings
from w2v2.plan.spot_checks import inspect_manifests, measure_reading
from w2v2.train.durable import write_file
from w2v2.train.launch import on_main_process
from w2v2.train.log import announce
from w2v2.train.run_folder import find_remains

NUM_LENGTHS = 24  # bins of a histogram
ASSUMED_SECONDS = 200.0  # of a micro-batch whose size is still to be found
FEWEST_UPDATES, FEWEST_UTTERANCES = 8, 2_000  # that the figures of a batch are means over
GIGABYTE = 1e9

Data = dict[str, tuple[Utterances, list[dict]]]  # flag → its utterances, and the files that could not be measured


@dataclass
class RunPlan:
    """Says what a run will do, before the model is there in a dry run, else once its micro-batch is found."""

    args: Any
    config: Any
    accelerator: Accelerator
    data: Data

    def present(self, micro_batch_seconds: float | None, probe: dict[str, float] | None = None) -> None:
        """Print the plan, and write plan.json into the run's folder. Call on all ranks.

        A dry run looks into a sample of the files of every manifest besides, and writes dry_run.json where a run lies
        whose plan.json is to stay. Raises `UserError` where the run would stop.
        """
        on_main_process(self.accelerator, lambda: self._present(self.make(micro_batch_seconds, probe)))

    def _present(self, plan: dict[str, Any]) -> None:
        args, looks, folder, name = self.args, {}, Path(self.args.output_dir), "plan.json"
        if args.dry_run:
            looks = {
                flag: inspect_manifests(flag, *found, args.max_skipped_fraction) for flag, found in self.data.items()
            }
            plan["looked_at"] = {flag: counts for flag, (counts, _, _) in looks.items()}
            name = "dry_run.json" if find_remains(folder) else name
        folder.mkdir(parents=True, exist_ok=True)
        lines = [describe(plan), *(line for _, lines, _ in looks.values() for line in lines)]
        lines += (
            [f"written       {folder / name}: a run lies there, whose plan.json stays"] if name != "plan.json" else []
        )
        announce(self.accelerator, "\n".join(lines))
        write_file(folder / name, (json.dumps(plan, indent=2) + "\n").encode())
        for problem in filter(None, (problem for _, _, problem in looks.values())):
            raise UserError(problem)

    def make(self, micro_batch_seconds: float | None, probe: dict[str, float] | None = None) -> dict[str, Any]:
        """The plan, as in plan.json."""
        args, config, num_ranks = self.args, self.config, self.accelerator.num_processes
        training, validation = (self.data.get(flag, (None, []))[0] for flag in ("train_data", "validation_data"))
        plan = make_plan(training, build_batches(training, args), args, num_ranks, micro_batch_seconds)
        plan |= {"validation": summarize(validation)} if validation else {}
        plan["resources"] = find_resources(args, config, plan, self.accelerator)
        plan["budget"] = describe_budget(plan["hours_to_hear"], args, config)
        plan |= {"probe": probe} if probe else {}
        if args.gpu_hours and probe:
            plan["proposal"] = propose_run(args.gpu_hours, plan, args, config)
        plan |= {"reading": measure_reading(training, args.crop_seconds)} if args.dry_run else {}
        run = Preflight(plan, args, config, Machine.find(self.accelerator), training, validation)
        run.size_is_found = micro_batch_seconds is not None
        notes = [line for found, _ in self.data.values() for line in found.warnings]
        plan["warnings"] = find_warnings(run)
        plan["warnings"] += [{"code": "manifest", "message": line, "remedy": ""} for line in notes]
        return plan


def make_plan(
    utterances: Utterances, batches: EffectiveBatches, args, num_ranks: int, micro_batch_seconds: float | None
) -> dict[str, Any]:
    """What the run would do, as in plan.json; the figures of a batch are means over the first ones.

    A micro-batch size that is still to be found (None) is assumed, as at least the longest crop's.
    """
    seconds = micro_batch_seconds or max(ASSUMED_SECONDS, batches.longest / SAMPLING_RATE)
    micro_batch_samples = round(seconds * SAMPLING_RATE)
    batches.check_budget(micro_batch_samples)
    size = find_size(batches, num_ranks, micro_batch_samples)
    cursor, rounds, samples, computed, num_drawn = Cursor(), [], [], 0, 0
    while len(rounds) < args.max_steps and (len(rounds) < FEWEST_UPDATES or num_drawn < FEWEST_UTTERANCES):
        crops, cursor = batches.draw(cursor)
        slots = np.sort(count_slots(crops.num_samples))[::-1]
        num_rounds, pieces = cut(slots, num_ranks, count_slots(micro_batch_samples))
        rounds.append(num_rounds)
        samples.append(int(crops.num_samples.sum()))
        computed += LATENT_STRIDE * (len(pieces) * size.slots if args.cuda_graph else int(slots.sum()))
        num_drawn += len(slots)
    heard_samples, whole_samples = _epoch_samples(utterances, batches)
    updates_per_epoch, batch_hours = heard_samples / np.mean(samples), float(np.mean(samples)) / SAMPLING_RATE / 3600
    plan = summarize(utterances) | {
        "max_steps": args.max_steps,
        "batch_hours": batch_hours,
        "hours_to_hear": args.max_steps * batch_hours,
        "micro_batch_seconds": seconds,
        "micro_batches_per_update": float(np.mean(rounds)),
        "micro_batch_size": size._asdict(),
        "updates_per_epoch": updates_per_epoch,
        "epochs": args.max_steps / updates_per_epoch,
        "cropped_fraction": 1.0 - heard_samples / whole_samples,
        "padded_fraction": 1.0 - sum(samples) / computed,
        "num_processes": num_ranks,
    }
    if utterances.sources:
        sources = batches.order.summarize()
        plan["sources"] = [s | {"repetitions": s["repetitions_per_epoch"] * plan["epochs"]} for s in sources]
    return plan | ({"streaming": utterances.shards.summarize()} if utterances.shards else {})


def _epoch_samples(utterances: Utterances, batches: EffectiveBatches) -> tuple[float, float]:
    """Samples that an epoch hears, and those of the same utterances before they are cropped."""
    if not (sources := utterances.sources):
        return float(batches.heard_samples), float(utterances.num_samples.sum(dtype=np.int64))
    heard, whole = zip(*((source.heard_samples, source.num_samples) for source in sources), strict=True)
    return float(batches.order.repetitions @ heard), float(batches.order.repetitions @ whole)


def summarize(utterances: Utterances) -> dict[str, Any]:
    """How much there is, and what was left out of it."""
    dropped = {reason: count for reason, count in utterances.dropped.items() if count}
    hours = {reason: hours for reason, hours in utterances.dropped_hours.items() if reason in dropped}
    size = {"utterances": len(utterances.num_samples), "hours": utterances.hours}
    counts, edges = np.histogram(utterances.num_samples / SAMPLING_RATE, NUM_LENGTHS)
    size |= {"lengths": {"seconds": edges.round(3).tolist(), "utterances": counts.tolist()}}
    size |= {"dropped": dropped, "dropped_hours": hours, "passed_over": utterances.passed_over}
    return size | ({"sources": [s.summarize() for s in utterances.sources]} if utterances.sources else {})


def find_resources(args, config, plan: dict[str, Any], accelerator: Accelerator) -> dict[str, float]:
    """What the run takes of the disk, and at least of a device's memory: weights, gradients and two moments in float32.

    A checkpoint holds weights and moments. While one is written, the one that it replaces is still there. What earlier
    checkpoints of this run and copies of shards hold counts as free. Copies count where they share the run's disk.
    """
    with torch.device("meta"):
        model = make_model(PretrainingModel, config)
    if args.freeze_feature_encoder:
        model.freeze_feature_encoder()
    number, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    checkpoint = (4 * number + 8 * trained) / GIGABYTE
    saves = math.ceil(args.max_steps / args.save_steps)
    kept = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves
    folder, streaming, copies = Path(args.output_dir), plan.get("streaming", {}), 0.0
    disk = find_existing(folder)
    free = shutil.disk_usage(disk).free / GIGABYTE + len(list(folder.glob("checkpoint-*"))) * checkpoint
    cache = Path(streaming.get("cache_dir") or folder)
    if streaming.get("cache_dir") and find_existing(cache).stat().st_dev == disk.stat().st_dev:
        copies = streaming["cache_gigabytes"]
        with contextlib.suppress(FileNotFoundError):  # another run may evict one meanwhile
            free += min(copies, sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / GIGABYTE)
    shards = accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1
    return {
        "parameters": number,
        "checkpoint_gb": checkpoint,
        "checkpoints": kept,
        "disk_gb": kept * checkpoint + 4 * number / GIGABYTE + copies,
        "free_disk_gb": free,
        "memory_gb": (4 * number + 4 * trained + 8 * trained / shards) / GIGABYTE,  # FSDP2 spreads the moments alone
    }


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def describe_mixture(utterances: Utterances, args) -> str:
    """The sources and their shares of what is heard, for a model card; "" where there are none."""
    sources = build_order(utterances, args).summarize() if utterances.sources else []
    return "; ".join(f"{name_source(source)}: {source['hours']:,.2f} h, {source['share']:.1%}" for source in sources)


def write_config(args, micro_batch_seconds: float) -> None:
    """Write `pretrain_config.yaml`: the flags to repeat the run with, and the size that was found, to cut it alike."""
    once = "overwrite_output_dir resume_from_checkpoint accept_changed_batches dry_run probe_updates gpu_hours".split()
    flags = {name: value for name, value in vars(args).items() if name not in once}
    text = yaml.safe_dump(flags | {"micro_batch_seconds": micro_batch_seconds}, sort_keys=False, allow_unicode=True)
    (Path(args.output_dir) / "pretrain_config.yaml").write_text(text, encoding="utf-8")
