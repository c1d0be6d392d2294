"""The Slurm script with stand-ins for Slurm and for the program: what each process is given, and what becomes of its
status.
"""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "configs/slurm/pretrain.sbatch"
SRUN = """#!/bin/bash
# Two tasks of the command after srun's own options; its status is the highest.
while [ "${1#--}" != "$1" ]; do echo "$1" >> "$STAND_IN/srun.txt"; shift; done
highest=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" || { status=$?; [ $status -gt $highest ] && highest=$status; }
done
exit $highest
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" >> "$STAND_IN/scontrol.txt"; fi
"""
PROGRAM = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $ACCELERATE_MIXED_PRECISION | $*" >> "$STAND_IN/program.txt"
[ "$RANK" = 0 ] || exit 0
exit $STATUS
"""


@pytest.fixture
def submit(tmp_path):
    """Runs the script; returns its status, what the program got, and what Slurm was asked for."""
    for name, text in dict(srun=SRUN, scontrol=SCONTROL, program=PROGRAM).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)

    def run(status):
        slurm = dict(SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="70123", SLURM_JOB_NUM_NODES="2")
        slurm |= dict(SLURM_NTASKS_PER_NODE="4", SLURM_CPUS_PER_TASK="6")
        own = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", STAND_IN=str(tmp_path), PYTHON=str(tmp_path / "program"))
        values = slurm | own | dict(STATUS=str(status))
        command = ["bash", str(SCRIPT), "a b.yaml", "--seed", "7"]
        found = subprocess.run(command, cwd=tmp_path, env=values, capture_output=True, text=True, timeout=60)
        assert not found.stderr
        asked = tmp_path / "scontrol.txt"
        return found.returncode, (tmp_path / "program.txt").read_text(), asked.read_text() if asked.exists() else ""

    return run


def test_each_task_is_a_rank_with_flags_as_given(submit, tmp_path):
    status, program, asked = submit(0)
    assert "--cpus-per-task=6" in (tmp_path / "srun.txt").read_text().splitlines()
    flags = "pretrain.py a b.yaml --seed 7 --resume_from_checkpoint auto --overwrite_output_dir false"
    assert (status, asked) == (0, "")
    assert program.splitlines() == [f"{rank} {rank} 8 node1 20123 bf16 | {flags}" for rank in range(2)]


def test_what_the_script_adds_takes_the_place_of_overwriting(tmp_path):
    given = dict(train_data=["t"], validation_data=["v"], output_dir=str(tmp_path), overwrite_output_dir=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    added = ["--resume_from_checkpoint", "auto", "--overwrite_output_dir", "false"]
    (args,) = parse_command_line([PretrainArguments], [str(tmp_path / "run.yaml"), "--overwrite_output_dir", *added])
    assert (args.resume_from_checkpoint, args.overwrite_output_dir) == ("auto", False)


@pytest.mark.parametrize(("status", "again"), [(75, True), (1, True), (137, True), (2, False), (0, False)])
def test_a_job_is_queued_again_where_that_can_help(submit, status, again):
    found, _, asked = submit(status)
    assert found == status and asked == ("requeue 70123\n" if again else "")


def test_a_job_is_given_up_after_losses_in_a_row(submit):
    for _ in range(12):
        submit(75)
    for _ in range(10):
        submit(1)
    submit(75)
    for _ in range(9):
        submit(1)
    *_, asked = submit(1)
    assert asked.count("\n") == 12 + 10 + 1 + 10
    assert submit(1)[2] == asked
    assert submit(1)[2].count("\n") == asked.count("\n") + 1  # queued again by hand, it has its attempts anew
