"""The `Accelerator`, checked: a launch that would not do what it looks like ends here."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType, DistributedType
from transformers.utils.logging import disable_progress_bar

from w2v2 import memory
from w2v2.errors import UserError


def start_accelerator(args) -> Accelerator:
    """Device, precision and processes as `accelerate launch` (or torchrun) set them; the CPU where there is no accelerator.

    Raises `UserError` for DeepSpeed and FSDP, for a launcher whose processes would not know of one another, and for an absent tracker.
    """
    disable_progress_bar()  # transformers' bars over a second's loading and saving would tear ours
    device = torch.accelerator.current_accelerator()
    cpu = args.use_cpu or device is None or device.type == "mps"  # MPS has no float64, which norms and sums need
    if cpu:
        memory.keep_freed()
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
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed steps at every micro-batch, so an effective batch cannot be accumulated under it: launch with DDP "
            "(configs/accelerate); models of this size do not need it"
        )
    if args.gradient_compression != "none" and accelerator.device.type == "cpu":
        raise UserError(
            f"--gradient_compression {args.gradient_compression} needs GPUs: on a CPU gradients are sent as they are"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "FSDP is not supported: the layers are computed outside of the modules that it shards; launch with DDP (configs/accelerate), "
            "which holds models of this size"
        )
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were launched but each believes to be one of {accelerator.num_processes}: launch with one of "
            "configs/accelerate"
        )
    installed = {getattr(tracker, "value", None) or tracker.name for tracker in accelerator.log_with}
    if missing := set(trackers) - {"all"} - installed:
        name = sorted(missing)[0]
        raise UserError(f"--report_to {name}: its package is not installed; install it, or use --report_to none")
    return accelerator


def data_parallel(gradient_compression: str) -> DistributedDataParallelKwargs:
    """DDP for an accumulated update: gradients live in the buckets that are sent, as they are or (`bf16`) in half the bytes.

    They are sent once an update, while the last micro-batch's backward pass still runs. In bf16 each rank's part is rounded once, before
    the sum.
    """
    hook = DDPCommunicationHookType.BF16 if gradient_compression == "bf16" else DDPCommunicationHookType.NO
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False, comm_hook=hook)


def device_name(device: torch.device) -> str:
    """The model of a GPU, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def start_trackers(accelerator: Accelerator, args, first_step: int) -> None:
    """Trackers write to `output_dir/runs`; on resume TensorBoard forgets what came after the checkpoint."""
    if not accelerator.log_with:
        return
    flags = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(args).items()}
    tensorboard = {"purge_step": first_step + 1} if first_step else {}
    accelerator.init_trackers(
        Path(args.output_dir).resolve().name, config=flags, init_kwargs={"tensorboard": tensorboard}
    )
