"""A run killed again and again, and what it leaves compared with an undisturbed one's, byte by byte.

    python benchmarks/crash_drill.py --kills 20            # one run, killed 20 times, which resumes each time
    python benchmarks/crash_drill.py --world_sizes 2 1 2   # one run, resumed with other numbers of processes

SIGKILL to the whole process group, loader workers included, at seeded random moments: while it starts, in updates, in
validation, between two writes of a save, between a checkpoint's renaming and the removal of the oldest, in that
removal, and while the finished model is written. Each time the same command is given again, with
`--resume_from_checkpoint auto`. All noise is on; it runs on the CPU in fp32, with a slow disk (drilled.py), so that
kills fall between writes. The last line is JSON; exit status 1 if anything differs, 2 for a slip in the flags.
"""

import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from common import environment, make_parser, print_json
from drill_runs import RECIPE, Life, changed_batches, differing_bytes, heard, left_behind, losses, prepare

from w2v2.cli import run_script
from w2v2.errors import UserError

AIMS = ("save", "update", "validation", "save", "start-up", "renamed", "save", "rotation", "update", "save")  # in turn
AUTO = ("--resume_from_checkpoint", "auto")
SLOW_DISK_MS = 20
SAVE_SECONDS = 12 * SLOW_DISK_MS / 1000  # about as long as a save takes on the slow disk
STAGES = ((0, 6.0), (1, 11.0), (2, 8.0))  # loader workers and --micro_batch_seconds of each stage
MOST_LOSS_DIFFERENCE = 1e-3  # relative: rounding of sums, grown by the optimizer over the run
QUIET = ("--no_gumbel", "--record")
Start = Callable[..., Life]  # (output_dir, *flags) → the run


# -- kills


def draw_aims(num_kills: int, max_steps: int, start_seconds: float, rng: np.random.Generator) -> list[tuple]:
    """(phase, step, delay) of each kill: so many seconds after the phase is seen, not before that update.

    Phases in turn, at steps that rise over the run's whole length; the last kill is for the finishing.
    """
    lengths = {"start-up": start_seconds, "update": 0.2, "validation": 0.1, "finish": 1.0}
    lengths |= {"save": SAVE_SECONDS, "rotation": SAVE_SECONDS / 3, "renamed": 0.0}
    aims = []
    for number in range(num_kills):
        phase = AIMS[number % len(AIMS)] if number < num_kills - 1 or num_kills < 3 else "finish"
        step = int((number + rng.random()) / num_kills * (max_steps - RECIPE["eval_steps"]))
        aims.append((phase, step, float(rng.uniform(0, lengths[phase]))))
    return aims


def run_and_kill(life: Life, aim: tuple, max_steps: int) -> str | None:
    """Kill a life as aimed. Returns the phase where the kill fell; None: the run had ended before."""
    phase, step, delay = aim
    watch = life.watch

    def is_reached() -> bool:
        return phase in watch.phases(max_steps) and (watch.step >= step or phase == "start-up")

    with life:
        if not life.wait_until(is_reached) or not life.sleep(delay):
            return None
    return watch.phases(max_steps)[0]


def drill_kills(args, folder: Path, start: Start) -> dict:
    """`args.kills` kills in one run; what it left and heard, beside an undisturbed run."""
    with start(folder / "whole", drilled=("--record", folder / "heard_whole")) as life:
        life.wait_until(lambda: life.watch.phases() != ["start-up"])
        start_seconds = time.monotonic() - life.started
        life.wait_until()
    print(f"undisturbed   {args.max_steps} updates, {start_seconds:.1f} s before the first", flush=True)

    aims = draw_aims(args.kills, args.max_steps, start_seconds, np.random.default_rng(args.seed))
    phases, records, missed = Counter(), [], 0
    while phases.total() < args.kills and missed <= args.kills:
        aim = aims[phases.total()]
        records.append(folder / f"heard_{len(records)}")
        drilled = ("--slow_disk_ms", SLOW_DISK_MS, "--record", records[-1])
        phase = run_and_kill(start(folder / "killed", *AUTO, drilled=drilled), aim, args.max_steps)
        if phase is None:  # it was faster: once more, in what is left of it
            missed += 1
            continue
        phases[phase] += 1
        print(f"kill {phases.total():3} of {args.kills}  {phase:12} (aimed at: {aim[0]}, update {aim[1]} or later)",
              flush=True)  # fmt: skip
    if missed > args.kills:
        sys.exit(f"failed        {missed} lives ended before they could be killed")
    records.append(folder / "heard_last")
    with start(folder / "killed", *AUTO, drilled=("--record", records[-1])) as life:
        life.wait_until()

    expected = left_behind(folder / "whole", args.max_steps)
    differing = differing_bytes(left_behind(folder / "killed", args.max_steps), expected)
    for name, count in differing.items():
        print(f"differs       {name}: {count:,} bytes")
    print(f"{args.kills} kills survived, {sum(differing.values())} differing bytes")
    return {
        "kills": args.kills,
        "differing_bytes": sum(differing.values()),
        "changed_batches": changed_batches([*map(heard, records)], heard(folder / "heard_whole")),
        "phases": dict(phases),
        "missed": missed,
        "updates": args.max_steps,
        "compared_files": len(expected),
        "compared_bytes": sum(map(len, expected.values())),
    }


