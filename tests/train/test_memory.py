"""What training leaves in cycles is collected while it runs, however much was alive before."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from w2v2.train import memory

ROOT = Path(__file__).parents[2]
SCRIPT = """
import gc, sys
from contextlib import nullcontext
from w2v2.train import memory

libraries = [[number] for number in range(1_000_000)]
gc.collect()

class Cycle:
    alive = 0
    def __init__(self):
        self.itself, Cycle.alive = self, Cycle.alive + 1
    def __del__(self):
        Cycle.alive -= 1

with memory.settled() if sys.argv[1] == "settled" else nullcontext():
    for _ in range(30):
        update = [Cycle() for _ in range(4_000)]
        gc.collect(1)  # as if it had lived for a while
        del update
    print(Cycle.alive)
"""


def left_over(how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="its collector looks through what is old bit by bit")
def test_cycles_do_not_pile_up_behind_what_was_built_before():
    assert left_over("as it comes") == 120_000  # all of them: the collector waits for a quarter of a million objects
    assert left_over("settled") < 60_000


def test_afterwards_everything_can_be_collected_again():
    before = gc.get_freeze_count()
    with memory.settled():
        assert gc.get_freeze_count() > before
    assert gc.get_freeze_count() == 0
