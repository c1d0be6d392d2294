"""Asked to stop, a run saves at the next update boundary, leaves with status 75, and goes on as if nothing had happened."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import run_here, tiny_config, write_csv, write_tones

import pretrain
from w2v2.train.log import read_metrics
from w2v2.train.stop import RESUMABLE, StopRequest

REPOSITORY = Path(__file__).parents[2]
STEPS, ASKED_IN = 6, 3  # updates of the run; the one in which it is asked
TIMINGS = ("audio_seconds_per_second", "data_wait_fraction")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    seconds = [1.0, 1.4, 1.9, 2.3, 1.2, 2.8]
    paths = write_tones(folder / "audio", seconds)
    tiny_config(hidden_dropout=0.1, attention_dropout=0.1, layerdrop=0.3).save_pretrained(folder / "model")
    manifest = str(write_csv(folder / "train.csv", paths, seconds))
    values = dict(train_data=[manifest], validation_data=[manifest], config_name=str(folder / "model"), min_seconds=0.5,
                  batch_hours=0.001, micro_batch_seconds=4.0, max_steps=STEPS, warmup_steps=2, learning_rate=0.001, logging_steps=1,
                  eval_steps=ASKED_IN, save_steps=STEPS, dataloader_num_workers=0, report_to=["none"], use_cpu=True)  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def here(flags, output_dir, *more):
    return run_here(pretrain.main, flags, "--output_dir", output_dir, *more)


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert here(flags, output_dir) == 0
    return output_dir


def outcome(output_dir):
    """The bytes that a run ends with, and its curve."""
    last = output_dir / f"checkpoint-{STEPS}"
    files = ["model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json"]
    records = read_metrics(output_dir / "metrics.jsonl")
    curve = [{name: value for name, value in r.items() if name not in TIMINGS} for r in records]
    return [(last / name).read_bytes() for name in files], curve


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal():
    """Neither nohup nor a shell's background is to be inherited."""
    numbers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def during(update, action, monkeypatch):
    """Do something in the midst of this update."""
    train_update = pretrain.train_update

    def wrapped(accelerator, model, optimizer, micro_batches, settings, *rest):
        if settings.step + 1 == update:
            action()
        return train_update(accelerator, model, optimizer, micro_batches, settings, *rest)

    monkeypatch.setattr(pretrain, "train_update", wrapped)


@pytest.mark.parametrize(
    "signals", [["SIGTERM"], ["SIGUSR1"], ["SIGHUP"], ["SIGINT"], ["SIGINT", "SIGINT"]], ids="-".join
)
def test_a_signal_ends_a_run_at_the_update_boundary_and_it_goes_on_to_the_bit(
    flags, whole_run, tmp_path, monkeypatch, capfd, signals
):
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in signals}
    with monkeypatch.context() as patch:
        during(ASKED_IN, lambda: [os.kill(os.getpid(), getattr(signal, name)) for name in signals], patch)
        assert here(flags, tmp_path / "run") == RESUMABLE == 75
    assert {name: signal.getsignal(getattr(signal, name)) for name in signals} == handlers
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"after update {ASKED_IN} of {STEPS}" in said and signals[0] in said and "--resume_from_checkpoint" in said
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{ASKED_IN}"]
    assert not (tmp_path / "run/model.safetensors").exists()
    steps = [(r["step"], "eval_loss" in r) for r in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert steps == [(1, False), (2, False), (3, False), (3, True)]  # the validation that was due, then the checkpoint
    assert here(flags, tmp_path / "run", "--resume_from_checkpoint", "auto") == 0
    assert outcome(tmp_path / "run") == outcome(whole_run)


def test_in_its_last_update_a_run_is_not_stopped_but_finished(flags, whole_run, tmp_path, monkeypatch):
    during(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    assert here(flags, tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(whole_run)


def test_the_clock_stops_a_run_alike(flags, tmp_path, capsys):
    assert here(flags, tmp_path / "run", "--max_hours", "1e-9") == RESUMABLE
    assert "after update 1 of 6 (--max_hours 1e-09)" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint-1/training_state/state.json").exists()
    assert here(flags, tmp_path / "run", "--max_hours", "0") == 2


def test_the_third_ctrl_c_leaves_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        for count in (1, 2, 3):
            assert stop.is_asked == (count > 1)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_what_the_parent_had_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_asked
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("more", "status"), [((), 0), (("--max_hours", "1e-9"), RESUMABLE)])
def test_a_tracker_that_met_a_full_disk_does_not_change_how_a_run_ends(
    flags, whole_run, tmp_path, monkeypatch, more, status
):
    writes = iter(range(20))

    def write(self, data):
        if next(writes, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    assert here(flags, tmp_path / "run", "--report_to", "tensorboard", *more) == status
    assert next(writes, None) is None
    if status == 0:
        assert outcome(tmp_path / "run") == outcome(whole_run)


def launched(flags, output_dir, *launcher, more=(), threads=1, **wired):
    command = [sys.executable, *launcher, "pretrain.py", flags, "--output_dir", output_dir, "--max_steps", 2_000, *more]
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads), PYTHONPATH=str(REPOSITORY))
    wired = wired or dict(stdout=open(f"{output_dir}.log", "w"), stderr=subprocess.STDOUT)
    return subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=environment, start_new_session=True, **wired)


