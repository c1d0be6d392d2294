"""Measure, segment or pack a corpus in many tasks, which datatrove runs over processes, Slurm or Ray.

    python data_scripts/cluster.py --tasks 64 --workers 16 pack data/train.parquet --output_dir data/packed
    python data_scripts/cluster.py --tasks 500 --executor slurm --slurm partition=cpu --slurm time=4:00:00 \\
        measure /corpus --output /corpus/train.parquet

After the step come the flags of its script: measure_audio.py, segment.py or pack_audio.py. Task I of N is the script
with --slice I/N, and a last task is the script itself, which joins all parts. So the output is that of the script
alone, byte for byte, and each part can also be started by hand.

A part whose process is killed is tried again. What is done stays done: the same command goes on with the tasks that
datatrove has not marked as completed in LOGGING_DIR, and each of those with what its script had finished. LOGGING_DIR
and all that the script reads and writes have to be on a file system that the machines share.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from corpus_files import Parser
from slices import RunScript

from w2v2.errors import UserError, number, refuse

SCRIPTS = {"measure": "measure_audio.py", "segment": "segment.py", "pack": "pack_audio.py"}


def build_executors(args, logs: Path) -> list:
    """The executor of all slices, and that of the join."""
    script = Path(__file__).resolve().parent / SCRIPTS[args.step]
    command = [sys.executable, str(script), *args.arguments]
    if "--num_workers" not in given_flags(args):
        command += ["--num_workers", str(args.cpus_per_task)]
    executors = []
    for name, tasks in (("slices", args.tasks), ("join", 1)):
        step = RunScript(command, logs / "output", args.retries, is_sliced=name == "slices")
        shared = {"pipeline": [step], "tasks": tasks, "logging_dir": str(logs / name)}
        executors.append(build_executor(args, shared, executors[0] if executors else None))
    return executors


def given_flags(args) -> set[str]:
    return {text.partition("=")[0] for text in args.arguments}


def build_executor(args, shared: dict, before):
    if args.executor == "local":
        from datatrove.executor.local import LocalPipelineExecutor

        workers = args.workers or max(1, (os.cpu_count() or 1) // args.cpus_per_task)
        return LocalPipelineExecutor(**shared, workers=min(workers, shared["tasks"]))
    shared |= {"workers": args.workers or -1, "cpus_per_task": args.cpus_per_task}
    if args.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(**shared)
    from datatrove.executor.slurm import SlurmPipelineExecutor

    options = dict(args.slurm)
    own = {name: options.pop(name) for name in ("time", "partition")} | {"qos": options.pop("qos", None)}
    # Where a job finds datatrove's own commands, and `slices`.
    folders = os.path.dirname(sys.executable), os.path.dirname(os.path.abspath(__file__))
    paths = "export PATH={}:$PATH PYTHONPATH={}:$PYTHONPATH".format(*map(shlex.quote, folders))
    job = {"job_name": f"w2v2-{args.step}", "env_command": paths, "sbatch_args": options, "depends": before}
    return SlurmPipelineExecutor(**shared, **own, **job)


def check_flags(args) -> None:
    """UserError for what would fail in every task."""
    missing = [name for name in ("time", "partition") if name not in dict(args.slurm)]
    is_slurm = args.executor == "slurm"
    refuse(
        (not args.arguments, f"give the flags of {SCRIPTS[args.step]} after {args.step}"),
        ("--slice" in given_flags(args), "--slice is set for each task: leave it out"),
        (
            "--overwrite" in given_flags(args),
            "--overwrite in every task would delete what others wrote: leave it out, and remove the output yourself",
        ),
        (not importlib.util.find_spec("datatrove"), "the package datatrove is missing: pip install datatrove"),
        (args.executor == "ray" and not importlib.util.find_spec("ray"), "the package ray is missing: pip install ray"),
        (is_slurm and missing, f"give --slurm {' and --slurm '.join(f'{name}=…' for name in missing)}"),
        (
            is_slurm and not shutil.which("sbatch"),
            "--executor slurm: there is no sbatch here: start it on a login node",
        ),
        (args.slurm and not is_slurm, "--slurm needs --executor slurm: add it, or leave --slurm out"),
    )


def run(args) -> None:
    check_flags(args)
    asked = json.dumps([args.step, args.arguments, args.tasks, os.getcwd()])
    logs = (args.logging_dir or Path("cluster_logs")) / f"{args.step}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    slices, join = build_executors(args, logs.resolve())
    if args.executor == "slurm":
        join.run()  # submits both, the one to start after the other
        if join.job_id == -1:
            raise UserError(f"{logs} says that all tasks are completed: remove that folder to run them again")
        print(f"submitted: {args.tasks} tasks, and one that joins their parts as job {join.job_id}; logs in {logs}")
        return
    slices.run()
    if left := slices.get_incomplete_ranks(skip_completed=True):
        remedy = "the same command tries them again"
        raise UserError(f"{len(left)} of {args.tasks} tasks failed, the first: {left[0]}; see {logs}/output: {remedy}")
    join.run()
    print((logs / "output/join-00000.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-1])
    for name in ("slices", "join"):  # all is done: another time, the scripts find out what is missing
        shutil.rmtree(logs / name / "completions")


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=VALUE, as partition=cpu")
    return name.lstrip("-"), value


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--tasks", type=number(int, min=1, max=99_999), required=True, help="parts of the work")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="where tasks run")
    parser.add_argument("--workers", type=number(int, min=1), help="tasks at a time (None: all; local: all cores)")
    parser.add_argument("--cpus_per_task", type=number(int, min=1, max=1000), default=1, help="cores of a task")
    parser.add_argument("--retries", type=number(int, min=0, max=100), default=2, help="of a part that dies")
    parser.add_argument(
        "--slurm", type=_pair, action="append", default=[], metavar="NAME=VALUE", help="a flag of sbatch, once for each"
    )
    parser.add_argument("--logging_dir", type=Path, help="what is completed, and all output (None: ./cluster_logs)")
    parser.add_argument("step", choices=SCRIPTS, help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="flags of the step's script")
    return parser.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
