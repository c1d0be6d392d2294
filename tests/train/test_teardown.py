"""A process group that is destroyed right after an exchange: without `settle` about one in thirty hangs for ever."""

import subprocess
import sys

from ranks import REPOSITORY, environment

from w2v2.train import teardown

ROUNDS = 200
SCRIPT = """
import torch
from torch import distributed
from w2v2.train import teardown

teardown.SETTLE_SECONDS = 0.01

def live():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))  # holds the group to the end of this frame
    distributed.broadcast_object_list([0], 0)
    teardown.settle()
    distributed.destroy_process_group()

for _ in range(ROUNDS):
    live()
print("all ended")
"""


def test_a_group_that_is_left_to_settle_is_destroyed_without_hanging():
    command = [sys.executable, "-c", SCRIPT.replace("ROUNDS", str(ROUNDS))]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "all ended\n"), done.stderr


def test_one_process_alone_does_not_wait(monkeypatch):
    monkeypatch.setattr(teardown.time, "sleep", lambda seconds: 1 / 0)
    teardown.settle()