def until_it_trains(process, output_dir):
    metrics = output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, log_of(output_dir)
        time.sleep(0.01)


def files(output_dir):
    return sorted(path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*"))


def log_of(output_dir):
    log = Path(f"{output_dir}.log")
    return log.read_text() if log.exists() else "(its console was dead)"


def saved_step(output_dir):
    (folder,) = output_dir.glob("checkpoint-*")
    step = json.loads((folder / "training_state/state.json").read_text())["step"]
    assert step == read_metrics(output_dir / "metrics.jsonl")[-1]["step"] < 2_000
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_workers_survive_a_signal_to_all_processes_of_the_run(flags, tmp_path, number):
    """As Slurm and terminals send it: the update at hand still needs them."""
    more = ("--dataloader_num_workers", 2, "--save_steps", 2_000, "--eval_steps", 2_000)
    process = launched(flags, tmp_path / "run", more=more)
    try:
        until_it_trains(process, tmp_path / "run")
        os.killpg(process.pid, number)
        assert process.wait(timeout=120) == RESUMABLE, Path(f"{tmp_path}/run.log").read_text()
    finally:
        process.kill()
    assert saved_step(tmp_path / "run") > 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_run_whose_console_is_on_a_full_disk_leaves_the_same_files(flags, whole_run, tmp_path):
    with open("/dev/full", "w") as full:
        wired = dict(stdout=full, stderr=full, threads=torch.get_num_threads())  # as many as the whole run had
        process = launched(flags, tmp_path / "run", more=("--max_steps", STEPS), **wired)
        assert process.wait(timeout=240) == 0
    assert outcome(tmp_path / "run") == outcome(whole_run)
    assert files(tmp_path / "run") == files(whole_run)


def test_a_run_whose_reader_has_died_still_obeys_a_signal(flags, tmp_path):
    """As `pretrain.py 2>&1 | tee log` meets Ctrl-C: tee ends of it at once."""
    more = ("--save_steps", 2_000, "--eval_steps", 2_000)
    process = launched(flags, tmp_path / "run", more=more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until_it_trains(process, tmp_path / "run")
        process.stdout.close()
        step = len(read_metrics(tmp_path / "run/metrics.jsonl"))
        while len(read_metrics(tmp_path / "run/metrics.jsonl")) < step + 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == RESUMABLE
    finally:
        process.kill()
    assert saved_step(tmp_path / "run") > step


def test_one_asked_process_of_two_stops_both_at_the_same_update(flags, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2_processes.yaml"]
    process = launched(flags, tmp_path / "run", *launcher, more=("--save_steps", 2_000, "--eval_steps", 2_000))
    try:
        until_it_trains(process, tmp_path / "run")
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children(recursive=True)}
        ranks["1"].send_signal(signal.SIGUSR1)
        process.wait(timeout=120)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert "another process was asked to" in Path(f"{tmp_path}/run.log").read_text()
    assert saved_step(tmp_path / "run") > 3
