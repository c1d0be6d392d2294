"""One run whose every stage has another number of processes, of loader workers and another size of micro-batches: the same batches."""

import shutil
from pathlib import Path

from drill_runs import Failed, Life, Watch, changed_batches, differing_bytes, heard, left_behind, losses, prepare

WORKERS = (0, 1, 2)
MICRO_BATCH_SECONDS = (6.0, 11.0, 8.0)
MOST_LOSS_DIFFERENCE = 1e-3  # relative: rounding of sums, grown by the optimizer over the run
QUIET = ("--no_gumbel", "--record")


def stage_flags(stage: int) -> list:
    """What a stage has otherwise than the undisturbed run, beside its number of processes."""
    workers, seconds = WORKERS[stage % len(WORKERS)], MICRO_BATCH_SECONDS[stage % len(MICRO_BATCH_SECONDS)]
    return ["--resume_from_checkpoint", "auto", "--dataloader_num_workers", workers, "--micro_batch_seconds", seconds]


def drill_worlds(args, folder: Path, deadline: float) -> dict:
    """Batches and losses of the staged run beside those of one process, and the second stage resumed twice, with all noise on.

    Dropout and Gumbel noise follow the cut, so the losses are compared without them, and with the diversity loss of the whole effective
    batch.
    """
    quiet = dict(config_name=str(folder / "quiet"), diversity_scope="effective_batch")
    recipe = prepare(folder, args.manifest, args.data_root, max_steps=args.max_steps, seed=args.seed, **quiet)
    with Life(recipe, folder / "whole", drilled=(*QUIET, folder / "heard_whole")) as life:
        life.finish(deadline)
    output_dir, lives = folder / "staged", []
    for stage, size in enumerate(args.world_sizes):
        record = folder / f"heard_{stage}"
        with Life(recipe, output_dir, *stage_flags(stage), drilled=(*QUIET, record), num_processes=size) as life:
            if stage == len(args.world_sizes) - 1:
                life.finish(deadline)
            else:
                kill_after(life, output_dir, args.max_steps * (stage + 1) // len(args.world_sizes), deadline)
        if stage == 0:
            shutil.copytree(output_dir, folder / "fork")
        lives.append(heard(record, size))
        print(f"stage {stage + 1}       {size} process(es), {len(lives[-1])} whole updates", flush=True)
    expected = heard(folder / "heard_whole")
    pairs = list(zip(losses(output_dir), losses(folder / "whole"), strict=True))
    largest = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    differing = resume_twice(args, recipe, folder, deadline)
    return {
        "world_sizes": args.world_sizes,
        "changed_batches": changed_batches(lives, expected),
        "compared_batches": sum(map(len, lives)),
        "compared_utterances": sum(batch.total() for life in lives for batch in life.values()),
        "largest_loss_difference": largest,
        "losses_differ": not largest < MOST_LOSS_DIFFERENCE,
        "differing_bytes": sum(differing.values()),
        "updates": args.max_steps,
    }


def kill_after(life: Life, output_dir: Path, step: int, deadline: float) -> None:
    """Kill a run once it has made `step` updates and has a checkpoint to go on from."""
    watch = Watch(output_dir)
    if not life.until(lambda: (look := watch.look()) and look.step >= step and look.checkpoints, deadline):
        raise Failed(f"the run was over before it could be killed after update {step}")
    life.kill()


def resume_twice(args, recipe: Path, folder: Path, deadline: float) -> dict[str, int]:
    """The second stage's settings, from the first stage's checkpoint to the end, two times: files that differ, with their bytes."""
    size = args.world_sizes[1 % len(args.world_sizes)]
    left = []
    for name in ("once", "twice"):
        shutil.copytree(folder / "fork", folder / name)
        flags = [*stage_flags(1), "--config_name", folder / "noisy", "--diversity_scope", "micro_batch"]
        with Life(recipe, folder / name, *flags, num_processes=size) as life:
            life.finish(deadline)
        left.append(left_behind(folder / name, args.max_steps))
    return differing_bytes(*left)
