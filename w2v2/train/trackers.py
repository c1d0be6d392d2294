"""Trackers: who else gets the records of a run, under which project and name.

Every record holds `audio_hours`. wandb draws all curves against it. Trackio's dashboard offers it as the x axis (or
with `?x_axis=audio_hours`). TensorBoard knows steps alone, so there it is a curve among the others.
"""

from collections.abc import Collection
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers

from w2v2.errors import UserError, did_you_mean, hide_secrets, one_line
from w2v2.train.launch import on_main_process
from w2v2.train.log import announce

RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
}  # their words for it


def check_trackers(names: Collection[str], known: Collection[str] = tuple(LOGGER_TYPE_TO_CLASS)) -> None:
    """Raises `UserError` for a tracker that is not among the `known`, or whose package is missing."""
    for name in set(names) - {*known, "all", "none"}:
        hint = did_you_mean(name, known, f"there are {', '.join(sorted(known))}, all and none")
        raise UserError(f"--report_to {name}: no such tracker: {hint}")
    if missing := sorted(
        set(names) & set(LOGGER_TYPE_TO_CLASS) - {str(tracker) for tracker in get_available_trackers()}
    ):
        packages = " ".join(missing)
        raise UserError(f"--report_to {packages}: not installed: pip install {packages}, or use other trackers or none")


def start_trackers(accelerator: Accelerator, args, first_step: int) -> None:
    """Start what `report_to` names. Call on all ranks. Raises `UserError` where a tracker does not start.

    TensorBoard writes to `output_dir/runs` and forgets, on resume, what came after the checkpoint. Trackio goes on with
    the run of that name.
    """
    if not accelerator.log_with:
        return
    run_name, names = args.run_name or Path(args.output_dir).resolve().name, [str(t) for t in accelerator.log_with]
    options = {tracker: {word: run_name} for tracker, word in RUN_NAME.items()}
    options["trackio"] |= {"space_id": args.trackio_space_id, "resume": "allow" if first_step else "never"}
    options["trackio"] |= {"private": True} if args.hub_private_repo else {}
    purge = {"purge_step": first_step + 1} if first_step else {}
    accelerator.log_with = [
        TensorBoardTracker(run_name, accelerator.logging_dir, **purge) if str(tracker) == "tensorboard" else tracker
        for tracker in accelerator.log_with
    ]
    flags = {k: v if isinstance(v, int | float) else hide_secrets(str(v)) for k, v in vars(args).items()}

    def start() -> None:
        try:
            accelerator.init_trackers(args.project, config=flags, init_kwargs=options)
            for tracker in accelerator.trackers:
                if tracker.name == "wandb":
                    tracker.tracker.define_metric("*", step_metric="audio_hours")
        except Exception as error:  # each has its own: no login, no network, a full disk
            advice = "mend that, or leave the tracker out of --report_to"
            raise UserError(f"--report_to {' '.join(names)}: {one_line(error)}; {advice}") from error

    on_main_process(accelerator, start)
    announce(accelerator, f"trackers      {', '.join(names)}: project {args.project}, run {run_name}")
