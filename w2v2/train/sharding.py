"""FSDP2 through Accelerate, with the model as one shard group: what a rank keeps between updates is its part of weights and moments.

The layers' mathematics are functions outside of their modules' `forward` (`encoder.py`), so modules that are wrapped one by one would be
used while they are sharded. The root alone is wrapped: its forward gathers all weights, which stay until the last micro-batch of an
update has sent its gradient. Weights and gradients are float32 and autocast does the rest, as under DDP, so both give the same numbers.
"""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, register_fsdp_forward_method

from w2v2.errors import UserError

FORWARD_METHODS = ("code_sums",)  # of the model, beside `forward`


def settle(accelerator: Accelerator, args) -> None:
    """Make of the launch's FSDP settings what this model needs, and say what is not used of them.

    Raises `UserError` for what is not supported.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("FSDP1 is not supported: launch with fsdp_version: 2 (configs/accelerate/fsdp.yaml)")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("FSDP with fsdp_offload_params is not supported: leave it out (configs/accelerate/fsdp.yaml)")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"FSDP with {accelerator.mixed_precision} is not supported: use bf16 or fp32, or launch with DDP"
        )
    if accelerator.parallelism_config is not None:
        raise UserError("FSDP with a parallelism_config is not supported: shard over all devices, or launch with DDP")
    if args.gradient_compression != "none":
        raise UserError(f"--gradient_compression {args.gradient_compression} is DDP's: leave it out under FSDP")
    if args.micro_batch_seconds == "auto":
        raise UserError(
            "--micro_batch_seconds auto tries each device by itself, which a sharded model does not allow: give a number under FSDP"
        )
    ours = dict(
        auto_wrap_policy=None, activation_checkpointing=False, cpu_ram_efficient_loading=False, ignored_modules=None
    )
    unused = sorted(name for name, value in ours.items() if (getattr(plugin, name) or None) != (value or None))
    for name, value in ours.items():
        setattr(plugin, name, value)
    plugin.mixed_precision_policy = None  # autocast, not casts of whole groups
    note = f"; not used: fsdp_{', fsdp_'.join(unused)}" if unused else ""
    accelerator.print(
        f"sharding      FSDP2, the whole model as one group over {accelerator.num_processes} device(s){note}"
    )


def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """Model and optimizer for this launch: (the model wrapped or sharded, the optimizer over its parameters)."""
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(model, FSDPModule):
        groups = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert groups == [""], f"modules that are computed as functions are sharded one by one: {groups[1:]}"
        model.forward = accelerator.autocast()(model.forward)  # as Accelerate does for other wrappers
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(model, name)
    return model, optimizer


@contextlib.contextmanager
def sending(accelerator: Accelerator, model: torch.nn.Module, now: bool) -> Iterator[None]:
    """Around forward and backward pass of a micro-batch: its gradient is only added up, or (`now`) sent with all that was."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(now)
    with contextlib.nullcontext() if now else accelerator.no_sync(model):
        yield


def rest(model: torch.nn.Module) -> None:
    """Give back the gathered weights that a pass without gradient leaves behind."""
    if isinstance(model, FSDPModule):
        model.reshard()
