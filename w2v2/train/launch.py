"""The processes of a run: how they start, its `Accelerator`, how they are asked to stop, and how they end.

A launch that would not do what it looks like ends here, in one line. What else can go wrong is torch's business:
torchrun's agent ends or restarts the ranks beside a failed one, and the process group times out (`--ddp_timeout`).
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedType, broadcast_object_list, parse_flag_from_env
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, register_fsdp_forward_method
from transformers.utils.logging import disable_progress_bar

from w2v2.errors import UserError, as_user_error, one_line
from w2v2.model.cpu import keep_freed

logger = logging.getLogger(__name__)

# Who says how many processes were launched; the first variable that is set counts.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
MEETING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def start_accelerator(args) -> Accelerator:
    """Devices and processes as `accelerate launch`, torchrun or srun set them; the CPU where there is no accelerator.

    Raises `UserError` for a launch that is not supported.
    """
    disable_progress_bar()  # transformers' bars would tear ours
    device = torch.accelerator.current_accelerator()
    # MPS has no float64, which norms and sums need.
    cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or device is None or device.type == "mps"
    check_environment(os.environ, cpu)
    if cpu:
        keep_freed()
    join_group(args.ddp_timeout, cpu)
    trackers = [name for name in args.report_to if name != "none"] or None
    # Gradients live in DDP's buckets and are sent once an update, beside the last backward pass. With `bf16` each
    # rank's part is rounded once, before the sum.
    hook = DDPCommunicationHookType.BF16 if args.gradient_compression == "bf16" else DDPCommunicationHookType.NO
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)
    folder = str(Path(args.output_dir) / "runs")
    accelerator = Accelerator(cpu=cpu, log_with=trackers, project_dir=folder, kwargs_handlers=[ddp])
    check_processes(accelerator, args)
    return accelerator


def check_environment(environment: Mapping[str, str], cpu: bool) -> None:
    """Raises `UserError` where the launcher's variables ask for something unsupported, or processes would not meet."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError(
            "DeepSpeed is not supported (it steps at every micro-batch, so it cannot accumulate an effective batch): launch with DDP "
            "or FSDP (configs/accelerate)"
        )
    if cpu and environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("FSDP needs accelerators: on a CPU launch with configs/accelerate/cpu_2_processes.yaml (DDP)")
    several, has_size = expected_processes(environment) > 1, "WORLD_SIZE" in environment
    if several and has_size and (missing := [name for name in MEETING if not environment.get(name)]):
        raise UserError(
            f"WORLD_SIZE is set, but {missing[0]} is not: set all of {', '.join(MEETING)}, or use `accelerate launch` or torchrun"
        )
    # `accelerate launch --cpu --num_processes 2` sets an address to meet at, and starts one process.
    if not several and not has_size and {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= environment.keys():
        raise UserError(
            "several processes were asked for, but `accelerate launch` started this one alone (as it does with --cpu): launch with "
            "configs/accelerate/cpu_2_processes.yaml, or unset MASTER_ADDR if one is meant"
        )


def expected_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher says that it started."""
    return next((int(environment[name]) for name in WORLD_SIZES if environment.get(name)), 1)


def join_group(timeout_seconds: float, cpu: bool) -> None:
    """Make the process group of several processes. Raises `UserError` where they do not find one another."""
    environment, timeout = os.environ, timedelta(seconds=timeout_seconds)
    if int(environment.get("WORLD_SIZE", 1)) == 1 or PartialState._shared_state:
        return
    # torchrun's store outlives an attempt and keeps the addresses of processes that are gone: a prefix for each.
    has_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0") if has_store else "0"
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
        store = distributed.PrefixStore(f"attempt-{attempt}", store)
        PartialState(cpu=cpu, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise UserError(
            f"rank {environment['RANK']} of {environment['WORLD_SIZE']} cannot meet the others at {environment['MASTER_ADDR']}:"
            f"{environment['MASTER_PORT']} ({str(error).strip().splitlines()[0]}): check that every process runs, that the port is free, and that "
            "the address is that of rank 0's machine"
        ) from None


def check_processes(accelerator: Accelerator, args) -> None:
    """Raises `UserError` where the processes are not those that were launched, or would not train as promised."""
    expected = expected_processes(os.environ)
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were launched but each takes itself for one of {accelerator.num_processes}: launch with one of "
            f"configs/accelerate, or set {', '.join(MEETING)} for each (docs/training.md); WORLD_SIZE=1 makes each a run of its own"
        )
    if args.gradient_compression != "none" and accelerator.device.type == "cpu":
        raise UserError(f"--gradient_compression {args.gradient_compression} needs GPUs: leave it out on a CPU")
    has_gpu = accelerator.device.type == "cuda" and torch.version.cuda is not None
    if args.fused_kernels and (not has_gpu or find_spec("triton") is None):
        missing = "the package triton" if has_gpu else "an NVIDIA GPU"
        raise UserError(f"--fused_kernels needs {missing}, and there is none here: leave it out")
    if accelerator.distributed_type == DistributedType.FSDP:
        configure_fsdp(accelerator, args)


def configure_fsdp(accelerator: Accelerator, args) -> None:
    """Set the launch's FSDP plugin to what this model needs. Raises `UserError` for what is not supported.

    The model is one group: its layers are computed outside of their modules' `forward` (`transformer.py`). Weights and
    gradients are float32 and autocast does the rest, as under DDP, so both give the same numbers.
    """
    plugin, precision = accelerator.state.fsdp_plugin, accelerator.mixed_precision
    refused = {
        "version 1 (set fsdp_version: 2, as configs/accelerate/fsdp.yaml)": plugin.fsdp_version != 2,
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        f"{precision} (use bf16 or fp32, or DDP)": precision not in ("no", "bf16"),
        "--gradient_compression, which is DDP's": args.gradient_compression != "none",
        "--micro_batch_seconds auto, which tries each device by itself": args.micro_batch_seconds is None,
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise UserError(f"FSDP is not supported with {what}")
    ours = ("activation_checkpointing", "auto_wrap_policy", "cpu_ram_efficient_loading", "ignored_modules")
    unused = ", ".join(f"fsdp_{name}" for name in ours if getattr(plugin, name))
    for name in (*ours, "mixed_precision_policy"):
        setattr(plugin, name, None)
    note = f"; not used: {unused}" if unused else ""
    accelerator.print(f"sharding      FSDP2, the whole model as one group over the devices{note}")


def prepare_model(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, bare=False):
    """Model and optimizer for this launch: the model wrapped or sharded, unless `bare`; the optimizer over its parameters."""
    if bare:
        return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(model, FSDPModule):
        model.forward = accelerator.autocast()(model.forward)  # as Accelerate does for other wrappers
        register_fsdp_forward_method(model, "code_sums")
    return model, optimizer


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """What `action` returns on the main process, on every rank. Call on all ranks; it holds them like a barrier.

    A `UserError` or a disk's error on the main process is a `UserError` on every rank, so that none is left waiting.
    """
    result = complaint = None
    if accelerator.is_main_process:
        try:
            result = action()
        except (UserError, OSError) as error:
            found = error if isinstance(error, UserError) else as_user_error(error)
            if found is None:
                raise
            complaint = str(found)
    result, complaint = broadcast_object_list([result, complaint])
    if complaint is not None:
        raise UserError(complaint)
    return result


class Stopped(Exception):
    """The run ended early because it was asked to, with a checkpoint to go on from."""


class StopRequest:
    """Watches for signals while it is entered, and for the clock (`max_hours` from now on; None: no limit).

    SIGTERM (preemption), SIGUSR1 (Slurm's warning), SIGHUP (a closed terminal) and Ctrl-C ask alike, one process for
    all; a third Ctrl-C ends the process at once. What the parent process ignores stays ignored, as under nohup.
    """

    def __init__(self, max_hours: float | None = None):
        self.max_hours = max_hours
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.signal_name: str | None = None
        self._num_interrupts = 0

    def __enter__(self) -> "StopRequest":
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 2:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        more = (
            f"; Ctrl-C {3 - self._num_interrupts} more time(s) leaves at once, unsaved"
            if number == signal.SIGINT
            else ""
        )
        logger.warning("%s: saving after this update, then leaving%s", self.signal_name, more)

    @property
    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal_name is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def reason(self) -> str:
        clock = f"--max_hours {self.max_hours:g}" if self.is_asked and self.deadline else None
        return self.signal_name or clock or "another process was asked to"


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers and leave the process group. Call on all ranks; a tracker that fails is a warning."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # TensorBoard raises here what it could not write hours ago
            logger.warning("tracker %s cannot be closed (%s)", tracker.name, one_line(error))
    accelerator.trackers = []
    leave_group()
    accelerator.end_training()


def leave_group() -> None:
    """Let gloo's threads finish before the process group is destroyed or the interpreter ends.

    The group's destructor holds the interpreter's lock while it waits for a thread that needs it (pytorch issue 56297;
    seen with torch 2.13 within 20 groups of 200).
    """
    if distributed.is_initialized():
        time.sleep(0.1)
