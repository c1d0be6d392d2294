"""Everything that wants a GPU, measured in one go of under ten minutes, as a section of docs/performance.md.

    python benchmarks/gpu_session.py                     # on a GPU; appends to docs/performance.md
    python benchmarks/gpu_session.py --dry_run           # the same steps with tiny shapes on any CPU, printed only

BASE and LARGE against the stock loop; whole updates of 1.6 h, plain and compiled, in micro-batches of several sizes;
the positional convolution both ways; the stages of a micro-batch; reading files with training in the loop. Each step
is a run of update.py or loader.py in a process of its own. One that fails (out of memory, say) is reported and the
others go on; none begins when the time is nearly up.
"""

import json
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


def run(step: Step, dry_run: bool, seconds: float) -> dict | str:
    """What the step's last line says, or why there is none."""
    try:
        done = subprocess.run(command(step, dry_run), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "stopped: the time was up"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    return json.loads(lines[-1])


def update_rows(step: Step, found: dict | str) -> list[list[str]]:
    """Rows of the table of updates."""
    if isinstance(found, str):
        return [[step.title, found, *[""] * 5]]
    rows = []
    for result in found["results"]:
        for side in ("stock", "ours"):
            if one := result.get(side):
                ratio = result.get("ratio") if side == "ours" else None
                spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else ""
                speed, use = one["audio_seconds_per_second"]["median"], one["mfu"]
                use = f"{use:.1%}" if use else f"{one['tflops']:.3g} TFLOP/s"
                rows.append(
                    [step.title, result["lengths"], side, f"{speed:,.0f}", spread, f"{one['peak_gb']:.1f}", use]
                )
    return rows


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [headers, ["---"] * len(headers), *rows])


def section(done: list[tuple[Step, dict | str]]) -> str:
    """The session as Markdown."""
    here = environment()
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    parts = [f"## {here['date'][:10]}, {here['gpu'] or here['cpu']}\n", f"`{here['command']}`; {versions}.\n"]
    rows = [row for step, found in done if step.script == "update.py" for row in update_rows(step, found)]
    parts.append(markdown(["step", "lengths", "side", "audio-s/s", "ratio (min–max)", "peak GB", "MFU"], rows))
    for step, found in done:
        if isinstance(found, dict) and (stages := found.get("stages")):
            names = next(iter(stages.values()))
            rows = [[name, *(f"{table[name]:,.1f}" for table in stages.values())] for name in names]
            parts.append(f"\n{step.title}: µs for each second of audio, forward and backward\n")
            parts.append(markdown(["stage", *stages], rows))
        if step.script == "loader.py":
            keys = ("pcm_over_flac", "wait_fraction")
            said = found if isinstance(found, str) else ", ".join(f"{key} {found[key]:.3g}" for key in keys)
            parts.append(f"\n{step.title}: {said}")
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU, nothing written")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="no step begins after this, a running one is stopped"
    )
    output = ROOT / "docs" / "performance.md"
    parser.add_argument("--output", type=Path, default=output, help="where to append (default: %(default)s)")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is at hand: --dry_run tries the steps on the CPU")
    deadline, done = time.monotonic() + 60 * args.minutes, []
    before = args.output.read_text(encoding="utf-8").rstrip() + "\n\n" if args.output.exists() else ""
    for step in steps():
        left = deadline - time.monotonic()
        found = run(step, args.dry_run, left) if left > 5 else "not begun: the time was up"
        print(f"{step.title}: {found if isinstance(found, str) else 'done'}", flush=True)
        done.append((step, found))
        if not args.dry_run:  # after every step, so that nothing measured is lost
            args.output.write_text(before + section(done), encoding="utf-8")
    print("\n" + section(done))
    sys.exit(any(isinstance(found, str) for _, found in done))


if __name__ == "__main__":
    main()