# -- other numbers of processes


def stage_flags(stage: int) -> list:
    """What a stage has otherwise than the undisturbed run, beside its number of processes."""
    workers, seconds = STAGES[stage % len(STAGES)]
    return [*AUTO, "--dataloader_num_workers", workers, "--micro_batch_seconds", seconds]


def drill_world_sizes(args, folder: Path, start: Start) -> dict:
    """One run whose stages have other numbers of processes, of loader workers and other micro-batches: batches and
    losses of the staged run beside those of one process, and the second stage resumed twice, with all noise on.

    Dropout and Gumbel noise follow the cut, so the losses are compared without them, and with the diversity loss of
    the whole effective batch.
    """
    with start(folder / "whole", drilled=(*QUIET, folder / "heard_whole")) as life:
        life.wait_until()
    lives = []
    for stage, size in enumerate(args.world_sizes, start=1):
        record, last = folder / f"heard_{stage}", args.max_steps * stage // len(args.world_sizes)
        flags = dict(drilled=(*QUIET, record), num_processes=size)
        with start(folder / "staged", *stage_flags(stage - 1), **flags) as life:
            has_more = stage < len(args.world_sizes)
            if life.wait_until(partial(has_made, life, last) if has_more else lambda: False) != has_more:
                sys.exit(f"failed        the run was over before it could be killed after update {last}")
        if stage == 1:
            shutil.copytree(folder / "staged", folder / "fork")
        lives.append(heard(record, size))
        print(f"stage {stage}       {size} process(es), {len(lives[-1])} whole updates", flush=True)

    pairs = zip(losses(folder / "staged"), losses(folder / "whole"), strict=True)
    largest = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    differing = resume_twice(args, folder, start)
    changed = changed_batches(lives, heard(folder / "heard_whole"))
    print(f"world sizes {' '.join(map(str, args.world_sizes))}: {changed} changed batches, losses equal to "
          f"{largest:.1e}, resumed twice: {differing} differing bytes")  # fmt: skip
    return {
        "world_sizes": args.world_sizes,
        "changed_batches": changed,
        "compared_batches": sum(map(len, lives)),
        "compared_utterances": sum(batch.total() for life in lives for batch in life.values()),
        "largest_loss_difference": largest,
        "losses_differ": not largest < MOST_LOSS_DIFFERENCE,
        "differing_bytes": differing,
        "updates": args.max_steps,
    }


def has_made(life: Life, step: int) -> bool:
    """Whether a run has made `step` updates and has a checkpoint to go on from."""
    watch = life.watch
    return watch.phases() != ["start-up"] and watch.step >= step and bool(watch.checkpoints())


def resume_twice(args, folder: Path, start: Start) -> int:
    """Differing bytes of the second stage, from the first stage's checkpoint to the end, two times."""
    flags = [*stage_flags(1), "--config_name", folder / "noisy", "--diversity_scope", "micro_batch"]
    left = []
    for name in ("once", "twice"):
        shutil.copytree(folder / "fork", folder / name)
        with start(folder / name, *flags, num_processes=args.world_sizes[1 % len(args.world_sizes)]) as life:
            life.wait_until()
        left.append(left_behind(folder / name, args.max_steps))
    return sum(differing_bytes(*left).values())


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, reads_audio=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--world_sizes", type=int, nargs="+", help="numbers of processes, one after another; no kills")
    parser.add_argument("--max_steps", type=int, default=60, help="updates of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the run, and of the kills")
    parser.add_argument("--most_minutes", type=float, default=30, help="longer is a failure")
    args = parser.parse_args(argv)
    if args.kills < 0 or any(size < 1 for size in args.world_sizes or []) or args.max_steps < 10:
        raise UserError("--kills must not be negative, --world_sizes at least 1 each, --max_steps at least 10")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash_drill_") as name:
        folder, changes = Path(name), dict(max_steps=args.max_steps, seed=args.seed)
        if args.world_sizes:
            changes |= dict(config_name=str(folder / "quiet"), diversity_scope="effective_batch")
        start = partial(Life, prepare(folder, args, **changes), started + 60 * args.most_minutes)
        found = (drill_world_sizes if args.world_sizes else drill_kills)(args, folder, start)
    print_json({"benchmark": "crash_drill", **found, "seconds": time.monotonic() - started, **environment()})
    sys.exit(bool(found["differing_bytes"] or found["changed_batches"] or found.get("losses_differ")))


if __name__ == "__main__":
    run_script(main)
