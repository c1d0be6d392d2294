"""The processes of a run brought together, and the `Accelerator`, checked: a launch that would not do what it looks like ends here."""

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, DistributedType, parse_flag_from_env
from torch.distributed import PrefixStore, Store, rendezvous
from transformers.utils.logging import disable_progress_bar

from w2v2.errors import UserError, one_line
from w2v2.model.cpu import keep_freed
from w2v2.train import heartbeat, sharding
from w2v2.train.teardown import settle

logger = logging.getLogger(__name__)

LATER_SECONDS = 60.0  # by which the process group's timeout comes after ours, which names the rank
# Who says how many processes were launched; the first one that is set is believed.
_WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RESTARTING = {"GROUP_WORLD_SIZE": 1, "TORCHELASTIC_MAX_RESTARTS": 0}
_TOGETHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_accelerator(args) -> Accelerator:
    """Device, precision and processes as `accelerate launch`, torchrun or srun set them; the CPU where there is no accelerator.

    Raises `UserError` for DeepSpeed and for FSDP of a kind that is not supported, for a launcher whose processes would not know of one
    another, and for an absent tracker.
    """
    disable_progress_bar()  # transformers' bars over a second's loading and saving would tear ours
    device = torch.accelerator.current_accelerator()
    # MPS has no float64, which norms and sums need.
    cpu = args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or device is None or device.type == "mps"
    check_environment(os.environ, cpu)
    if cpu:
        keep_freed()
    meet(args.ddp_timeout, cpu)
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
    check(accelerator, args)
    installed = {getattr(tracker, "value", None) or tracker.name for tracker in accelerator.log_with}
    if missing := set(trackers) - {"all"} - installed:
        name = sorted(missing)[0]
        raise UserError(f"--report_to {name}: its package is not installed; install it, or use --report_to none")
    return accelerator


def check_environment(environment: Mapping[str, str], cpu: bool) -> None:
    """Raises `UserError` where the launcher's variables tell of something else than several processes that meet."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise UserError(
            "DeepSpeed steps at every micro-batch, so an effective batch cannot be accumulated under it: launch with DDP or FSDP "
            "(configs/accelerate); models of this size do not need it"
        )
    if environment.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true":
        raise UserError("Megatron-LM is not supported: launch with DDP or FSDP (configs/accelerate)")
    if cpu and environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("FSDP needs accelerators: on a CPU launch with configs/accelerate/cpu_2_processes.yaml (DDP)")
    several = expected_processes(environment) > 1
    if several and "WORLD_SIZE" in environment and (missing := [n for n in _TOGETHER if not environment.get(n)]):
        raise UserError(f"WORLD_SIZE is set, but {missing[0]} is not: set all of {', '.join(_TOGETHER)}, or launch with "
                        "`accelerate launch` or torchrun")  # fmt: skip
    # For several processes on a CPU `accelerate launch` sets an address to meet at, and then starts one process.
    if not several and "MASTER_ADDR" in environment and "ACCELERATE_MIXED_PRECISION" in environment:
        if "WORLD_SIZE" not in environment:
            raise UserError(
                "several processes were asked for, but `accelerate launch` started this one alone (as it does with --cpu): launch with "
                "configs/accelerate/cpu_2_processes.yaml, or unset MASTER_ADDR if one is meant"
            )


def expected_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher says that it started."""
    return next((int(environment[name]) for name in _WORLDS if environment.get(name)), 1)


def is_restart() -> bool:
    """Whether the launcher (`--max_restarts`) has begun anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def meet(timeout_seconds: float, cpu: bool) -> None:
    """Make the process group of several processes, before Accelerate would, and let them watch one another.

    The store of a launcher that restarts keeps the addresses of processes that are no more: each attempt has keys of its own in it.
    Raises `UserError` where the processes do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or PartialState._shared_state:
        return
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_seconds + LATER_SECONDS)
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = "0" if keeps_store else os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        if rank == 0 and counts_apart(os.environ, store):
            logger.warning(
                "--max_restarts on several machines by c10d: they may count attempts differently and then not meet again; set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before the launcher, on all machines"
            )
        PartialState(
            cpu=cpu, store=PrefixStore(f"attempt-{attempt}", store), rank=rank, world_size=size, timeout=timeout
        )
        heartbeat.start(address, f"beats-{attempt}", rank, size, timeout_seconds, keeps_store)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot meet the others at {address[0]}:{address[1]} ({reason}): is "
            "every process running, the port free, and the address that of rank 0's machine?"
        ) from None


def counts_apart(environment: Mapping[str, str], store: Store) -> bool:
    """Whether several machines restart in one store of theirs, each with a count of its own: c10d's rendezvous, not the static one.

    The static one leaves the ranks that it has given out in the store.
    """
    several = all(int(environment.get(name, 0)) > least for name, least in _RESTARTING.items())
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return (
        several and shared and not store.check([f"{environment['TORCHELASTIC_RUN_ID']}/torchelastic/assigned_ranks/0"])
    )


def check(accelerator: Accelerator, args) -> None:
    """Raises `UserError` where the processes are not those that were launched, or would not train as promised."""
    expected = expected_processes(os.environ)
    if accelerator.num_processes != expected:
        raise UserError(
            f"{expected} processes were launched but each believes to be one of {accelerator.num_processes}: launch with one of "
            f"configs/accelerate, or set {', '.join(_TOGETHER)} for each of them (docs/cluster.md); WORLD_SIZE=1 makes each a run of its own"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed is not supported: launch with DDP or FSDP (configs/accelerate)")
    if args.gradient_compression != "none" and accelerator.device.type == "cpu":
        raise UserError(
            f"--gradient_compression {args.gradient_compression} needs GPUs: on a CPU gradients are sent as they are"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        sharding.settle(accelerator, args)


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


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers and destroy the process group. Call on all ranks, after their last exchange; no tracker changes how the run ends."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # TensorBoard's raises again what it could not write hours ago
            logger.warning("tracker %s cannot be closed (%s)", tracker.name, one_line(error))
    accelerator.trackers = []
    settle()
    accelerator.end_training()
