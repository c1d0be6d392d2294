"""What befell a run, as its events tell it: starts, warnings, ends; whatever the disk does."""

import json
import os
import signal
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import NO_DROPOUT, run_here, write_recipe

import pretrain
from w2v2.cli import RESUMABLE
from w2v2.train.events import EVENTS_FILE, EventLog
from w2v2.train.log import METRICS_FILE
from w2v2.train.records import json_line

STEPS = 4
AUTO = ("--resume_from_checkpoint", "auto")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    values = dict(batch_hours=0.001, micro_batch_seconds=4.0, max_steps=STEPS, save_steps=2, eval_steps=STEPS)
    values |= dict(dataloader_num_workers=0, report_to=["none"], use_cpu=True)
    return write_recipe(tmp_path_factory.mktemp("events"), NO_DROPOUT, **values)


def run(flags, output_dir, *more):
    return run_here(pretrain.main, flags, "--output_dir", output_dir, *more)


def events_of(folder):
    events = [json.loads(line) for line in (folder / EVENTS_FILE).read_text().splitlines()]
    now = datetime.now(UTC)
    assert all(0 <= (now - datetime.fromisoformat(event["time"])).total_seconds() < 600 for event in events)
    return events


def kinds(events):
    return [(event["event"], event["step"]) for event in events]


def fail_at(monkeypatch, step, what):
    train_update = pretrain.train_update

    def spoiled(accelerator, model, optimizer, micro_batches, settings, *rest):
        if settings.step + 1 == step:
            what()
        return train_update(accelerator, model, optimizer, micro_batches, settings, *rest)

    monkeypatch.setattr(pretrain, "train_update", spoiled)


def test_a_run_that_is_stopped_and_resumed_tells_its_story(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(flags, tmp_path / "run") == RESUMABLE
    assert run(flags, tmp_path / "run", *AUTO, "--learning_rate", 0.002) == 0
    events = events_of(tmp_path / "run")
    before, after = [("start", 0), ("warning", 0), ("stop", 1)], [("resume", 1), ("warning", 1), ("finish", STEPS)]
    assert kinds(events) == before + after
    _, asked, stop, resume, note, finish = events
    assert asked["message"].startswith("SIGTERM: saving") and "after update 1 of 4 (SIGTERM)" in stop["message"]
    assert "checkpoint-1, update 1 of 4, on 1 × CPU" in resume["message"] and "0.002 (was 0.001)" in note["message"]
    assert finish["message"].startswith("4 updates, ") and "without a word" not in resume["message"]
    for event in (events[0], resume):
        assert event["command"][0] == "pretrain.py" and str(flags) in event["command"]
        assert set(event["versions"]) == {"python", "w2v2", "torch", "transformers", "accelerate", "datasets"}
        assert (event["device"], event["num_processes"], event["precision"]) == ("CPU", 1, "fp32")


def test_a_bug_is_told_and_a_torn_line_harms_none_after_it(flags, tmp_path, monkeypatch):
    def crash():
        raise RuntimeError("many lines\nand the last")

    with monkeypatch.context() as patch:
        fail_at(patch, 4, crash)
        with pytest.raises(RuntimeError, match="the last"):
            run(flags, tmp_path / "run")
    path = tmp_path / "run" / EVENTS_FILE
    assert kinds(events_of(tmp_path / "run")) == [("start", 0), ("stop", 3)]
    assert events_of(tmp_path / "run")[1]["message"] == "RuntimeError: and the last"
    (tmp_path / "run/checkpoint-3").mkdir()  # of which nothing was written: damaged, and passed over
    whole = path.read_text()
    path.write_text(whole + '{"time": "20')
    assert run(flags, tmp_path / "run", *AUTO) == 0
    assert path.read_text().startswith(whole + '{"time": "20\n')
    path.write_text(path.read_text().replace('{"time": "20\n', ""))
    events = events_of(tmp_path / "run")[2:]
    assert kinds(events) == [("warning", 2), ("resume", 2), ("finish", STEPS)]
    assert "checkpoint-3 is damaged, so the one before it is tried" in events[0]["message"]
    assert run(flags, tmp_path / "run", "--overwrite_output_dir") == 0
    assert kinds(events_of(tmp_path / "run")) == [("start", 0), ("finish", STEPS)]


def test_urls_are_told_without_their_secrets(flags, tmp_path, caplog):
    """By the events and the page; the file that repeats the run has them whole."""
    secret = "https://me:s3cret@host/{0..9}.tar?sign=s3cret"
    assert run(flags, tmp_path / "run", "--data_description", secret) == 0
    log = EventLog(SimpleNamespace(output_dir=tmp_path / "run"), Accelerator(cpu=True))
    log.add("warning", f"{secret}: no such file")
    told = [str(log._early), str(events_of(tmp_path / "run")), (tmp_path / "run/report.html").read_text()]
    assert all("https://host/{0..9}.tar?…" in text and "s3cret" not in text for text in told)
    assert "tar?…: no such file" in told[0] and secret in (tmp_path / "run/pretrain_config.yaml").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_takes_no_events_ends_no_run(flags, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / EVENTS_FILE).symlink_to("/dev/full")
    assert run(flags, tmp_path / "run") == 0
    (warning,) = [message for message in caplog.messages if EVENTS_FILE in message]
    assert "No space left on device" in warning


@pytest.mark.parametrize("heard_of", [2, 3])
def test_a_resume_tells_of_a_kill(flags, tmp_path, monkeypatch, capsys, heard_of):
    """Whose last sign is a record or the checkpoint: a kill leaves no event."""
    with monkeypatch.context() as patch:
        fail_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(flags, tmp_path / "run") == RESUMABLE
    path, metrics = tmp_path / "run" / EVENTS_FILE, tmp_path / "run" / METRICS_FILE
    if heard_of > 2:
        metrics.write_bytes(metrics.read_bytes() + json_line({"step": heard_of}) + b'{"step": 9')
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    capsys.readouterr()
    assert run(flags, tmp_path / "run", *AUTO) == 0
    for text in (capsys.readouterr().out, events_of(tmp_path / "run")[1]["message"]):
        assert f"; the run before ended without a word after update {heard_of} at 20" in text
