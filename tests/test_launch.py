"""Launches that would not do what they look like end with one line."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DDPCommunicationHookType, DistributedType

from w2v2 import launch
from w2v2.errors import UserError


@pytest.mark.parametrize(
    ("kind", "processes", "said"),
    [
        (DistributedType.DEEPSPEED, 1, "DeepSpeed.*launch with DDP"),
        (DistributedType.FSDP, 1, "FSDP.*launch with DDP"),
        (DistributedType.MULTI_CPU, 1, "2 processes were launched but each believes to be one of 1"),
    ],
)
def test_what_cannot_train_as_promised_is_refused(monkeypatch, tmp_path, kind, processes, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = SimpleNamespace(distributed_type=kind, num_processes=processes, log_with=[], device=torch.device("cpu"))
    monkeypatch.setattr(launch, "Accelerator", lambda **arguments: made)
    args = SimpleNamespace(use_cpu=True, report_to=["none"], output_dir=tmp_path, gradient_compression="none")
    with pytest.raises(UserError, match=said):
        launch.start_accelerator(args)


def test_gradients_cross_in_bf16_on_gpus_alone(monkeypatch, tmp_path):
    """torch's hook wants NCCL, so its numbers are not tested here: what it is asked for is."""
    assert launch.data_parallel("bf16").comm_hook == DDPCommunicationHookType.BF16
    assert launch.data_parallel("none").comm_hook == DDPCommunicationHookType.NO
    made = SimpleNamespace(
        distributed_type=DistributedType.NO, num_processes=1, log_with=[], device=torch.device("cpu")
    )
    monkeypatch.setattr(launch, "Accelerator", lambda **arguments: made)
    args = SimpleNamespace(use_cpu=True, report_to=["none"], output_dir=tmp_path, gradient_compression="bf16")
    with pytest.raises(UserError, match="gradient_compression bf16 needs GPUs"):
        launch.start_accelerator(args)
