"""The steps of `gpu_session.py`: what is measured, in which order, and how long it should take on an H200."""

import shlex
from typing import NamedTuple

import torch
import update

START = 30.0  # seconds in which a new process imports everything and loads the GPU's libraries
BUILD = {"base": 3.0, "large": 7.0}  # seconds for model, optimizer and micro-batches
ONCE = {"--fused_kernels": 6.0, "--cuda_graph": 3.0, "--torch_compile": 50.0, "--profile": 6.0}  # seconds these add
UPDATES = 3  # of a step that are timed, after one that warms up
GPUS = torch.cuda.device_count()

GRAPH, KERNELS = "--cuda_graph", "--fused_kernels"
BOTH = f"{GRAPH} {KERNELS}"
BASE = "--contenders ours --batch_seconds 5760 --micro_batch_seconds"  # the method's 1.6 h
LARGE = f"--config_name large {BASE}"
SEVERAL = "update.py --lengths librispeech --batch_seconds 5760 --micro_batch_seconds 200 --pairs 3"


class Step(NamedTuple):
    """An update with these flags of `update.py`, or, where there is no rate, what a function of `WAYS` measures.

    The rate, audio-seconds a second, is what to expect of an H200: measured before padding went, or predicted.
    """

    title: str
    flags: str
    rate: float = 0.0
    way: str = "update"
    seconds: float = 0.0  # expected besides those of the update

    def expected(self) -> float:
        """Seconds that the step should take."""
        if not self.rate:
            return self.seconds
        flags = update.parse([*self.flags.split(), "--device", "cuda"])
        added = sum(seconds for flag, seconds in ONCE.items() if flag in self.flags)
        return BUILD[flags.config_name] + added + (1 + UPDATES) * flags.batch_seconds / self.rate

    def limit(self) -> float:
        """Seconds after which it is stopped, with the start of a process."""
        return 3 * self.expected() + 2 * START


SESSIONS = {  # in the order of what is worth most, should the time run out
    "first": (
        Step("BASE, 800 s", f"{BASE} 800 --profile", 6_700),
        Step("BASE, 800 s, kernels", f"{BASE} 800 --profile {KERNELS}", 7_400),
        Step("BASE, 800 s, graph, kernels", f"{BASE} 800 {BOTH}", 7_700),
        Step("Captured against eager", f"{BASE} 91 --batch_seconds 360 {BOTH}", way="parity", seconds=15),
        Step("BASE, 200 s", f"{BASE} 200", 2_250),
        Step("BASE, 200 s, graph, kernels", f"{BASE} 200 {BOTH}", 7_000),
        Step("BASE, 91 s", f"{BASE} 91", 1_600),
        Step("BASE, 91 s, graph, kernels", f"{BASE} 91 {BOTH}", 6_200),
        Step("BASE, 800 s, graph", f"{BASE} 800 {GRAPH}", 6_800),
        Step("Kernels and products alone", "--micro_batch_seconds 720", way="levers", seconds=25),
        Step("LARGE, 400 s", f"{LARGE} 400 --profile", 2_400),
        Step("LARGE, 400 s, graph, kernels", f"{LARGE} 400 {BOTH}", 2_900),
        Step("LARGE, 100 s, graph, kernels", f"{LARGE} 100 {BOTH}", 2_600),
        Step("Stock, tuned, BASE, 800 s", "--contenders stock_tuned --batch_seconds 1600 --micro_batch_seconds 800", 1_200),
        Step("Stock, BASE, 200 s", "--contenders stock --batch_seconds 800 --micro_batch_seconds 200", 840),
        Step("No dropout in attention", f"{BASE} 800 {BOTH} --config_overrides attention_dropout=0.0", 8_100),
    ),
    "second": (
        *(Step(f"BASE, {n} s, graph, kernels", f"{BASE} {n} {BOTH}", 7_600) for n in (400, 1600)),
        Step("BASE, 800 s, compiled", f"{BASE} 800 --profile --torch_compile", 6_700),
        Step("LARGE, 100 s", f"{LARGE} 100", 805),
        Step("LARGE, 400 s, compiled", f"{LARGE} 400 --torch_compile", 2_400),
        Step("Positional convolution of the library", f"{BASE} 800 --positional_conv stock", 6_400),
        Step("Gradient checkpointing", f"{BASE} 800 --gradient_checkpointing", 5_400),
        Step("Grid of 128 frames", f"{BASE} 800 --length_grid_seconds 2.56", 6_700),
        Step("Stock, LARGE, 100 s", "--contenders stock --config_name large --batch_seconds 400 --micro_batch_seconds 100", 158),
        Step("Files to the device", "loader.py --config_name base --num_workers 8 --micro_batch_seconds 800 --pairs 3",
             way="script", seconds=150),
        *(Step(f"BASE, 200 s on {n} GPUs", f"{SEVERAL} --contenders ours:{n} ours", way="script", seconds=80)
          for n in {GPUS} - {0, 1}),
    ),
}  # fmt: skip
TINY = "--device cpu --config_name small"  # later flags override a step's own, so that any CPU manages it
DRY = {
    "update.py": f"{TINY} --batch_seconds 12 --micro_batch_seconds 6 --crop_seconds 3 --pairs 1",
    "loader.py": f"{TINY} --batch_hours 0.01 --micro_batch_seconds 20 --updates 2 --hours 0.05 --pairs 1",
}
NOT_ON_A_CPU = (GRAPH, KERNELS, "--torch_compile")


def words(step: Step, dry_run: bool) -> list[str]:
    """The step's flags as they are given; a script's name comes first."""
    flags = step.flags
    if dry_run:
        script = flags.split()[0] if step.way == "script" else "update.py"
        flags = " ".join([flags, DRY[script]])
    return [word for word in shlex.split(flags) if not (dry_run and word in NOT_ON_A_CPU)]
