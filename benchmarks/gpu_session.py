"""Everything that wants a GPU, measured in one go of under ten minutes, as a section of docs/benchmarks.md.

    python benchmarks/gpu_session.py                     # on a GPU; appends to docs/benchmarks.md
    python benchmarks/gpu_session.py --dry_run           # anywhere: the same steps with tiny shapes on the CPU, printed only

BASE and LARGE against the stock loop; whole updates of 1.6 h, plain and compiled, in micro-batches of several sizes; the positional convolution
both ways; the stages of a micro-batch; reading files to the device with the loader in the loop. Each step is a run of update.py or loader.py in a process of its own;
one that fails (out of memory, say) is reported as failed and the others go on; none begins when the time is nearly up.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from report import environment  # noqa: E402

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"
WHOLE = 5_760  # seconds: the method's 1.6 h
MICRO_BATCHES = (400, 1600, 200)
DRY = "--device cpu --config_name small --batch_seconds 12 --micro_batch_seconds 6 --crop_seconds 3 --pairs 1"


class Step(NamedTuple):
    title: str
    script: str
    flags: str


def steps() -> list[Step]:
    """In the order of what is worth most, should the time run out."""
    pair = "--pairs 3 --profile"
    whole = f"--contenders ours --lengths librispeech --batch_seconds {WHOLE} --pairs 3"
    base, large = f"{whole} --micro_batch_seconds 800", f"{whole} --config_name large --micro_batch_seconds 400"
    return [
        Step("BASE, 800 s in 200 s", "update.py", f"--batch_seconds 800 {pair}"),
        Step("BASE, 1.6 h in 800 s", "update.py", f"{base} --profile"),
        Step("the same, compiled", "update.py", f"{base} --profile --torch_compile"),
        Step(
            "LARGE, 400 s in 100 s",
            "update.py",
            f"--config_name large --batch_seconds 400 --micro_batch_seconds 100 {pair}",
        ),
        Step(
            "Files to the device", "loader.py", "--config_name base --num_workers 8 --micro_batch_seconds 800 --pairs 3"
        ),
        *(Step(f"BASE, 1.6 h in {n} s", "update.py", f"{whole} --micro_batch_seconds {n}") for n in MICRO_BATCHES),
        Step("LARGE, 1.6 h in 400 s", "update.py", large),
        Step("the same, compiled", "update.py", f"{large} --torch_compile"),
        Step("BASE, positional convolution of the library", "update.py", f"{base} --positional_conv stock"),
        Step("BASE, attention without dropout", "update.py", f"{base} --config_overrides attention_dropout=0.0"),
        Step("BASE, gradient checkpointing", "update.py", f"{base} --gradient_checkpointing"),
        Step("BASE, grid of 128 frames", "update.py", f"{base} --length_grid_seconds 2.56"),
    ]


def command(step: Step, dry_run: bool) -> list[str]:
    """The step's command line; in a dry run later flags override the step's own, so that any CPU manages it."""
    flags = step.flags
    if dry_run and step.script == "update.py":
        flags += " " + DRY
    elif dry_run:
        flags = "--device cpu --config_name small --pairs 5 --updates 2 --hours 0.05"
    return [sys.executable, str(HERE / step.script), *shlex.split(flags)]


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


def rows_of(step: Step, found: dict | str) -> list[list[str]]:
    """Rows of the table of updates."""
    if isinstance(found, str):
        return [[step.title, found, *[""] * 5]]
    rows = []
    for result in found["results"]:
        for side in ("stock", "ours"):
            if side in result:
                one = result[side]
                ratio = result.get("ratio") if side == "ours" else None
                rows.append([
                    step.title, result["lengths"], side, f"{one['audio_seconds_per_second']['median']:,.0f}",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else "",
                    f"{one['peak_gb']:.1f}", f"{one['mfu']:.1%}" if one["mfu"] else f"{one['tflops']:.3g} TFLOP/s",
                ])  # fmt: skip
    return rows


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [headers, ["---"] * len(headers), *rows])


def section(done: list[tuple[Step, dict | str]]) -> str:
    """The session as Markdown."""
    here = environment()
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items() if number)
    parts = [f"## {here['date'][:10]}, {here['gpu'] or here['cpu']}\n", f"`{here['command']}`; {versions}.\n"]
    updates = [row for step, found in done if step.script == "update.py" for row in rows_of(step, found)]
    parts.append(markdown(["step", "lengths", "side", "audio-s/s", "ratio (min–max)", "peak GB", "MFU"], updates))
    for step, found in done:
        if isinstance(found, dict) and found.get("stages"):
            sides = list(found["stages"])
            names = list(dict.fromkeys(name for table in found["stages"].values() for name in table))
            rows = [
                [name, *(f"{found['stages'][side].get(name, float('nan')):,.1f}" for side in sides)] for name in names
            ]
            parts.append(f"\n{step.title}: µs for each second of audio, forward and backward\n")
            parts.append(markdown(["stage", *sides], rows))
        if step.script == "loader.py":
            keys = ("pcm_over_flac", "wait_fraction")
            said = found if isinstance(found, str) else ", ".join(f"{key} {found[key]:.3g}" for key in keys)
            parts.append(f"\n{step.title}: {said}")
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU, nothing written")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="no step begins after this, and a running one is stopped"
    )
    parser.add_argument(
        "--output", type=Path, default=DOCUMENT, help="where the section is appended (default: %(default)s)"
    )
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is at hand: --dry_run tries the steps on the CPU")
    deadline, done = time.monotonic() + 60 * args.minutes, []
    before = (
        args.output.read_text(encoding="utf-8").rstrip("\n") + "\n\n" if args.output.exists() else "# Benchmarks\n\n"
    )
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
