"""`cluster.py`: datatrove runs the slices of a script, tries again what was killed, and goes on with what is left."""

import os
import subprocess
import sys

import cluster
import pytest
from conftest import error_line
from test_pack_audio import ROOT, contents, flags_for, manifest, pack

__all__ = ["manifest"]  # a fixture

STAND_IN = """
import os, signal, sys
from pathlib import Path
folder, part = Path(sys.argv[1]), sys.argv[-1]
if "--slice" not in sys.argv:
    (folder / "joined").write_text("".join(path.read_text() for path in sorted(folder.glob("part-*"))))
    sys.exit(print("all joined"))
with open(folder / "attempts", "a") as file:
    file.write(part + "\\n")
if part == "1/4" and not (folder / "was killed").exists():
    (folder / "was killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if part == "2/4" and (folder / "slip").exists():
    print("error: a slip")
    sys.exit(2)
(folder / f"part-{part[0]}").write_text(part[0])
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(STAND_IN)
    (tmp_path / "out").mkdir()
    monkeypatch.setitem(cluster.SCRIPTS, "measure", str(tmp_path / "script.py"))

    def start(*flags, step="measure", more=(), status=0):
        arguments = ["--tasks", 4, "--logging_dir", tmp_path / "logs", *flags, step, tmp_path / "out", *more]
        assert cluster.main(list(map(str, arguments))) == status
        return (tmp_path / "out/attempts").read_text().split() if (tmp_path / "out/attempts").exists() else []

    return start


def test_a_killed_part_is_tried_again(start, tmp_path, capfd):
    assert sorted(start("--workers", 2)) == ["0/4", "1/4", "1/4", "2/4", "3/4"]
    assert (tmp_path / "out/joined").read_text() == "0123"
    assert capfd.readouterr().out.splitlines()[-1] == "all joined"


def test_only_what_is_left_runs_again(start, tmp_path, capsys):
    assert start("--workers", 1, "--retries", 0, status=2) == ["0/4", "1/4"]
    assert "task-00001 was killed by signal 9; see " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out/joined").exists()
    assert start("--workers", 1, "--retries", 0) == ["0/4", "1/4", "1/4", "2/4", "3/4"]
    assert (tmp_path / "out/joined").read_text() == "0123"


def test_a_slip_is_not_tried_again(start, tmp_path, capsys):
    (tmp_path / "out/slip").touch()
    assert start("--workers", 1, status=2) == ["0/4", "1/4", "1/4", "2/4"]
    assert "task-00002 ended with status 2: error: a slip; see " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "more", "said"),
    [
        ([], ["--slice", "0/2"], "--slice is set for each task"),
        ([], ["--overwrite"], "would delete what others wrote"),
        (["--executor", "slurm", "--slurm", "time=1:00:00"], [], "give --slurm partition=…"),
        (["--executor", "slurm", "--slurm", "time=1:00:00", "--slurm", "partition=cpu"], [], "there is no sbatch here"),
        (["--executor", "ray"], [], "pip install ray"),
        (["--slurm", "time=1:00:00"], [], "--slurm needs --executor slurm"),
    ],
)
def test_slips_are_told_before_anything_starts(start, monkeypatch, capsys, flags, more, said):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name != "ray")
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    assert start(*flags, more=more, status=2) == []
    assert said in error_line(capsys.readouterr().err)


SLURM = {
    # Runs each task of an array at once, one after another, as a cluster would sooner or later.
    "sbatch": """
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
with open(os.environ["SBATCH_SEEN"], "a") as file:
    file.write(script)
last = int(re.search(r"--array=0-(\\d+)", script)[1])
for task in range(last + 1):
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here", "RUN_OFFSET": "0"}
    subprocess.run(["bash", sys.argv[-1]], env=environment, stdout=2, check=True)
print("Submitted batch job 7")
""",
    "srun": "import os, sys; command = sys.argv[sys.argv.index('-n') + 2:]; os.execvp(command[0], command)",
    "scontrol": "print('here')",
}


@pytest.mark.slow
def test_slurm_packs_the_same_bytes(manifest, tmp_path):
    """Against a stand-in of Slurm's commands."""
    (tmp_path / "bin").mkdir()
    for name, program in SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{program}")
        (tmp_path / "bin" / name).chmod(0o755)
    flags = ["--tasks", "2", "--executor", "slurm", "--slurm", "partition=cpu", "--slurm", "time=1:00:00"]
    command = [sys.executable, ROOT / "data_scripts/cluster.py", *flags, "--slurm", "account=lab", "pack"]
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "SBATCH_SEEN": str(tmp_path / "seen"), "PYTHONPATH": str(ROOT)}
    command += flags_for(manifest, tmp_path / "packed")
    run, again = (subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True) for _ in "12")
    assert run.returncode == 0, run.stderr
    assert again.returncode == 2 and "all tasks are completed" in again.stderr.splitlines()[-1]
    assert run.stdout.startswith("submitted: 2 tasks, and one that joins their parts as job 7")
    assert contents(tmp_path / "packed") == contents(pack(manifest, tmp_path / "whole"))
    seen = (tmp_path / "seen").read_text()
    assert "#SBATCH --account=lab" in seen and "#SBATCH --array=0-1" in seen and "qos" not in seen
