"""The real script, end to end, on a few seconds of tones: its files, its numbers, and that a run can be killed and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TRAINED, run_here, write_recipe
from hub_stand_in import HubStandIn
from safetensors.torch import load_file, save_file
from tiny_run import flip, tensors
from transformers import Wav2Vec2ForPreTraining

import pretrain
from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor, EffectiveBatches
from w2v2.data.cutting import cut
from w2v2.train.durable import write_checksums
from w2v2.train.log import read_metrics
from w2v2.train.resume import CHECKSUMS, find_damage

REPOSITORY = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 16, 4
BATCH_HOURS, GRID_SECONDS, SEED = 0.004, 0.32, 42
NOISY = dict(hidden_dropout=0.1, attention_dropout=0.1, feat_quantizer_dropout=0.1, layerdrop=0.3)
TIMINGS = ("audio_seconds_per_second", "data_wait_fraction")
TRAINING_KEYS = set(
    "step epoch audio_hours loss contrastive_loss diversity_loss feature_penalty accuracy codebook_perplexity "
    "codebook_perplexity_hard gumbel_temperature learning_rate grad_norm masked_frames batch_hours audio_seconds_per_second "
    "data_wait_fraction cropped_fraction padded_fraction distractors_left code_entropy skipped_audio skipped_updates "
    "num_processes".split()
)
PLAN_KEYS = set(
    "utterances hours dropped batch_hours micro_batches_per_update updates_per_epoch epochs warnings".split()
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return write_recipe(
        tmp_path_factory.mktemp("pretrain"),
        NOISY,
        batch_hours=BATCH_HOURS,
        micro_batch_seconds=even_budget(TRAINED),
        length_grid_seconds=GRID_SECONDS,
        max_steps=STEPS,
        eval_steps=6,
        save_steps=SAVE_STEPS,
        dataloader_num_workers=0,
        seed=SEED,
        report_to=["tensorboard"],
        use_cpu=True,
    )


def even_budget(seconds) -> float:
    """Seconds in a micro-batch at which one process cuts every update into an even number of pieces: two processes then cut alike."""
    batches = EffectiveBatches(
        np.round(np.asarray(seconds) * 16_000).astype(int),
        batch_samples=round(BATCH_HOURS * 3600 * 16_000),
        crop_samples=round(15.6 * 16_000),
        grid_samples=round(GRID_SECONDS * 16_000),
        seed=SEED,
    )
    drawn, cursor = [], Cursor()
    for _ in range(STEPS):
        crops, cursor = batches.draw(cursor)
        drawn.append(np.sort(crops.num_samples)[::-1])
    for budget in np.arange(3.0, 12.0, 0.05).round(2).tolist():
        found = [[cut(lengths, ranks, round(budget * 16_000)) for lengths in drawn] for ranks in (1, 2)]
        if all(one[1] == two[1] and len(one[1]) == one[0] == 2 * two[0] for one, two in zip(*found, strict=True)):
            return budget
    raise AssertionError("no budget cuts every update into an even number of pieces: take other lengths")


def start(flags, output_dir, *more, launcher=()):
    command = [sys.executable, *launcher, "pretrain.py", flags, "--output_dir", output_dir, *more]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    log = open(f"{output_dir}.log", "w")
    return subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=environment, stdout=log, stderr=log)


def finish(process, output_dir):
    assert process.wait(timeout=300) == 0, Path(f"{output_dir}.log").read_text()
    return output_dir


@pytest.fixture(scope="module")
def whole_run(flags, tmp_path_factory):
    """An uninterrupted run."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    return finish(start(flags, output_dir), output_dir)


