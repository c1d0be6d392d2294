"""The processes of a run and its `Accelerator`: devices, precision, DDP or FSDP2, trackers.

A launch that would not do what it looks like ends here, in one line. What else can go wrong between processes is
torch's business: torchrun's agent names a failed rank and ends or restarts the others, and the process group times out
(`--ddp_timeout`).

FSDP2 shards the model as one group. The layers are computed by functions outside of their modules' `forward`
(`transformer.py`), so modules that are wrapped one by one would be used while they are sharded. Weights and gradients
are float32 and autocast does the rest, as under DDP, so both give the same numbers.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedType, broadcast_object_list, parse_flag_from_env
from torch import distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, register_fsdp_forward_method
from transformers.utils.logging import disable_progress_bar

from w2v2.errors import UserError, as_user_error, one_line
from w2v2.model.cpu import keep_freed

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Who says how many processes were launched; the first variable that is set counts.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
MEETING = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_accelerator(args) -> Accelerator:
    """Devices and processes as `accelerate launch`, torchrun or srun set them; the CPU where there is no accelerator.

    Raises `UserError` for DeepSpeed, for kinds of FSDP that are not supported, for processes that do not know of one
    another, and for a tracker whose package is missing.
    """
    disable_progress_bar()  # transformers' bars would tear ours
    device = torch.accelerator.current_accelerator()
    # MPS has no float64, which norms and sums need.
    cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or device is None or device.type == "mps"
    check_environment(os.environ, cpu)
    if cpu:
        keep_freed()
    join_group(args.ddp_timeout, cpu)
    trackers = [name for name in args.report_to if name != "none"]
    try:
        accelerator = Accelerator(
            cpu=cpu,
            log_with=trackers or None,
            project_dir=str(Path(args.output_dir) / "runs"),
            kwargs_handlers=[data_parallel(args.gradient_compression)],
        )
    except ValueError as error:
        raise UserError(f"--report_to {' '.join(trackers)}: {error}") from None
    check_processes(accelerator, args)
    installed = {getattr(tracker, "value", None) or tracker.name for tracker in accelerator.log_with}
    if missing := set(trackers) - {"all"} - installed:
        name = sorted(missing)[0]
        raise UserError(f"--report_to {name}: its package is not installed; install it, or use --report_to none")
    return accelerator


def check_environment(environment: Mapping[str, str], cpu: bool) -> None:
    """Raises `UserError` where the launcher's variables ask for something unsupported, or processes would not meet."""
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(
                f"{name} is not supported (DeepSpeed steps at every micro-batch, so it cannot accumulate an effective batch): launch "
                "with DDP or FSDP (configs/accelerate)"
            )
    if cpu and environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("FSDP needs accelerators: on a CPU launch with configs/accelerate/cpu_2_processes.yaml (DDP)")
    several = expected_processes(environment) > 1
    if several and "WORLD_SIZE" in environment and (missing := [n for n in MEETING if not environment.get(n)]):
        raise UserError(
            f"WORLD_SIZE is set, but {missing[0]} is not: set all of {', '.join(MEETING)}, or use `accelerate launch` or torchrun"
        )
    # `accelerate launch --cpu --num_processes 2` sets an address to meet at, and starts one process.
    asked_for_several = "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment
    if not several and asked_for_several and "WORLD_SIZE" not in environment:
        raise UserError(
            "several processes were asked for, but `accelerate launch` started this one alone (as it does with --cpu): launch with "
            "configs/accelerate/cpu_2_processes.yaml, or unset MASTER_ADDR if one is meant"
        )


def expected_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher says that it started."""
    return next((int(environment[name]) for name in WORLD_SIZES if environment.get(name)), 1)


def join_group(timeout_seconds: float, cpu: bool) -> None:
    """Make the process group of several processes, before Accelerate would.

    torchrun's store outlives an attempt and keeps the addresses of processes that are gone. So each attempt has a
    prefix of its own.
    Raises `UserError` where the processes do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or PartialState._shared_state:
        return
    timeout = timedelta(seconds=timeout_seconds)
    environment, attempt = os.environ, "0"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, size = next(distributed.rendezvous("env://", timeout=timeout))
        store = distributed.PrefixStore(f"attempt-{attempt}", store)
        PartialState(cpu=cpu, store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise UserError(
            f"rank {environment['RANK']} of {environment['WORLD_SIZE']} cannot meet the others at {environment['MASTER_ADDR']}:"
            f"{environment['MASTER_PORT']} ({str(error).strip().splitlines()[0]}): is every process running, the port free, and the "
            "address that of rank 0's machine?"
        ) from None


def check_processes(accelerator: Accelerator, args) -> None:
    """Raises `UserError` where the processes are not those that were launched, or would not train as promised."""
    expected = expected_processes(os.environ)
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were launched but each believes to be one of {accelerator.num_processes}: launch with one of "
            f"configs/accelerate, or set {', '.join(MEETING)} for each (docs/training.md); WORLD_SIZE=1 makes each a run of its own"
        )
    if args.gradient_compression != "none" and accelerator.device.type == "cpu":
        raise UserError(f"--gradient_compression {args.gradient_compression} needs GPUs: leave it out on a CPU")
    if accelerator.distributed_type == DistributedType.FSDP:
        configure_fsdp(accelerator, args)


