"""Everything that wants a GPU, measured in one go of under ten minutes, as a section of docs/performance.md.

    python benchmarks/gpu_session.py                     # on a GPU; appends to docs/performance.md
    python benchmarks/gpu_session.py --dry_run           # the same steps with tiny shapes on any CPU, printed only

BASE and LARGE against the stock loop; whole updates of 1.6 h, plain and compiled, in micro-batches of several sizes;
the positional convolution both ways; the stages of a micro-batch; reading files with training in the loop. Each step
is a run of update.py or loader.py in a process of its own. One that fails (out of memory, say) is reported and the
others go on; none begins when the time is nearly up.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from common import ROOT, environment, make_parser

WHOLE = 5_760  # seconds: the method's 1.6 h
MICRO_BATCHES = (400, 1600, 200)
DRY = {  # later flags override a step's own, so that any CPU manages it
    "update.py": "--batch_seconds 12 --micro_batch_seconds 6 --crop_seconds 3",
    "loader.py": "--batch_hours 0.01 --micro_batch_seconds 20 --updates 2 --hours 0.05",
}


class Step(NamedTuple):
    title: str
    script: str
    flags: str


def steps() -> list[Step]:
    """In the order of what is worth most, should the time run out."""
    pair, large = "--pairs 3 --profile", "--config_name large"
    whole = f"--contenders ours --lengths librispeech --batch_seconds {WHOLE} --pairs 3"
    whole_base, whole_large = f"{whole} --micro_batch_seconds 800", f"{whole} {large} --micro_batch_seconds 400"
    updates = {
        "BASE, 800 s in 200 s": f"--batch_seconds 800 {pair}",
        "BASE, 1.6 h in 800 s": f"{whole_base} --profile",
        "BASE, 1.6 h in 800 s, compiled": f"{whole_base} --profile --torch_compile",
        "LARGE, 400 s in 100 s": f"{large} --batch_seconds 400 --micro_batch_seconds 100 {pair}",
        **{f"BASE, 1.6 h in {n} s": f"{whole} --micro_batch_seconds {n}" for n in MICRO_BATCHES},
        "LARGE, 1.6 h in 400 s": whole_large,
        "LARGE, 1.6 h in 400 s, compiled": f"{whole_large} --torch_compile",
        "BASE, positional convolution of the library": f"{whole_base} --positional_conv stock",
        "BASE, attention without dropout": f"{whole_base} --config_overrides attention_dropout=0.0",
        "BASE, gradient checkpointing": f"{whole_base} --gradient_checkpointing",
        "BASE, grid of 128 frames": f"{whole_base} --length_grid_seconds 2.56",
    }
    found = [Step(title, "update.py", flags) for title, flags in updates.items()]
    reading = "--config_name base --num_workers 8 --micro_batch_seconds 800 --pairs 3"
    return [*found[:4], Step("Files to the device", "loader.py", reading), *found[4:]]


def command(step: Step, dry_run: bool) -> list[str]:
    flags = f"{step.flags} {DRY[step.script]} --device cpu --config_name small --pairs 1" if dry_run else step.flags
    return [sys.executable, str(Path(__file__).with_name(step.script)), *shlex.split(flags)]


def run(step: Step, dry_run: bool, seconds: float) -> tuple[str, bool]:
    """The tables that a step printed, or why there are none; and whether it went well."""
    if seconds <= 5:
        return "not begun: the time was up", False
    try:
        done = subprocess.run(command(step, dry_run), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "stopped: the time was up", False
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", False
    return done.stdout.strip().rpartition("\n")[0].strip(), True  # the last line is JSON


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU, nothing written")
    until = "no step begins after this, a running one is stopped"
    parser.add_argument("--minutes", type=float, default=9.5, help=until)
    output = ROOT / "docs" / "performance.md"
    parser.add_argument("--output", type=Path, default=output, help="where to append (default: %(default)s)")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is at hand: --dry_run tries the steps on the CPU")
    deadline, here, all_went_well = time.monotonic() + 60 * args.minutes, environment(), True
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    parts = [f"\n## {here['date'][:10]}, {here['gpu'] or here['cpu']}\n\n`{here['command']}`; {versions}.\n"]
    for step in steps():
        tables, went_well = run(step, args.dry_run, deadline - time.monotonic())
        all_went_well &= went_well
        parts.append(f"\n**{step.title}** (`{step.script} {step.flags}`)\n\n```\n{tables}\n```\n")
        if not args.dry_run:  # after every step, so that nothing measured is lost
            with args.output.open("a", encoding="utf-8") as file:
                file.write("".join(parts))
        print("".join(parts), end="", flush=True)
        parts = []
    sys.exit(not all_went_well)


if __name__ == "__main__":
    main()
