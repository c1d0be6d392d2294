"""The real script, end to end, on a few seconds of tones: its files, its numbers, and that a run can be killed and go
on.
"""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from conftest import NOISY, assert_same_run, error_line, read_curve, run_here, write_recipe
from ranks import TORCHRUN, count_records, finish, log_of, start_run, wait_for_records
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2ForPreTraining

import pretrain
from w2v2.train.log import read_metrics

STEPS, SAVE_STEPS = 16, 4
BATCH_HOURS = 0.004
MICRO_BATCH_SECONDS = 10.35  # cuts every update into an even number of pieces: two processes then cut alike
TRAINING_KEYS = set(
    "step epoch audio_hours loss contrastive_loss diversity_loss feature_penalty accuracy codebook_perplexity "
    "codebook_perplexity_hard gumbel_temperature learning_rate grad_norm masked_frames batch_hours audio_seconds_per_second "
    "data_wait_fraction cropped_fraction padded_fraction distractors_left code_entropy skipped_audio skipped_updates "
    "num_processes constant_guess_accuracy codebook_coverage_1 codebook_coverage_2 codebook_entropy_1 "
    "codebook_entropy_2".split()
)
PLAN_KEYS = {"utterances", "hours", "dropped", "batch_hours", "micro_batches_per_update", "updates_per_epoch"}
PLAN_KEYS |= {"epochs", "warnings"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    values = dict(batch_hours=BATCH_HOURS, micro_batch_seconds=MICRO_BATCH_SECONDS, max_steps=STEPS, eval_steps=6)
    values |= dict(save_steps=SAVE_STEPS, dataloader_num_workers=0, report_to=["tensorboard"], use_cpu=True)
    return write_recipe(tmp_path_factory.mktemp("pretrain"), NOISY, **values)


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    """An uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    return finish(start_run(flags, output_dir), output_dir)


def names(folder):
    return {path.name for path in folder.iterdir()}


def counts_of(folder):
    """(update, counts of the codes) of each validation."""
    lines = (folder / "codebook_use.jsonl").read_text().splitlines()
    return [(record["step"], record["counts"]) for record in map(json.loads, lines)]


def test_a_run_leaves_the_files_that_users_touch(whole_run):
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    due = {f"checkpoint-{step}" for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)}
    assert names(whole_run) >= model | due | {
        "README.md",
        "pretrain_config.yaml",
        "metrics.jsonl",
        "plan.json",
        "report.html",
    }
    page = (whole_run / "report.html").read_text(encoding="utf-8")
    assert f"All {STEPS} updates are done" in page and "What was planned" in page and "Codebook 2" in page
    assert not list(whole_run.glob(".unfinished-*")) and "skipped_audio.jsonl" not in names(whole_run)
    assert list((whole_run / "plots").glob("*.png")) and list((whole_run / "runs").rglob("events.*"))
    for checkpoint in due:
        assert names(whole_run / checkpoint) == model | {"training_state"}
    last, final = (load_file(f / "model.safetensors") for f in (whole_run / f"checkpoint-{STEPS}", whole_run))
    assert all(torch.equal(last[name], final[name]) for name in final)
    _, report = Wav2Vec2ForPreTraining.from_pretrained(whole_run, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    resolved = yaml.safe_load((whole_run / "pretrain_config.yaml").read_text())
    assert resolved["batch_hours"] == BATCH_HOURS and resolved["adam_beta2"] == 0.98


def test_metrics_have_every_name_and_add_up(whole_run):
    records = read_metrics(whole_run / "metrics.jsonl")
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, STEPS + 1))
    assert all(set(r) == TRAINING_KEYS for r in training)
    heard = np.cumsum([r["batch_hours"] for r in training])
    assert [r["audio_hours"] for r in training] == pytest.approx(heard.tolist())
    assert all(r["batch_hours"] >= BATCH_HOURS for r in training)
    assert all(0 < r["constant_guess_accuracy"] <= 1 for r in training)
    for r in training:
        total = r["contrastive_loss"] + 0.1 * r["diversity_loss"] + 10 * r["feature_penalty"]
        assert r["loss"] == pytest.approx(total, rel=1e-5)
    validation = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in validation] == [6, 12, 16]
    measures = {"loss", "contrastive_loss", "diversity_loss", "feature_penalty", "accuracy", "codebook_perplexity"}
    measures |= {"constant_guess_accuracy", "codebook_coverage_1", "codebook_entropy_2"}
    assert all(set(r) >= {"step", "epoch", "audio_hours"} | {f"eval_{name}" for name in measures} for r in validation)
    assert len({r["eval_masked_frames"] for r in validation}) == 1


def test_a_killed_run_resumes_to_the_bit(flags, whole_run):
    """Dropout, layerdrop and Gumbel noise are on; the second part even decodes in other processes."""
    output_dir = whole_run.with_name("killed")
    process = start_run(flags, output_dir)
    try:
        wait_for_records(process, output_dir, 7)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log_of(output_dir)
    assert (output_dir / "checkpoint-4").exists() and not (output_dir / f"checkpoint-{STEPS}").exists()
    assert count_records(output_dir) > 6
    more = ("--resume_from_checkpoint", "auto", "--dataloader_num_workers", 1)
    finish(start_run(flags, output_dir, *more), output_dir)
    assert "resuming" in log_of(output_dir)
    assert_same_run(output_dir, whole_run)
    assert counts_of(output_dir) == counts_of(whole_run)


@pytest.mark.parametrize("call", [2, 3], ids=["after update 12", "at the end"])
def test_a_validation_that_a_kill_left_out_is_made_up_for(flags, whole_run, tmp_path, monkeypatch, call):
    """A save comes first where both are due: no validation, however long, loses a checkpoint."""
    calls, validate = [], pretrain.validate

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise SystemExit(9)
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "validate", killed)
        assert run(flags, tmp_path / "run") == 9
    step = {2: 12, 3: STEPS}[call]
    assert (tmp_path / f"run/checkpoint-{step}").exists() and read_curve(tmp_path / "run")[-1]["step"] == step
    assert run(flags, tmp_path / "run", "--resume_from_checkpoint", "auto") == 0
    assert_same_run(tmp_path / "run", whole_run)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert run(flags, tmp_path / "run", "--resume_from_checkpoint", "auto") == 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_two_processes_give_the_curve_of_one(flags, whole_run):
    """At the same cut even dropout and Gumbel noise are the same wherever a micro-batch runs, so only rounding differs."""
    output_dir = whole_run.with_name("two_processes")
    finish(start_run(flags, output_dir, launcher=TORCHRUN), output_dir)
    assert json.loads((output_dir / "plan.json").read_text())["num_processes"] == 2
    assert_same_run(output_dir, whole_run, exactly=False)
    events = [json.loads(line)["event"] for line in (output_dir / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "finish"]  # of the main process alone
    ours, theirs = (np.array([counts for _, counts in counts_of(folder)]) for folder in (output_dir, whole_run))
    assert ours.shape == (3, 2, 12) and (ours.sum(-1) == theirs.sum(-1)).all() and np.abs(ours - theirs).sum() <= 4


def run(flags, output_dir, *more):
    return run_here(pretrain.main, flags, "--output_dir", output_dir, "--report_to", "none", *more)


@pytest.mark.parametrize(("size", "codes"), [(None, set()), ("auto", {"micro_batch_auto"})])
def test_a_dry_run_plans_and_trains_nothing(flags, tmp_path, capsys, size, codes):
    more = ("--micro_batch_seconds", size) if size else ()
    assert run(flags, tmp_path / "run", "--dry_run", *more) == 0
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert set(plan) >= PLAN_KEYS
    assert names(tmp_path / "run") == {"plan.json", "cache"}
    assert plan["utterances"] == 20 and plan["dropped"] == {} and plan["batch_hours"] >= BATCH_HOURS
    assert size or plan["micro_batches_per_update"] % 2 == 0
    assert {w["code"] for w in plan["warnings"]} == {"small_effective_batch"} | codes
    assert all(w["message"] for w in plan["warnings"])
    assert f"{plan['hours']:.2f} h in 20 utterances" in capsys.readouterr().out


def test_a_full_disk_ends_a_run_or_is_waited_out(flags, tmp_path, monkeypatch, capsys):
    whole, stopped, warned = (tmp_path / name for name in ("whole", "stopped", "warned"))
    short, auto, saves = ("--max_steps", 6, "--save_steps", 2), ("--resume_from_checkpoint", "auto"), []

    def full_once(tensors, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path)

    assert run(flags, whole, *short) == 0
    monkeypatch.setattr("w2v2.train.checkpoint.save_file", full_once)
    capsys.readouterr()
    assert run(flags, stopped, *short) == 2
    line = error_line(capsys.readouterr().err)
    assert "checkpoint-4 could not be saved" in line and "checkpoint-2" in line and "No space left" in line
    assert run(flags, stopped, *short, *auto) == 0
    assert_same_run(stopped, whole)
    saves.clear()
    assert run(flags, warned, *short, "--save_failure", "warn") == 0
    assert {f"checkpoint-{step}" for step in (2, 4, 6)} - names(warned) == {"checkpoint-4"}
    assert_same_run(warned, whole)
    _, failure, _ = map(json.loads, (warned / "events.jsonl").read_text().splitlines())
    assert failure["event"] == "warning" and failure["step"] == 4 and "checkpoint-4 could not" in failure["message"]


def test_auto_holds_one_micro_batch_for_a_whole_run(flags, tmp_path, capsys):
    """It is that of the same number given by hand; a resumed run takes its checkpoint's, whatever it would find itself."""
    found, given, resumed = (tmp_path / name for name in ("found", "given", "resumed"))
    short, auto = ("--max_steps", 6, "--save_steps", 3, "--eval_steps", 3), ("--micro_batch_seconds", "auto")

    def size(folder):
        return yaml.safe_load((folder / "pretrain_config.yaml").read_text())["micro_batch_seconds"]

    assert run(flags, found, *short, *auto) == 0
    assert size(found) == json.loads((found / "plan.json").read_text())["micro_batch_seconds"]
    assert run(flags, given, *short, "--micro_batch_seconds", size(found) / 2) == 0
    shutil.copytree(given, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    capsys.readouterr()
    assert run(flags, resumed, *short, *auto, "--resume_from_checkpoint", "auto") == 0
    assert "s, as before the checkpoint\n" in capsys.readouterr().out
    assert_same_run(resumed, given)
    assert size(resumed) == size(given) == size(found) / 2 and read_curve(found) != read_curve(given)

    assert run(flags, given, *short, "--micro_batch_seconds", size(found), "--overwrite_output_dir") == 0
    assert_same_run(found, given)


def test_given_weights_start_a_run_of_their_own(flags, whole_run, tmp_path):
    values = yaml.safe_load(flags.read_text()) | dict(learning_rate=1e-9, batch_hours=0.001)
    del values["config_name"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    arguments = ("--model_name_or_path", whole_run, "--max_steps", 1)
    assert run(tmp_path / "config.yaml", tmp_path / "run", *arguments) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records] == [1, 1] and records[0]["epoch"] < 1
    assert records[0]["audio_hours"] == records[0]["batch_hours"]
    found, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole_run))
    assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given)
    last = [r for r in read_metrics(whole_run / "metrics.jsonl") if "eval_loss" in r][-1]
    assert records[1]["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-4)


def test_validation_hears_the_same_whatever_the_seed(flags, whole_run, tmp_path):
    """Crops, masks and distractors: the weights stay as they are, and so do the figures."""
    values = yaml.safe_load(flags.read_text()) | dict(learning_rate=1e-12, crop_seconds=1.2, batch_hours=0.001)
    values |= dict(config_name=None, model_name_or_path=str(whole_run), max_steps=1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    found = []
    for seed in (1, 2):
        assert run(tmp_path / "config.yaml", tmp_path / str(seed), "--seed", seed) == 0
        training, validation = read_curve(tmp_path / str(seed))
        found.append({name: value for name, value in validation.items() if name.startswith("eval_")})
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0]["eval_masked_frames"] > 100
