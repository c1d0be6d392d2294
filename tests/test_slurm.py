"""The Slurm script with stand-ins for Slurm and for the program: what each process is given, and what becomes of its status."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "configs/slurm/pretrain.sbatch"
SRUN = """#!/bin/bash
# Two tasks of the command after srun's own options; its status is the highest.
while [ "${1#--}" != "$1" ]; do shift; done
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

    def run(status, **variables):
        slurm = dict(SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_ID="70123", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2")
        own = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", STAND_IN=str(tmp_path), PYTHON=str(tmp_path / "program"))
        values = slurm | own | dict(STATUS=str(status)) | variables
        command = ["bash", str(SCRIPT), "a b.yaml", "--seed", "7"]
        found = subprocess.run(command, cwd=REPOSITORY, env=values, capture_output=True, text=True, timeout=60)
        assert not found.stderr
        asked = tmp_path / "scontrol.txt"
        return found.returncode, (tmp_path / "program.txt").read_text(), asked.read_text() if asked.exists() else ""

    return run


def test_each_task_is_a_rank_and_gets_the_flags_as_they_were_given(submit):
    status, program, asked = submit(0)
    flags = "pretrain.py a b.yaml --seed 7 --resume_from_checkpoint auto"
    assert (status, asked) == (0, "")
    assert program.splitlines() == [f"{rank} {rank} 2 node1 20123 bf16 | {flags}" for rank in range(2)]


@pytest.mark.parametrize(
    ("status", "attempts", "again"),
    [(75, "0", True), (75, "99", True), (1, "9", True), (1, "10", False), (2, "0", False)],
)
def test_a_job_is_queued_again_where_that_can_help(submit, status, attempts, again):
    found, _, asked = submit(status, SLURM_RESTART_COUNT=attempts)
    assert found == status and asked == ("requeue 70123\n" if again else "")
