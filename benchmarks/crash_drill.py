"""A run killed again and again, and what it leaves compared with an undisturbed one's, byte by byte.

    python benchmarks/crash_drill.py --kills 20                  # one run, killed 20 times; the rest of its time it resumes
    python benchmarks/crash_drill.py --world_sizes 2 1 2         # one run, resumed with other numbers of processes

SIGKILL to the whole process group, loader workers included, at seeded random moments over the run's whole length: while it starts, in
updates, in validation, between two writes of a save, between a checkpoint's renaming and the removal of the oldest, in that removal, and
while the finished model is written. Each time the same command is given again, with `--resume_from_checkpoint auto`. Dropout, layerdrop and
Gumbel noise are on; it runs on the CPU in fp32. The disk is made slow (drilled.py), so that kills do fall between its writes. The last
line is JSON; exit status 1 if anything differs, 2 for a slip in the flags.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "data_scripts"),
]

import numpy as np  # noqa: E402
from corpus_files import Parser, exit_status  # noqa: E402
from drill_runs import (  # noqa: E402
    RECIPE,
    Failed,
    Life,
    Look,
    Watch,
    changed_batches,
    differing_bytes,
    heard,
    left_behind,
    prepare,
)
from report import environment, json_line  # noqa: E402
from world_sizes import drill_worlds  # noqa: E402

from w2v2.errors import UserError  # noqa: E402

AIMS = ("save", "update", "validation", "save", "start-up", "renamed", "save", "rotation", "update", "save")  # in turn
AUTO = ("--resume_from_checkpoint", "auto")
POLL_SECONDS = 0.001
SLOW_DISK_MS = 20
SAVE_SECONDS = 12 * SLOW_DISK_MS / 1000  # about as long as a save takes on the slow disk


class Aim(NamedTuple):
    """When a life is to be killed."""

    phase: str
    step: int  # not before this update
    delay: float  # seconds after the phase is seen


def draw_aims(num_kills: int, max_steps: int, start_seconds: float, rng: np.random.Generator) -> list[Aim]:
    """Phases in turn, at steps that rise over the run's whole length; the last kill is for the finishing."""
    lengths = {
        "start-up": start_seconds,
        "save": SAVE_SECONDS,
        "update": 0.2,
        "validation": 0.1,
        "rotation": SAVE_SECONDS / 3,
        "finish": 1.0,
    }
    aims = []
    for number in range(num_kills):
        phase = AIMS[number % len(AIMS)] if number < num_kills - 1 or num_kills < 3 else "finish"
        step = int((number + rng.random()) / num_kills * (max_steps - RECIPE["eval_steps"]))
        aims.append(Aim(phase, step, float(rng.uniform(0, lengths.get(phase, 0.0)))))
    return aims


def is_in(phase: str, look: Look | None, step: int, max_steps: int) -> bool:
    """Whether a run that looks so is in this phase, `step` updates done at least."""
    if phase == "start-up":
        return True
    if look is None or look.step < step:
        return False
    return {
        "update": True,
        "save": look.is_saving,
        "validation": look.evaluated < look.step and look.step % RECIPE["eval_steps"] == 0,
        "renamed": look.has_saved and len(look.checkpoints) > RECIPE["save_total_limit"],
        "rotation": look.is_removing,
        "finish": look.step == max_steps and max_steps in look.checkpoints,
    }[phase]


def fell_into(look: Look | None, max_steps: int) -> str:
    """The phase that a killed run was in, from what it left."""
    if look is None:
        return "start-up"
    for phase in ("rotation", "save", "renamed", "finish", "validation"):
        if is_in(phase, look, 0, max_steps):
            return phase
    return "update"


def live(recipe: Path, output_dir: Path, aim: Aim, record: Path, max_steps: int, deadline: float) -> str | None:
    """A life, from its start or its last checkpoint up to its killing. Returns where the kill fell; None: it had ended before."""
    watch = Watch(output_dir)
    with Life(recipe, output_dir, *AUTO, drilled=("--slow_disk_ms", SLOW_DISK_MS, "--record", record)) as life:
        if not life.until(lambda: is_in(aim.phase, watch.look(), aim.step, max_steps), deadline):
            return None
        kill_at = aim.delay + (life.started if aim.phase == "start-up" else time.monotonic())
        if not life.until(lambda: time.monotonic() >= kill_at, deadline):
            return None
        life.kill()
    return fell_into(watch.look(), max_steps)


