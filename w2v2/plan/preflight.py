"""Warnings before a run: what is unusual in its settings, its data and its machine, and what to do about it.

Settings are judged by the recipe for the model's size: a small model is not held to BASE's.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from w2v2.data.utterances import Utterances
from w2v2.plan.data_checks import check_data
from w2v2.plan.recipe_checks import Found, check_recipe
from w2v2.plan.spot_checks import NUM_TIMED
from w2v2.train.launch import expected_processes
from w2v2.train.recipes import Recipe

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
    def is_continued(self) -> bool:
        """Whether it goes on from given weights of a size that published runs have."""
        return bool(self.args.model_name_or_path) and self.recipe.name != "small"


def find_warnings(run: Preflight) -> list[dict[str, str]]:
    """The warnings of all checks, as in plan.json."""
    found = [*check_recipe(run), *check_data(run), *check_machine(run)]
    return [{"code": code, "message": message, "remedy": remedy} for code, message, remedy in found]


def check_machine(run: Preflight) -> Iterator[Found]:
    if not run.size_is_found:
        found = f"micro_batch_seconds is auto: planned with {run.plan['micro_batch_seconds']:g} s; the run tries what its devices hold"
        yield "micro_batch_auto", found, ""
    if run.machine.precision == "fp16" and run.machine.has_bf16:
        found = "mixed precision is fp16, which overflows and skips updates, on a device that computes in bf16 too"
        yield "fp16_without_need", found, "launch with --mixed_precision bf16"
    yield from check_threads(run.machine)
    yield from check_reading(run)
    resources = run.plan["resources"]
    if resources["disk_gb"] > resources["free_disk_gb"]:
        found = f"the run writes {resources['disk_gb']:.3g} GB to --output_dir, where {resources['free_disk_gb']:.3g} GB are free"
        yield "disk_space", found, "free space, lower --save_total_limit (0 keeps all), or give another --output_dir"


def check_threads(here: Machine) -> Iterator[Found]:
    threads, processes = here.omp_threads, here.processes_here
    if processes is None or (threads is None and here.device == "cpu" and processes == 1):
        return  # of several machines, perhaps; as many threads as cores
    if threads is None:
        found = f"OMP_NUM_THREADS is not set: each of {processes} process(es) may start {here.cores} threads, which wait for one another"
        yield "omp_threads", found, f"export OMP_NUM_THREADS={max(1, here.cores // (2 * processes))}"
    elif threads * processes > here.cores:
        found = f"OMP_NUM_THREADS={threads} for {processes} process(es) is more than the machine's {here.cores} cores"
        yield "omp_threads", found, f"export OMP_NUM_THREADS={max(1, here.cores // processes)}"


def check_reading(run: Preflight) -> Iterator[Found]:
    workers, plan = max(1, run.args.dataloader_num_workers), run.plan
    found, speed = "", plan.get("reading")
    if "probe" in plan:
        if (waiting := plan["probe"]["data_wait_fraction"]) > MOST_WAITING:
            found = f"the probe's updates waited for audio during {waiting:.0%} of their time"
    elif speed and run.machine.device != "cpu" and speed * workers < GPU_SPEED:
        found = (
            f"one process reads and decodes {speed:,.0f} s of audio a second ({NUM_TIMED} crops, nothing else at work, perhaps from the "
            f"system's cache): --dataloader_num_workers {workers} give {speed * workers:,.0f}, and a GPU may hear {GPU_SPEED:,.0f} "
            "(BASE on an A100, by NVIDIA)"
        )
    if found:
        more = f"raise --dataloader_num_workers ({run.machine.cores} cores are here)"
        yield "slow_disk", found, f"{more}, or keep the data on a local disk, packed (data_scripts/pack_audio.py)"
