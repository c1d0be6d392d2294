"""Launches that would not do what they look like end with one line."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from w2v2.errors import UserError
from w2v2.train import launch

RANK = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="node1", MASTER_PORT="29500")
BY_ACCELERATE = dict(ACCELERATE_MIXED_PRECISION="no")


@pytest.mark.parametrize(
    ("environment", "cpu", "said"),
    [
        (dict(ACCELERATE_USE_DEEPSPEED="true"), False, "DeepSpeed is not supported .*DDP or FSDP"),
        (dict(ACCELERATE_USE_FSDP="true"), True, "FSDP needs accelerators"),
        (BY_ACCELERATE | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"), True, "started this one alone"),
        ({k: v for k, v in RANK.items() if k != "LOCAL_RANK"}, False, "WORLD_SIZE is set, but LOCAL_RANK is not"),
        ({k: v for k, v in RANK.items() if k != "MASTER_PORT"}, True, "WORLD_SIZE is set, but MASTER_PORT is not"),
    ],
)
def test_a_launch_that_does_something_else_is_refused(environment, cpu, said):
    with pytest.raises(UserError, match=said) as error:
        launch.check_environment(environment, cpu)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BY_ACCELERATE,
        RANK,
        RANK | BY_ACCELERATE | dict(ACCELERATE_USE_FSDP="true"),
        dict(MASTER_ADDR="127.0.0.1"),
        dict(OMPI_COMM_WORLD_SIZE="2"),
        BY_ACCELERATE | dict(WORLD_SIZE="1", MASTER_ADDR="node1"),
    ],
)
def test_other_launches_are_not_refused(environment):
    launch.check_environment(environment, cpu=False)


@pytest.mark.parametrize(
    ("variable", "size"), [("WORLD_SIZE", 4), ("SLURM_STEP_NUM_TASKS", 4), ("PMI_SIZE", 4), ("SLURM_NTASKS", 1)]
)
def test_how_many_processes_were_launched(variable, size):
    """An allocation of several tasks is not a launch of several processes, but a step of several is one."""
    assert launch.expected_processes({variable: "4"}) == size
    assert launch.expected_processes({variable: "4", "WORLD_SIZE": "2"}) == 2


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch, variable):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(variable, "2")
    made = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match="2 processes were launched but each takes itself for one of 1"):
        launch.check_processes(made, SimpleNamespace(gradient_compression="none", fused_kernels=False))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(gradient_compression="bf16", fused_kernels=False), "gradient_compression bf16 needs GPUs"),
        (dict(gradient_compression="none", fused_kernels=True), "fused_kernels needs an NVIDIA GPU"),
    ],
)
def test_what_gpus_alone_can_is_refused_elsewhere(flags, message):
    made = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1, device=torch.device("cpu"))
    with pytest.raises(UserError, match=message):
        launch.check_processes(made, SimpleNamespace(**flags))
