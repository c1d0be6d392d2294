"""A rank that watches others, as `test_devices.py` launches it: steps that each end with an exchange, as updates do.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python tests/watched_ranks.py TIMEOUT STEPS [VICTIM WHAT]
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch  # noqa: E402
from torch import distributed  # noqa: E402

from w2v2.errors import UserError  # noqa: E402
from w2v2.train import heartbeat  # noqa: E402
from w2v2.train.stop import RESUMABLE, Stopped  # noqa: E402

STEP_SECONDS = 0.1
APART = ("fails apart", "slips apart", "stops apart")  # while no exchange is under way that would fail


def main(timeout: str, steps: str, victim: str = "-1", what: str = "") -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=300))
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    heartbeat.start(address, "beats", rank, size, float(timeout), keeps_store=True)
    if what in APART:
        heartbeat.GRACE_SECONDS = 1.0
    if what == "hangs unheard":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    with heartbeat.explained():
        for step in range(1, int(steps) + 1):
            heartbeat.at(f"update {step}, waiting")
            if step == 5 and rank == int(victim):
                misbehave(what)
            heartbeat.at(f"update {step}")
            time.sleep(STEP_SECONDS)
            if what not in APART:
                distributed.all_reduce(torch.ones(1))
            print(f"step {step}", flush=True)
        if what == "ends early" and rank != int(victim):
            time.sleep(3 * float(timeout))


def misbehave(what: str) -> None:
    if what.startswith("hangs"):
        time.sleep(600)
    if what.startswith("fails"):
        raise ValueError(f"a bug of its own \x1b[31m hf_{'a' * 30}")
    if what.startswith("slips"):
        raise UserError("--flag is 3: it has to be 4")
    if what.startswith("stops"):
        raise Stopped("stopped after update 5")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as slip:
        sys.exit(f"slip: {slip}")
    except Stopped:
        sys.exit(RESUMABLE)