def data_parallel(gradient_compression: str) -> DistributedDataParallelKwargs:
    """DDP for an accumulated update: gradients live in the buckets that are sent, as they are or (`bf16`) in half the
    bytes.

    They are sent once an update, while the last micro-batch's backward pass still runs. With `bf16` each rank's part is
    rounded once, before the sum.
    """
    hook = DDPCommunicationHookType.BF16 if gradient_compression == "bf16" else DDPCommunicationHookType.NO
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, comm_hook=hook)


def configure_fsdp(accelerator: Accelerator, args) -> None:
    """Set the launch's FSDP plugin to what this model needs, and print which of its settings are not used.

    Raises `UserError` for what is not supported.
    """
    plugin, precision = accelerator.state.fsdp_plugin, accelerator.mixed_precision
    refused = [
        (plugin.fsdp_version != 2, "version 1 (set fsdp_version: 2, as configs/accelerate/fsdp.yaml)"),
        (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "fsdp_offload_params"),
        (precision not in ("no", "bf16"), f"{precision} (use bf16 or fp32, or DDP)"),
        (accelerator.parallelism_config is not None, "a parallelism_config"),
        (args.gradient_compression != "none", "--gradient_compression, which is DDP's"),
        (args.micro_batch_seconds is None, "--micro_batch_seconds auto, which tries each device by itself"),
    ]
    for is_asked_for, what in refused:
        if is_asked_for:
            raise UserError(f"FSDP is not supported with {what}")
    ours = ("activation_checkpointing", "auto_wrap_policy", "cpu_ram_efficient_loading", "ignored_modules")
    unused = [f"fsdp_{name}" for name in ours if getattr(plugin, name)]
    for name in ours:
        setattr(plugin, name, None)
    plugin.mixed_precision_policy = None  # autocast, not casts of whole groups
    note = f"; not used: {', '.join(unused)}" if unused else ""
    num_devices = accelerator.num_processes
    accelerator.print(f"sharding      FSDP2, the whole model as one group over {num_devices} device(s){note}")


def prepare_model(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Model and optimizer for this launch: the model wrapped or sharded, the optimizer over its parameters."""
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(model, FSDPModule):
        groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert groups == [""], f"only the root may be sharded, not {groups[1:]}"
        model.forward = accelerator.autocast()(model.forward)  # as Accelerate does for other wrappers
        register_fsdp_forward_method(model, "code_sums")
    return model, optimizer


@contextlib.contextmanager
def gradient_sync(accelerator: Accelerator, model: torch.nn.Module, now: bool) -> Iterator[None]:
    """Around a micro-batch's passes: its gradient is added up locally, or (`now`) the whole sum is sent."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(now)
    with contextlib.nullcontext() if now else accelerator.no_sync(model):
        yield


def on_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
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


def lost_rank(error: BaseException) -> str | None:
    """What to say of an exchange that failed because another rank has ended or hangs; None for any other error."""
    text = str(error)
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if not isinstance(error, distributed.DistError) and "gloo" not in text:
        return None
    hangs = "another rank hangs, longer than --ddp_timeout allows" if "imed out" in text else "another rank has ended"
    return f"{hangs} ({text.splitlines()[0].rpartition('] ')[2].split('. ')[0]}): look for the first error among the ranks' lines"


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
    """Let gloo's threads finish before the process group is destroyed or the interpreter ends. Without a group it does
    nothing.

    A thread that still holds an exchange's tensors needs the interpreter's lock to let go of them. The group's
    destructor holds that lock while it waits for the thread, for ever (pytorch issue 56297; seen with torch 2.13 within
    20 groups of 200).
    """
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(0.1)
