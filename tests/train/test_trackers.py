"""Trackers hold what metrics.jsonl holds, under the project and name that were asked for; what is missing is one line."""

import json
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
from accelerate.utils import LoggerType
from conftest import NO_DROPOUT, ONE_UPDATE, refusal, run_here, tiny_config, write_recipe
from ranks import finish, start_run

import finetune_ctc
import pretrain
from w2v2.train.log import read_metrics

STEPS = 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    values = dict(batch_hours=0.001, micro_batch_seconds=4.0, max_steps=STEPS, save_steps=2, eval_steps=3)
    values |= dict(dataloader_num_workers=0, use_cpu=True, report_to=["none"])
    return write_recipe(tmp_path_factory.mktemp("trackers"), NO_DROPOUT, **values)


def numbers(record):
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}


def test_trackio_and_tensorboard_hold_the_records(flags, tmp_path):
    """Of a run that was stopped and went on."""
    pytest.importorskip("trackio")
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output_dir, more = tmp_path / "run", ["--report_to", "trackio", "tensorboard", "--project", "speech"]
    variables = dict(TRACKIO_DIR=tmp_path / "trackio")
    stopped = start_run(flags, output_dir, *more, "--max_hours", ONE_UPDATE, **variables)
    assert stopped.wait() == 75
    finish(start_run(flags, output_dir, *more, "--resume_from_checkpoint", "auto", **variables), output_dir)
    records = read_metrics(output_dir / "metrics.jsonl")
    assert len(records) == STEPS + 2

    with sqlite3.connect(tmp_path / "trackio/speech.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert len({run_id for run_id, *_ in rows}) == 1 and {name for _, name, *_ in rows} == {"run"}
    assert [(step, json.loads(metrics)) for *_, step, metrics in rows] == [(r["step"], numbers(r)) for r in records]

    events = tensorboard.EventAccumulator(str(output_dir / "runs/run")).Reload()
    assert set(events.Tags()["scalars"]) == {name for record in records for name in numbers(record)}
    for name in ("loss", "audio_hours", "eval_loss", "codebook_coverage_2"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r]
        assert found == expected


def test_wandb_draws_all_curves_against_hours_heard(flags, tmp_path, monkeypatch):
    """A stand-in of its package: what is asked of it."""
    run, asked, told = SimpleNamespace(logged=[], config={}, finish=lambda: None), [], []
    run.define_metric = lambda name, step_metric: asked.append((name, step_metric))
    run.log = lambda values, step: run.logged.append(dict(values, step=step))
    package = SimpleNamespace(
        __spec__=ModuleSpec("wandb", None), config=SimpleNamespace(update=lambda values, **_: told.append(values))
    )
    package.init = lambda **options: asked.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    more = ["--report_to", "wandb", "--project", "speech", "--run_name", "first"]
    more += ["--data_description", "https://me:s3cret@host/{0..9}.tar?sign=s3cret"]
    assert run_here(pretrain.main, flags, "--output_dir", tmp_path / "run", *more) == 0
    assert asked == [{"project": "speech", "name": "first"}, ("*", "audio_hours")]
    assert "'https://host/{0..9}.tar?…'" in str(told) and "s3cret" not in str(told)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert run.logged == [numbers(r) | {"step": r["step"]} for r in records] and "audio_hours" in run.logged[-1]


@pytest.fixture
def recogniser(tmp_path):
    tiny_config().save_pretrained(tmp_path / "model")
    (tmp_path / "train.csv").write_text("audio,text\na.wav,a\n")
    data = [f"--{name}_data={tmp_path / 'train.csv'}" for name in ("train", "validation")]
    return [*data, f"--config_name={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}", "--use_cpu"]


@pytest.mark.parametrize("script", [pretrain, finetune_ctc], ids=["pretrain", "finetune_ctc"])
def test_a_missing_package_and_a_mistyped_name_are_one_line(flags, recogniser, tmp_path, monkeypatch, capsys, script):
    words = recogniser if script is finetune_ctc else [flags, "--output_dir", tmp_path / "run"]
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    line = refusal(capsys, script.main, *words, "--report_to", "wandb", "tensorboard", "trackio")
    assert "--report_to trackio wandb: not installed: pip install trackio wandb, or" in line
    refusal(capsys, script.main, *words, "--report_to", "tensorbord", named=["tensorbord", "did you mean tensorboard?"])
    refusal(
        capsys, script.main, *words, "--report_to", "xyz", named=["xyz", "there are ", "tensorboard, trackio, wandb"]
    )
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_one_line(flags, tmp_path, monkeypatch, capsys):
    def start(self):
        raise RuntimeError("not logged in\nanywhere")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", start)
    words = [flags, "--output_dir", tmp_path / "run", "--report_to", "tensorboard"]
    refusal(capsys, pretrain.main, *words, named=["--report_to tensorboard: not logged in anywhere; mend that"])
    events = [json.loads(line)["event"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert events == ["start", "stop"]
