"""Launches that would not do what they look like end with one line."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

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
    made = SimpleNamespace(distributed_type=kind, num_processes=processes, log_with=[])
    monkeypatch.setattr(launch, "Accelerator", lambda **arguments: made)
    args = SimpleNamespace(use_cpu=True, report_to=["none"], output_dir=tmp_path, gradient_compression="none")
    with pytest.raises(UserError, match=said):
        launch.start_accelerator(args)