def undisturbed(recipe: Path, folder: Path, deadline: float) -> float:
    """A run in `folder/whole` from its beginning to its end. Returns the seconds before its first update."""
    watch = Watch(folder / "whole")
    with Life(recipe, folder / "whole", drilled=("--record", folder / "heard_whole")) as life:
        life.until(lambda: watch.look() is not None, deadline)
        seconds = time.monotonic() - life.started
        life.finish(deadline)
    return seconds


def drill_kills(args, folder: Path, deadline: float) -> dict:
    """`args.kills` kills in one run; what it left and heard, beside an undisturbed run."""
    recipe = prepare(folder, args.manifest, args.data_root, max_steps=args.max_steps, seed=args.seed)
    start_seconds = undisturbed(recipe, folder, deadline)
    print(f"undisturbed   {args.max_steps} updates, {start_seconds:.1f} s before the first", flush=True)
    output_dir, phases, lives = folder / "killed", Counter(), []
    aims = draw_aims(args.kills, args.max_steps, start_seconds, np.random.default_rng(args.seed))
    missed = 0
    while aims:
        lives.append(folder / f"heard_{len(lives)}")
        phase = live(recipe, output_dir, aims[0], lives[-1], args.max_steps, deadline)
        if phase is None:  # it was faster: once more, in what is left of it
            missed += 1
            if missed > args.kills:
                raise Failed(f"{missed} lives ended before they could be killed")
            continue
        phases[phase] += 1
        print(
            f"kill {phases.total():3} of {args.kills}  {phase:12} (aimed at: {aims[0].phase}, update {aims[0].step} or later)",
            flush=True,
        )
        aims.pop(0)
    lives.append(folder / "heard_last")
    with Life(recipe, output_dir, *AUTO, drilled=("--record", lives[-1])) as life:
        life.finish(deadline)
    expected = left_behind(folder / "whole", args.max_steps)
    differing = differing_bytes(left_behind(output_dir, args.max_steps), expected)
    for name, count in differing.items():
        print(f"differs       {name}: {count:,} bytes")
    changed = changed_batches([heard(life) for life in lives], heard(folder / "heard_whole"))
    return {
        "kills": phases.total(),
        "differing_bytes": sum(differing.values()),
        "changed_batches": changed,
        "phases": dict(phases),
        "missed": missed,
        "updates": args.max_steps,
        "compared_files": len(expected),
        "compared_bytes": sum(map(len, expected.values())),
    }


def run(args) -> bool:
    """Whether all went as it must."""
    if args.kills < 0 or any(size < 1 for size in args.world_sizes or []) or args.max_steps < 10:
        raise UserError("--kills must not be negative, --world_sizes at least 1 each, --max_steps at least 10")
    deadline, started = time.monotonic() + 60 * args.most_minutes, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash_drill_") as folder:
        drill = drill_worlds if args.world_sizes else drill_kills
        try:
            found = drill(args, Path(folder), deadline)
        except Failed as error:
            print(f"failed        {error}", flush=True)
            return False
    if args.world_sizes:
        print(f"world sizes {' '.join(map(str, args.world_sizes))}: {found['changed_batches']} changed batches, losses equal to "
              f"{found['largest_loss_difference']:.1e}, resumed twice: {found['differing_bytes']} differing bytes")  # fmt: skip
    else:
        print(f"{found['kills']} kills survived, {found['differing_bytes']} differing bytes")
    json_line({"benchmark": "crash_drill", **found, "seconds": time.monotonic() - started, **environment()})
    return not (found["differing_bytes"] or found["changed_batches"] or found.get("losses_differ"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument(
        "--world_sizes", type=int, nargs="+", help="numbers of processes, one after another; no kills then"
    )
    parser.add_argument("--manifest", help="what pretrain.py takes as --train_data (default: synthesized audio)")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    parser.add_argument("--max_steps", type=int, default=60, help="updates of the run (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the run, and of the moments of the kills (default: %(default)s)"
    )
    parser.add_argument(
        "--most_minutes", type=float, default=30, help="the drill fails when it takes longer (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    passed = False

    def drill() -> None:
        nonlocal passed
        passed = run(args)

    return exit_status(parser.prog, drill) or int(not passed)


if __name__ == "__main__":
    sys.exit(main())
