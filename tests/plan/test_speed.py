"""The probe of a run's speed: it leaves no trace, and its figures add up."""

import json
import shutil
import time

import pytest
from conftest import NOISY, assert_same_run, refusal, run_here, write_recipe

import pretrain
from w2v2.errors import UserError
from w2v2.plan import speed
from w2v2.train.log import read_metrics

STEPS, SAVE_STEPS, EVAL_STEPS = 7, 4, 3


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    values = dict(
        batch_hours=0.004, micro_batch_seconds=10.35, max_steps=STEPS, eval_steps=EVAL_STEPS, report_to=["none"]
    )
    return write_recipe(
        tmp_path_factory.mktemp("speed"), NOISY, **values | dict(dataloader_num_workers=0, use_cpu=True)
    )


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(flags, output_dir) == 0
    return output_dir


def run(flags, output_dir, *more):
    return run_here(pretrain.main, flags, "--output_dir", output_dir, *more)


def read_plan(folder):
    return json.loads((folder / "plan.json").read_text())


def test_a_probed_run_is_the_same_to_the_bit(flags, whole_run, tmp_path):
    assert run(flags, tmp_path / "run", "--probe_updates", 2, "--dataloader_num_workers", 1) == 0
    assert_same_run(tmp_path / "run", whole_run)
    shutil.rmtree(tmp_path / f"run/checkpoint-{STEPS}")
    assert run(flags, tmp_path / "run", "--probe_updates", 1, "--resume_from_checkpoint", "auto") == 0
    assert_same_run(tmp_path / "run", whole_run)
    probe = read_plan(tmp_path / "run")["probe"]
    assert (probe["updates_left"], probe["validations"]) == (STEPS - SAVE_STEPS, 2)
    assert "probe_updates" not in (tmp_path / "run/pretrain_config.yaml").read_text()


def test_a_dry_run_is_probed_and_becomes_a_run_of_so_many_device_hours(flags, whole_run, tmp_path, capsys):
    refusal(capsys, pretrain.main, flags, "--output_dir", tmp_path / "run", "--gpu_hours", 1, named=["--dry_run"])
    assert not (tmp_path / "run").exists()
    assert run(flags, tmp_path / "run", "--probe_updates", 3, "--gpu_hours", 2, "--dry_run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"cache"} == {"plan.json"}
    plan, probe, said = read_plan(tmp_path / "run"), read_plan(tmp_path / "run")["probe"], capsys.readouterr().out
    assert probe["updates"] == 3 and probe["updates_left"] == STEPS
    assert 0 < probe["fastest_update"] <= probe["seconds_per_update"] <= probe["slowest_update"]
    assert probe["validations"] == sum("eval_loss" in record for record in read_metrics(whole_run / "metrics.jsonl"))
    seconds = STEPS * probe["seconds_per_update"] + probe["validations"] * probe["validation_seconds"]
    assert 3600 * probe["run_hours"] == pytest.approx(seconds) and probe["device_hours"] == probe["run_hours"]
    # Batches hold at least `batch_hours`, and the first three are not the mean of all.
    heard = probe["audio_seconds_per_second"] * probe["seconds_per_update"]
    assert heard == pytest.approx(3600 * plan["batch_hours"], rel=0.2)
    assert f"for {STEPS} updates and 3 validation(s)" in said
    steps = plan["proposal"]["max_steps"]
    hours = steps * plan["batch_hours"] / probe["audio_seconds_per_second"]
    hours += steps / EVAL_STEPS * probe["validation_seconds"] / 3600
    assert plan["proposal"]["batch_hours"] == 0.004 and hours == pytest.approx(2, rel=0.01)
    assert f"--max_steps {steps} " in said and "how sure" in said


class StopAfterTwo:
    """Stands in for the time limit; the first update takes two seconds longer than the second."""

    def __init__(self, hours):
        self.num_asked = 0

    @property
    def is_asked(self):
        self.num_asked += 1
        time.sleep(2 * (self.num_asked == 1))
        return self.num_asked == 2


def test_slow_updates_are_fewer(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "StopRequest", StopAfterTwo)
    assert run(flags, tmp_path / "run", "--probe_updates", 3, "--dry_run") == 0
    plan = read_plan(tmp_path / "run")
    assert plan["probe"]["updates"] == 1
    heard = plan["probe"]["audio_seconds_per_second"] * plan["probe"]["seconds_per_update"]
    assert heard == pytest.approx(3600 * plan["batch_hours"], rel=0.3)  # its rate is of that update alone


def test_a_dry_run_leaves_a_runs_plan_alone(flags, whole_run, tmp_path, capsys):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    before = (folder / "plan.json").read_bytes()
    assert run(flags, folder, "--dry_run", "--max_steps", 99) == 0
    assert (folder / "plan.json").read_bytes() == before
    assert json.loads((folder / "dry_run.json").read_text())["max_steps"] == 99
    assert "dry_run.json: a run lies there" in capsys.readouterr().out


def test_unreadable_validation_does_not_end_a_run(flags, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("none of the validation audio can be read any more")

    monkeypatch.setattr(speed, "validate", refuse)
    assert run(flags, tmp_path / "run", "--probe_updates", 1, "--dry_run") == 0
    assert read_plan(tmp_path / "run")["probe"]["validation_seconds"] == 0
    assert "any more" in capsys.readouterr().out
