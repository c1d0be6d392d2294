"""Processes of the real program: one run with its launcher, or ranks that meet by their environment alone, as `srun`
starts them.

Without a launcher they are forked from a server that has imported the scripts, for an import takes longer than what is
tested.
"""

import atexit
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ACCELERATE = ["-m", "accelerate.commands.launch"]
TWO_PROCESSES = [*ACCELERATE, "--config_file", "configs/accelerate/cpu_2_processes.yaml"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SECONDS = 240  # until a test gives up: far more than what is tested takes
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pretrain", "finetune_classification"])


class Program(SERVER.Process):
    """`python WORDS`, in a session of its own, with the methods of `Popen`; what it prints is appended to a log.

    What libraries read of their environment when they are imported is the server's.
    """

    def __init__(self, words, log: Path, variables: dict[str, str]):
        super().__init__()
        self.words, self.log, self.variables = [str(word) for word in words], log, variables
        self.start()

    def run(self) -> None:
        os.setsid()
        multiprocessing.set_start_method(None, force=True)  # the platform's own, as in a process of its own
        os.chdir(REPOSITORY)
        os.environ.clear()
        os.environ.update(self.variables)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.enable()
        sys.argv = self.words
        try:
            runpy.run_path(self.words[0], run_name="__main__")
        finally:
            atexit._run_exitfuncs()

    def wait(self, seconds: float | None = None) -> int:
        self.join(seconds)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.words, seconds)
        return self.exitcode

    def poll(self) -> int | None:
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.exitcode is None:
            os.kill(self.pid, number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**changes) -> dict[str, str]:
    """This process's, without what a launcher has left in it."""
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "SLURM_", "FSDP_", "PET_")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in names}
    ours = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY), PYTHONFAULTHANDLER="1")
    return kept | ours | {k: str(v) for k, v in changes.items()}


def start_run(flags, output_dir, *more, launcher=(), **variables) -> subprocess.Popen | Program:
    """pretrain.py, by a launcher or alone; its log lies beside its folder. Libraries see `HF_…` at import."""
    words, log = ["pretrain.py", flags, "--output_dir", output_dir, *more], Path(f"{output_dir}.log")
    if not launcher and not any(name.startswith("HF_") for name in variables):
        return Program(words, log, environment(**variables))
    with open(log, "a") as file:
        own = dict(env=environment(**variables), stdout=file, stderr=file, start_new_session=True)
        return subprocess.Popen(list(map(str, [sys.executable, *launcher, *words])), cwd=REPOSITORY, **own)


def log_of(output_dir) -> str:
    return Path(f"{output_dir}.log").read_text()


def count_records(output_dir) -> int:
    """Lines that a run has logged so far."""
    path = output_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_records(process, output_dir, count: int) -> None:
    """Until a run has logged so many lines."""
    until = time.monotonic() + SECONDS
    while count_records(output_dir) < count:
        assert process.poll() is None and time.monotonic() < until, log_of(output_dir)
        time.sleep(0.001)


def finish(process, output_dir):
    """The folder of a run that has come to its good end."""
    assert process.wait(SECONDS) == 0, log_of(output_dir)
    return output_dir


class Ranks:
    """Two processes of `command`, their output in files; killed at the end of the `with`."""

    def __init__(self, folder: Path, *command, size: int = 2, **changes):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        own = [environment(**(meeting | dict(RANK=rank, LOCAL_RANK=rank) | changes)) for rank in range(size)]
        for log in self.logs:
            log.write_text("")
        self.processes = [Program(command, *pair) for pair in zip(self.logs, own, strict=True)]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def wait_until(self, rank: int, text: str) -> None:
        """Until a rank has printed `text`."""
        until = time.monotonic() + SECONDS
        while text not in self.said(rank):
            assert time.monotonic() < until and self.processes[rank].poll() is None, self.said(rank)
            time.sleep(0.01)

    def statuses(self, *ranks: int) -> list[int]:
        """Exit statuses of these ranks (default: all), waited for; where they do not end, what all of them are at fails
        the test.
        """
        try:
            return [self.processes[rank].wait(SECONDS) for rank in ranks or range(len(self.processes))]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.send_signal(signal.SIGABRT)  # the fault handler prints the stacks
                process.wait()
            logs = "\n".join(f"-- rank {rank}\n{self.said(rank)}" for rank in range(len(self.logs)))
            raise AssertionError(f"no end within {SECONDS} s\n{logs}") from None


def run_ranks(folder: Path, *command, **changes) -> None:
    """Two processes of `command`, up to their good end."""
    with Ranks(folder, *command, **changes) as ranks:
        assert ranks.statuses() == [0, 0], "\n".join(map(ranks.said, range(2)))
