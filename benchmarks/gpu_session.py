"""Everything that wants a GPU, measured in one go of under ten minutes, as a section of docs/performance.md.

    python benchmarks/gpu_session.py                     # on a GPU; appends to docs/performance.md
    python benchmarks/gpu_session.py --dry_run           # the same steps with tiny shapes on any CPU, printed only

Each step is a run of update.py or loader.py in a process of its own. One that fails (out of memory, say) is reported
and the others go on; none begins when the time is nearly up.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, environment, make_parser

LARGE, PROFILE, COMPILED = "--config_name large", "--profile", "--torch_compile"
GRAPH, KERNELS = "--cuda_graph", "--fused_kernels"
PAIR = f"--pairs 3 {PROFILE}"
TUNED = "--contenders ours stock_tuned --micro_batch_seconds 800 --pairs 3"  # 75 GB of an H200
GPUS = torch.cuda.device_count()
WHOLE = "--contenders ours --lengths librispeech --batch_seconds 5760 --pairs 3"  # the method's 1.6 h
BASE_WHOLE, LARGE_WHOLE = f"{WHOLE} --micro_batch_seconds 800", f"{WHOLE} {LARGE} --micro_batch_seconds 400"
SEVERAL = "--lengths librispeech --batch_seconds 5760 --micro_batch_seconds 200 --pairs 3"
STEPS = {  # title → script and its flags, in the order of what is worth most, should the time run out
    "BASE, 800 s in 200 s": f"update.py --batch_seconds 800 {PAIR}",
    "BASE, 1.6 h in 800 s": f"update.py {BASE_WHOLE} {PROFILE}",
    "BASE, 1.6 h in 800 s, kernels": f"update.py {BASE_WHOLE} {PROFILE} {KERNELS}",
    "BASE, 1.6 h in 800 s, graph": f"update.py {BASE_WHOLE} {GRAPH}",
    **{
        f"BASE, 1.6 h in {n} s, graph, kernels": f"update.py {WHOLE} --micro_batch_seconds {n} {GRAPH} {KERNELS}"
        for n in (800, 200, 91)
    },
    "LARGE, 1.6 h in 400 s, graph, kernels": f"update.py {LARGE_WHOLE} {GRAPH} {KERNELS}",
    "BASE, 1.6 h in 800 s, compiled": f"update.py {BASE_WHOLE} {PROFILE} {COMPILED}",
    "BASE, 1,600 s in 800 s, the stock model tuned": f"update.py {TUNED} --batch_seconds 1600 --lengths librispeech",
    "LARGE, 400 s in 100 s": f"update.py {LARGE} --batch_seconds 400 --micro_batch_seconds 100 {PAIR}",
    "Files to the device": "loader.py --config_name base --num_workers 8 --micro_batch_seconds 800 --pairs 3",
    **{f"BASE, 1.6 h in {n} s": f"update.py {WHOLE} --micro_batch_seconds {n}" for n in (400, 1600, 200)},
    "LARGE, 1.6 h in 400 s": f"update.py {LARGE_WHOLE}",
    "LARGE, 1.6 h in 400 s, compiled": f"update.py {LARGE_WHOLE} {COMPILED}",
    "BASE, positional convolution of the library": f"update.py {BASE_WHOLE} --positional_conv stock",
    "BASE, attention without dropout": f"update.py {BASE_WHOLE} --config_overrides attention_dropout=0.0",
    "BASE, gradient checkpointing": f"update.py {BASE_WHOLE} --gradient_checkpointing",
    "BASE, grid of 128 frames": f"update.py {BASE_WHOLE} --length_grid_seconds 2.56",
    **{f"BASE, 1.6 h in 200 s on {n} GPUs": f"update.py {SEVERAL} --contenders ours:{n} ours" for n in {GPUS} - {0, 1}},
}
DRY = {  # later flags override a step's own, so that any CPU manages it
    "update.py": "--batch_seconds 12 --micro_batch_seconds 6 --crop_seconds 3",
    "loader.py": "--batch_hours 0.01 --micro_batch_seconds 20 --updates 2 --hours 0.05",
}


def command(step: str, dry_run: bool) -> list[str]:
    script = step.partition(" ")[0]
    flags = f"{step} {DRY[script]} --device cpu --config_name small --pairs 1" if dry_run else step
    if dry_run:  # a CPU has neither
        flags = flags.replace(GRAPH, "").replace(KERNELS, "")
    return [sys.executable, str(Path(__file__).with_name(script)), *shlex.split(flags)[1:]]


def run(step: str, dry_run: bool, seconds: float) -> tuple[str, bool]:
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
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="no step begins after this, a running one is stopped"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md", help="where to append")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is at hand: --dry_run tries the steps on the CPU")
    deadline, here, all_went_well = time.monotonic() + 60 * args.minutes, environment(), True
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    text = f"\n## {here['date'][:10]}, {here['gpu'] or here['cpu']}\n\n`{here['command']}`; {versions}.\n"
    for title, step in STEPS.items():
        tables, went_well = run(step, args.dry_run, deadline - time.monotonic())
        all_went_well &= went_well
        text += f"\n**{title}** (`{step}`)\n\n```\n{tables}\n```\n"
        if not args.dry_run:  # after every step, so that nothing measured is lost
            with args.output.open("a", encoding="utf-8") as file:
                file.write(text)
        print(text, end="", flush=True)
        text = ""
    sys.exit(not all_went_well)


if __name__ == "__main__":
    main()
