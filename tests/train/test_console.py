"""A run outlives its console: a full disk under its log, a pipe whose reader has gone, descriptors that were never open."""

import errno
import io
import json
import os
import subprocess
import sys

import pytest
from ranks import REPOSITORY, environment

from w2v2.errors import UserError
from w2v2.train import console
from w2v2.train.log import RunLog, read_metrics

SCRIPT = """
import json, os, signal, sys
from w2v2.cli import run_script
from w2v2.train.console import say
from w2v2.errors import UserError
from w2v2.train.stop import Stopped, StopRequest

def finishes():
    os.fstat(1), os.fstat(2)  # taken: a run's own files must not get these numbers
    for _ in range(3):
        print("a line" * 4_000)
        print("a line", file=sys.stderr)

def slips():
    finishes()
    raise UserError("--flag is 3: it has to be 4")

def is_asked():
    finishes()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_asked
    raise Stopped("stopped after update 3")

def fails():
    finishes()
    raise KeyError("a bug")

def wire(console):
    if console == "closed":
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None
        os.close(1)
        os.close(2)
        return
    reading, dead = os.pipe()
    if console == "full":
        dead = os.open("/dev/full", os.O_WRONLY)
    elif console == "unread":
        os.set_blocking(dead, False)
        try:
            while os.write(dead, b"x" * 512):
                pass
        except BlockingIOError:
            os.set_blocking(dead, True)
    else:
        os.close(reading)
    os.dup2(dead, 1)
    os.dup2(dead, 2)

ENDS = [finishes, slips, is_asked, fails]
cases = [(console, main) for console in ("full", "cut off", "closed") for main in ENDS]
cases.append(("unread", lambda: say("a line")))
statuses = {}
for console, main in cases:
    child = os.fork()
    if not child:
        wire(console)
        run_script(main)
        sys.exit()
    statuses.setdefault(console, []).append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def statuses():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("wired", ["full", "cut off", "closed"])
def test_every_end_of_a_script_keeps_its_status_without_a_console(statuses, wired):
    assert statuses[wired] == [0, 2, 75, 1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_line_for_a_pipe_that_nobody_reads_is_not_waited_for(statuses):
    assert statuses["unread"] == [0]


class Dying(io.StringIO):
    """A terminal that fails from its second line on, until it is `mended`."""

    error: Exception | None = None

    def isatty(self):
        return True

    def write(self, text):
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self):
        self.write("")


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("disable_tqdm", [False, True], ids=["bar", "lines"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_runs_log_goes_on_while_its_console_fails_and_is_seen_again_afterwards(
    tmp_path, monkeypatch, disable_tqdm, error
):
    terminal = Dying()
    monkeypatch.setattr("sys.stderr", terminal)
    with console.outlived():
        log = RunLog(tmp_path, total_steps=4, disable_tqdm=disable_tqdm)
        for step in range(1, 5):
            terminal.error = error if step in (2, 3) else None
            log.update({"step": step, "loss": 1.0})
            log.write({"step": step, "loss": 1.0, "eval_loss": step})
        terminal.error = error
        log.close()
    assert sys.stderr is terminal
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    seen = terminal.getvalue()
    assert all((f"eval_loss {step}" in seen) == (step in (1, 4)) for step in range(1, 5))


def test_what_a_console_has_no_letters_for_is_escaped(monkeypatch):
    letters = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(letters, encoding="ascii"))
    with console.outlived():
        print("Gruß", flush=True)
    assert letters.getvalue() == b"Gru\\xdf\n"


def test_errors_of_the_run_itself_pass_through(capsys):
    with pytest.raises(UserError), console.outlived():
        print("said")
        raise UserError("a slip")
    assert capsys.readouterr().out == "said\n"
