"""Warnings before a run: what is unusual in its settings, its data and its machine, and what to do about it.

Settings are judged by the recipe for the model's size: a small model is not held to BASE's.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from w2v2.data.utterances import Utterances
from w2v2.plan import data_checks, recipe_checks
from w2v2.plan.recipe_checks import Found
from w2v2.plan.spot_checks import NUM_TIMED
from w2v2.train.launch import expected_processes
from w2v2.train.recipes import Recipe
from w2v2.train.schedule import num_warmup_steps

MOST_WAITING = 0.1  # of the time of the probe's updates
GPU_SPEED = 1_100.0  # seconds of audio a second: BASE on an A100, by NVIDIA's figures


@dataclass
class Machine:
    """The devices of a run, and the cores that feed them."""

    device: str  # its type
    precision: str = "no"  # Accelerate's mixed precision
    has_bf16: bool = True
    processes_here: int | None = 1  # of this run, that share the cores; None: not known
    cores: int = 1
    omp_threads: int | None = None  # OMP_NUM_THREADS; None: not set

    @classmethod
    def find(cls, accelerator: Accelerator) -> "Machine":
        device, threads = accelerator.device.type, os.environ.get("OMP_NUM_THREADS", "")
        has_bf16 = device == "cpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
        all_cores = os.cpu_count() or 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or (1 if expected_processes(os.environ) == 1 else None)
        if cores < all_cores:
            here = 1  # a scheduler gave this process its own
        omp_threads = int(threads) if threads.isdecimal() else None
        return cls(device, accelerator.mixed_precision, has_bf16, here, cores, omp_threads)


@dataclass
class Preflight:
    """What the checks look at."""

    plan: dict[str, Any]  # of `make_plan`, with `resources`, and with `probe` and `reading` where they were measured
    args: Any
    config: Any
    machine: Machine
    training: Utterances
    validation: Utterances | None = None
    size_is_found: bool = True  # of the micro-batch

    @property
    def recipe(self) -> Recipe:
        return Recipe.of(self.config, self.plan["batch_hours"], self.args.max_steps)

    @property
    def model(self) -> str:
        return "a small model" if self.recipe.name == "small" else self.recipe.name

    @property
    def is_continued(self) -> bool:
        """Whether it goes on from given weights of a size that published runs have."""
        return bool(self.args.model_name_or_path) and self.recipe.name != "small"

    @property
    def warmup_steps(self) -> int:
        return num_warmup_steps(self.args.warmup_steps, self.args.max_steps)


def find_warnings(run: Preflight) -> list[dict[str, str]]:
    """The warnings of all checks, as in plan.json."""
    found = {code: check(run) for code, check in CHECKS.items()}
    return [{"code": code, "message": two[0], "remedy": two[1]} for code, two in found.items() if two]


def check_size(run: Preflight) -> Found:
    if run.size_is_found:
        return None
    found = f"micro_batch_seconds is auto: planned with {run.plan['micro_batch_seconds']:g} s; the run tries what its devices hold"
    return found, ""


def check_precision(run: Preflight) -> Found:
    if run.machine.precision != "fp16" or not run.machine.has_bf16:
        return None
    found = "mixed precision is fp16, which overflows and skips updates, on a device that computes in bf16 too"
    return found, "launch with --mixed_precision bf16"


def check_threads(run: Preflight) -> Found:
    here, threads = run.machine, run.machine.omp_threads
    if here.processes_here is None:
        return None  # of several machines, perhaps
    if threads is None:
        if here.device == "cpu" and here.processes_here == 1:
            return None  # as many threads as cores
        found = f"OMP_NUM_THREADS is not set: each of {here.processes_here} process(es) may start {here.cores} threads"
        return (
            f"{found}, which wait for one another",
            f"export OMP_NUM_THREADS={max(1, here.cores // (2 * here.processes_here))}",
        )
    if threads * here.processes_here <= here.cores:
        return None
    found = (
        f"OMP_NUM_THREADS={threads} for {here.processes_here} process(es) is more than the machine's {here.cores} cores"
    )
    return found, f"export OMP_NUM_THREADS={max(1, here.cores // here.processes_here)}"


def check_reading(run: Preflight) -> Found:
    workers, waiting = max(1, run.args.dataloader_num_workers), run.plan.get("probe", {}).get("data_wait_fraction")
    speed = run.plan.get("reading")
    remedy = f"raise --dataloader_num_workers ({run.machine.cores} cores are here), or keep the data on a local disk, packed "
    remedy += "(data_scripts/pack_audio.py)"
    if waiting is not None:
        found = f"the probe's updates waited for audio during {waiting:.0%} of their time"
        return (found, remedy) if waiting > MOST_WAITING else None
    if not speed or run.machine.device == "cpu" or speed * workers >= GPU_SPEED:
        return None
    return (
        f"one process reads and decodes {speed:,.0f} s of audio a second ({NUM_TIMED} crops, nothing else at work, perhaps from the "
        f"system's cache): --dataloader_num_workers {workers} give {speed * workers:,.0f}, and a GPU may hear {GPU_SPEED:,.0f} (BASE "
        "on an A100, by NVIDIA)",
        remedy,
    )


def check_disk(run: Preflight) -> Found:
    resources = run.plan["resources"]
    if resources["disk_gb"] <= resources["free_disk_gb"]:
        return None
    found = f"the run writes {resources['disk_gb']:.3g} GB to --output_dir, where {resources['free_disk_gb']:.3g} GB are free"
    return found, "free space, lower --save_total_limit (0 keeps all), or give another --output_dir"


CHECKS: dict[str, Callable[[Preflight], Found]] = {
    "micro_batch_auto": check_size,
    "small_effective_batch": recipe_checks.check_batch,
    "batch_exceeds_epoch": recipe_checks.check_epoch,
    "learning_rate_for_batch": recipe_checks.check_rate,
    "warmup_share": recipe_checks.check_warmup,
    "warmup_exceeds_run": recipe_checks.check_peak,
    "long_crops": recipe_checks.check_crops,
    "many_epochs": recipe_checks.check_epochs,
    "often_repeated": data_checks.check_repetitions,
    "many_dropped": data_checks.check_dropped,
    "no_validation": data_checks.check_validation,
    "validation_in_training": data_checks.check_overlap,
    "validation_weights": data_checks.check_weights,
    "one_speaker_dominates": data_checks.check_speaker,
    "silence": data_checks.check_silence,
    "fp16_without_need": check_precision,
    "omp_threads": check_threads,
    "slow_disk": check_reading,
    "disk_space": check_disk,
}
