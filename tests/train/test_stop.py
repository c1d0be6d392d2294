"""Asked to stop, a run saves at the next update boundary, leaves with status 75, and goes on as if nothing had
happened.
"""

import errno
import os
import select
import signal
from pathlib import Path

import psutil
import pytest
from conftest import NOISY, assert_same_run, run_here, write_recipe
from ranks import SECONDS, TWO_PROCESSES, Program, environment, log_of, start_run, wait_for_records

import pretrain
from w2v2.cli import RESUMABLE
from w2v2.train.launch import StopRequest
from w2v2.train.log import read_metrics

STEPS, ASKED_IN = 6, 3  # updates of the run; the one in which it is asked
ENDLESS = ("--max_steps", 2_000, "--save_steps", 2_000, "--eval_steps", 2_000)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    values = dict(batch_hours=0.001, micro_batch_seconds=4.0, max_steps=STEPS, eval_steps=ASKED_IN, save_steps=STEPS)
    return write_recipe(folder, NOISY, **values, dataloader_num_workers=0, report_to=["none"], use_cpu=True)


def run(flags, output_dir, *more):
    return run_here(pretrain.main, flags, "--output_dir", output_dir, *more)


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(flags, output_dir) == 0
    return output_dir


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal():
    """Neither nohup nor a shell's background is to be inherited."""
    numbers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send_during(update, names, monkeypatch):
    """This process gets these signals in the midst of this update."""
    train_update = pretrain.train_update

    def interrupted(accelerator, model, optimizer, micro_batches, settings, *rest):
        for name in names if settings.step + 1 == update else ():
            os.kill(os.getpid(), getattr(signal, name))
        return train_update(accelerator, model, optimizer, micro_batches, settings, *rest)

    monkeypatch.setattr(pretrain, "train_update", interrupted)


@pytest.mark.parametrize(
    "signals", [["SIGTERM"], ["SIGUSR1"], ["SIGHUP"], ["SIGINT"], ["SIGINT", "SIGINT"]], ids="-".join
)
def test_a_stopped_run_goes_on_to_the_bit(flags, whole_run, tmp_path, monkeypatch, capfd, signals):
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in signals}
    with monkeypatch.context() as patch:
        send_during(ASKED_IN, signals, patch)
        assert run(flags, tmp_path / "run") == RESUMABLE == 75
    assert {name: signal.getsignal(getattr(signal, name)) for name in signals} == handlers
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"after update {ASKED_IN} of {STEPS}" in said and signals[0] in said and "--resume_from_checkpoint" in said
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{ASKED_IN}"]
    assert not (tmp_path / "run/model.safetensors").exists()
    steps = [(r["step"], "eval_loss" in r) for r in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == [(1, False), (2, False), (3, False), (3, True)]  # the validation that was due, then the checkpoint
    assert run(flags, tmp_path / "run", "--resume_from_checkpoint", "auto") == 0
    assert_same_run(tmp_path / "run", whole_run)


def test_in_its_last_update_a_run_is_finished(flags, whole_run, tmp_path, monkeypatch):
    send_during(STEPS, ["SIGTERM"], monkeypatch)
    assert run(flags, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole_run)


def test_the_clock_stops_a_run_alike(flags, tmp_path, capsys):
    assert run(flags, tmp_path / "run", "--max_hours", "1e-9") == RESUMABLE
    assert "after update 1 of 6 (--max_hours 1e-09)" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint-1/training_state/state.json").exists()
    assert run(flags, tmp_path / "run", "--max_hours", "0") == 2


def test_the_third_ctrl_c_leaves_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        for count in (1, 2, 3):
            assert stop.is_asked == (count > 1)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_what_the_parent_had_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.is_asked


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("more", "status"), [((), 0), (("--max_hours", "1e-9"), RESUMABLE)])
def test_a_full_disk_of_a_tracker_does_no_harm(flags, whole_run, tmp_path, monkeypatch, capfd, more, status):
    writes = iter(range(20))

    def write(self, data):
        if next(writes, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    assert run(flags, tmp_path / "run", "--report_to", "tensorboard", *more) == status
    assert next(writes, None) is None and "Traceback" not in capfd.readouterr().err
    if status == 0:
        assert_same_run(tmp_path / "run", whole_run)


def assert_saved(output_dir):
    """It trained on for a while, and its last line is that of its checkpoint."""
    step = read_metrics(output_dir / "metrics.jsonl")[-1]["step"]
    assert [folder.name for folder in output_dir.glob("checkpoint-*")] == [f"checkpoint-{step}"] and 3 < step < 2_000


def test_workers_survive_signals_to_all_processes(flags, tmp_path):
    """As terminals and Slurm send them: the update at hand still needs the workers."""
    process = start_run(flags, tmp_path / "run", *ENDLESS, "--dataloader_num_workers", 2)
    try:
        wait_for_records(process, tmp_path / "run", 4)
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.killpg(process.pid, number)
        assert process.wait(SECONDS) == RESUMABLE, log_of(tmp_path / "run")
    finally:
        process.kill()
    assert_saved(tmp_path / "run")


def test_one_asked_process_of_two_stops_both(flags, tmp_path):
    process = start_run(flags, tmp_path / "run", *ENDLESS, launcher=TWO_PROCESSES)
    try:
        wait_for_records(process, tmp_path / "run", 4)
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(recursive=True)}
        ranks["1"].send_signal(signal.SIGUSR1)
        process.wait(SECONDS)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "another process was asked to" in log_of(tmp_path / "run")
    assert_saved(tmp_path / "run")


@pytest.mark.parametrize("dead", ["full disk", "closed pipe"])
def test_a_run_outlives_its_console(flags, whole_run, tmp_path, dead):
    """Its log is on a full disk, or the reader of its output has died."""
    log = Path("/dev/full")
    if dead == "closed pipe":
        log = tmp_path / "pipe"
        os.mkfifo(log)
        reading = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    process = Program(["pretrain.py", flags, "--output_dir", tmp_path / "run"], log, environment())
    if dead == "closed pipe":
        select.select([reading], [], [], SECONDS)  # its first line
        os.close(reading)
    assert process.wait(SECONDS) == 0
    assert_same_run(tmp_path / "run", whole_run)