def without_timings(output_dir):
    return [
        {k: v for k, v in r.items() if k not in (*TIMINGS, "num_processes")}
        for r in read_metrics(output_dir / "metrics.jsonl")
    ]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_the_files_that_users_touch(whole_run):
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    due = {f"checkpoint-{step}" for step in range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)}
    assert names(whole_run) >= model | due | {"README.md", "pretrain_config.yaml", "metrics.jsonl", "plan.json"}
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
    for r in training:
        total = r["contrastive_loss"] + 0.1 * r["diversity_loss"] + 10 * r["feature_penalty"]
        assert r["loss"] == pytest.approx(total, rel=1e-5)
    validation = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in validation] == [6, 12, 16]
    measures = {"loss", "contrastive_loss", "diversity_loss", "feature_penalty", "accuracy", "codebook_perplexity"}
    assert all(set(r) >= {"step", "epoch", "audio_hours"} | {f"eval_{name}" for name in measures} for r in validation)
    assert len({r["eval_masked_frames"] for r in validation}) == 1


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_to_the_bit(flags, whole_run):
    """Dropout, layerdrop and Gumbel noise are on; the second part even decodes in other processes."""
    output_dir = whole_run.with_name("killed")
    process = start(flags, output_dir)
    metrics = output_dir / "metrics.jsonl"
    try:
        while process.poll() is None:
            if (output_dir / "checkpoint-4").exists() and metrics.read_bytes().count(b"\n") > 6:
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, Path(f"{output_dir}.log").read_text()
    assert not (output_dir / f"checkpoint-{STEPS}").exists() and metrics.read_bytes().count(b"\n") > 6

    more = ("--resume_from_checkpoint", "auto", "--dataloader_num_workers", 1)
    finish(start(flags, output_dir, *more), output_dir)
    assert "resuming" in Path(f"{output_dir}.log").read_text()
    assert without_timings(output_dir) == without_timings(whole_run)
    for name in ("model.safetensors", f"checkpoint-{STEPS}/training_state/optimizer.safetensors"):
        found, expected = load_file(output_dir / name), load_file(whole_run / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_two_processes_give_the_curve_of_one(flags, whole_run):
    """At the same cut even dropout and Gumbel noise are the same wherever a micro-batch runs, so only rounding differs."""
    output_dir = whole_run.with_name("two_processes")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2_processes.yaml"]
    finish(start(flags, output_dir, launcher=launcher), output_dir)
    assert json.loads((output_dir / "plan.json").read_text())["num_processes"] == 2
    found, expected = without_timings(output_dir), without_timings(whole_run)
    assert [set(r) for r in found] == [set(r) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert {k: ours[k] for k in ("step", "epoch", "audio_hours")} == {
            k: theirs[k] for k in ("step", "epoch", "audio_hours")
        }
        for name in theirs.keys() - {"eval_padded_fraction"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (name, theirs["step"])


def test_a_dry_run_plans_and_trains_nothing(flags, tmp_path, capsys):
    assert run_here(pretrain.main, flags, "--output_dir", tmp_path / "run", "--dry_run") == 0
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert set(plan) >= PLAN_KEYS
    assert names(tmp_path / "run") == {"plan.json"}
    assert plan["utterances"] == 20 and plan["dropped"] == {} and plan["batch_hours"] >= BATCH_HOURS
    assert plan["micro_batches_per_update"] % 2 == 0
    assert {w["code"] for w in plan["warnings"]} == {"small_effective_batch"} and all(
        w["message"] for w in plan["warnings"]
    )
    assert f"{plan['hours']:.2f} h in 20 utterances" in capsys.readouterr().out


def here(flags, output_dir, *more):
    return run_here(pretrain.main, flags, "--output_dir", output_dir, "--report_to", "none", *more)


def auto(flags, output_dir, *more):
    short = ("--max_steps", 6, "--save_steps", 3, "--eval_steps", 3)
    return here(flags, output_dir, "--micro_batch_seconds", "auto", *short, *more)


@pytest.fixture
def found_crops(monkeypatch):
    """Sets what the search finds; None: there must be none."""

    def find(crops):
        def fit(trial, share):
            assert crops is not None, "searched, though the number is known"
            assert 1 < crops < share
            trial.run(crops)
            return crops * trial.longest / SAMPLING_RATE, "more would not fit"

        monkeypatch.setattr(pretrain, "fit", fit)

    return find


def same_to_the_bit(found, expected, last):
    assert without_timings(found) == without_timings(expected)
    ours, theirs = (tensors(folder / f"checkpoint-{last}") for folder in (found, expected))
    models = [load_file(folder / "model.safetensors") for folder in (found, expected)]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def test_a_disk_full_at_a_save_ends_the_run_with_a_line_or_is_waited_out(flags, tmp_path, monkeypatch, capsys):
    whole, stopped, warned = (tmp_path / name for name in ("whole", "stopped", "warned"))
    short, saves = ("--max_steps", 6, "--save_steps", 2), []

    def full_once(tensors, path):
        saves.append(path)
        if len(saves) == 2:
            raise OSError(28, "No space left on device", str(path))
        save_file(tensors, path)

    assert here(flags, whole, *short) == 0
    monkeypatch.setattr("w2v2.train.checkpoint.save_file", full_once)
    capsys.readouterr()
    assert here(flags, stopped, *short) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "checkpoint-4 could not be saved" in line and "checkpoint-2" in line and "No space left" in line
    assert here(flags, stopped, *short, "--resume_from_checkpoint", "auto") == 0
    same_to_the_bit(stopped, whole, last=6)
    saves.clear()
    assert here(flags, warned, *short, "--save_failure", "warn") == 0
    assert {f"checkpoint-{step}" for step in (2, 4, 6)} - names(warned) == {"checkpoint-4"}
    same_to_the_bit(warned, whole, last=6)

    # And from behind two damaged ones the same run comes about again.
    flip(stopped / "checkpoint-6/training_state/optimizer.safetensors", 9_999)
    os.truncate(stopped / "checkpoint-4/model.safetensors", 9_999)
    capsys.readouterr()
    assert here(flags, stopped, *short, "--resume_from_checkpoint", "auto") == 0
    assert "checkpoint-2, after 2 updates" in capsys.readouterr().out
    same_to_the_bit(stopped, whole, last=6)
    assert all(find_damage(stopped / f"checkpoint-{step}") is None for step in (2, 4, 6))


def test_a_fitted_run_says_what_it_found_and_goes_on_with_it_to_the_bit(flags, tmp_path, capsys, found_crops):
    whole, resumed, other = (tmp_path / name for name in ("whole", "resumed", "other"))
    found_crops(2)
    assert auto(flags, whole) == 0
    printed = capsys.readouterr().out
    seconds = json.loads((whole / "plan.json").read_text())["micro_batch_seconds"]
    assert "micro-batch   auto: more would not fit\n" in printed
    assert yaml.safe_load((whole / "pretrain_config.yaml").read_text())["micro_batch_seconds"] == seconds
    state = Path("checkpoint-3/training_state/state.json")
    values = json.loads((whole / state).read_text())
    assert (values["micro_batch_seconds"], values["num_processes"]) == (seconds, 1)
    assert {w["code"] for w in json.loads((whole / "plan.json").read_text())["warnings"]}.isdisjoint(
        {"micro_batch_auto"}
    )

    for folder in (resumed, other):
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoint-6")
    found_crops(None)
    assert auto(flags, resumed, "--resume_from_checkpoint", "auto") == 0
    assert f"micro-batch   auto: {seconds:.1f} s, as before the checkpoint\n" in capsys.readouterr().out
    assert without_timings(resumed) == without_timings(whole)
    for name in ("model.safetensors", "checkpoint-6/training_state/optimizer.safetensors"):
        ours, theirs = load_file(resumed / name), load_file(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert yaml.safe_load((resumed / "pretrain_config.yaml").read_text())["micro_batch_seconds"] == seconds

    # On another number of processes, and from a checkpoint that does not say, the search is made again.
    found_crops(3)
    for changed in (
        values | {"num_processes": 2},
        {k: v for k, v in values.items() if k[:6] not in ("micro_", "num_pr")},
    ):
        shutil.rmtree(other / "checkpoint-6", ignore_errors=True)
        (other / state).write_text(json.dumps(changed))
        write_checksums(other / "checkpoint-3", CHECKSUMS)
        assert auto(flags, other, "--resume_from_checkpoint", "auto") == 0
        plan = json.loads((other / "plan.json").read_text())
        assert plan["micro_batch_seconds"] == pytest.approx(1.5 * seconds)
    assert without_timings(other) != without_timings(whole)


def test_a_search_changes_nothing_of_the_run_that_follows(flags, tmp_path, found_crops):
    found_crops(2)
    fitted, given = tmp_path / "fitted", tmp_path / "given"
    assert auto(flags, fitted) == 0
    seconds = json.loads((fitted / "plan.json").read_text())["micro_batch_seconds"]
    assert auto(flags, given, "--micro_batch_seconds", seconds) == 0
    assert without_timings(fitted) == without_timings(given)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (fitted, given))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_dry_run_with_auto_plans_with_an_assumed_size_and_says_so(flags, tmp_path, found_crops):
    found_crops(None)
    assert auto(flags, tmp_path / "run", "--dry_run") == 0
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    (message,) = [w["message"] for w in plan["warnings"] if w["code"] == "micro_batch_auto"]
    assert plan["micro_batch_seconds"] == 200.0 and "200 s" in message
    assert names(tmp_path / "run") == {"plan.json"}


def test_a_run_is_not_resumed_with_other_batches(flags, whole_run, capsys):
    before = (whole_run / "metrics.jsonl").read_bytes()
    for name, value, old in [("seed", 43, SEED), ("batch_hours", 0.005, BATCH_HOURS), ("mask_time_prob", 0.5, 0.65)]:
        capsys.readouterr()
        assert here(flags, whole_run, "--resume_from_checkpoint", "auto", f"--{name}", value) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert name in line and str(value) in line and str(old) in line
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_refused_resumed_to_no_effect_and_overwritten_when_asked(flags, tmp_path, capsys):
    short = ("--max_steps", 2, "--batch_hours", 0.001)
    output_dir = tmp_path / "run"
    assert here(flags, output_dir, *short) == 0
    (output_dir / "notes.txt").write_text("mine")
    first = (output_dir / "model.safetensors").read_bytes()
    assert here(flags, output_dir, *short) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert here(flags, output_dir, *short, "--resume_from_checkpoint", "auto") == 0
    assert (output_dir / "model.safetensors").read_bytes() == first
    assert here(flags, output_dir, *short, "--overwrite_output_dir", "--seed", 43) == 0
    assert (output_dir / "model.safetensors").read_bytes() != first
    assert [r["step"] for r in read_metrics(output_dir / "metrics.jsonl") if "loss" in r] == [1, 2]
    assert (output_dir / "notes.txt").read_text() == "mine"


def test_given_weights_start_a_run_of_their_own(flags, whole_run, tmp_path):
    values = yaml.safe_load(flags.read_text()) | dict(learning_rate=1e-9, batch_hours=0.001)
    del values["config_name"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    arguments = ("--model_name_or_path", whole_run, "--max_steps", 1)
    assert here(tmp_path / "config.yaml", tmp_path / "run", *arguments) == 0
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in records] == [1, 1] and records[0]["epoch"] < 1
    assert records[0]["audio_hours"] == records[0]["batch_hours"]
    found, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", whole_run))
    assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given)
    last = [r for r in read_metrics(whole_run / "metrics.jsonl") if "eval_loss" in r][-1]
    assert records[1]["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-4)


def test_help_lists_every_flag(capsys):
    assert run_here(pretrain.main, "--help") == 0
    text = capsys.readouterr().out
    for name in ("train_data", "diversity_scope", "resume_from_checkpoint", "max_skipped_fraction", "batch_hours"):
        assert f"--{name}" in text


def test_each_save_and_the_end_are_pushed_and_a_failing_hub_does_no_harm(flags, tmp_path):
    with HubStandIn() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
        command = [sys.executable, REPOSITORY / "pretrain.py", flags, "--push_to_hub", "--hub_model_id", "speech-lab/tiny",
                   "--max_steps", "2", "--save_steps", "1"]  # fmt: skip

        def run(name, *more):
            return subprocess.run(
                [*command, "--output_dir", tmp_path / name, *more],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )

        first = run("healthy", "--hub_strategy", "every_save", "--hub_private_repo")
        assert first.returncode == 0, first.stderr
        assert hub.created[0].get("visibility") == "private"
        assert hub.commits[-1] == "Model after 2 updates"
        assert hub.files["model.safetensors"] == (tmp_path / "healthy" / "model.safetensors").read_bytes()
        assert {"config.json", "preprocessor_config.json", "README.md"} <= set(hub.files)
        assert "hf_secret" not in first.stdout + first.stderr
        hub.failures["/commit/"] = 403
        commits = list(hub.commits)
        second = run("refused")
        assert second.returncode == 0, second.stderr
        assert "403" in second.stderr and hub.commits == commits
        assert (tmp_path / "refused" / "model.safetensors").exists()
