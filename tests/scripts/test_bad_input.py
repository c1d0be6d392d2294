"""A user's slip ends a run with exit status 2 and one line that names the file, row or flag and says what to do."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import refusal, run_here, tiny_config, write_csv, write_tones
from ranks import SECONDS, log_of, start_run
from transformers import BertConfig, BertModel, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining

import pretrain
from w2v2.train.log import read_metrics

LENGTHS = [2.0 + number / 10 for number in range(12)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve good files with a manifest, and a tiny model."""
    folder = tmp_path_factory.mktemp("bad_input")
    paths = write_tones(folder / "audio", LENGTHS)
    write_csv(folder / "train.csv", paths, LENGTHS)
    tiny_config().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def finished(corpus):
    """A run of one update."""
    assert run_here(pretrain.main, *flags(corpus, corpus / "finished")) == 0
    return corpus / "finished"


def flags(corpus, output_dir, **changes):
    values = dict(train_data=corpus / "train.csv", config_name=corpus / "model", output_dir=output_dir, max_steps=1)
    values |= dict(batch_hours=0.002, micro_batch_seconds=8, dataloader_num_workers=0, report_to="none", use_cpu=True)
    return [f"--{name}={value}" for name, value in (values | changes).items() if value is not None]


@pytest.fixture
def refused(corpus, tmp_path, capsys):
    """Checks that the script ends with status 2 and one line, in which all of the named things stand."""

    def check(*named, **changes):
        argv = flags(corpus, changes.pop("output_dir", tmp_path / "run"), **changes)
        refusal(capsys, pretrain.main, *argv, named=named)

    return check


def accepted(corpus, output_dir, **changes):
    assert run_here(pretrain.main, *flags(corpus, output_dir, **changes)) == 0
    return read_metrics(output_dir / "metrics.jsonl")[-1]


def test_the_script_itself_exits_with_2_and_one_line(corpus, tmp_path):
    process = start_run("--learning_rat=0.1", tmp_path / "run", *flags(corpus, tmp_path / "run"))
    assert process.wait(SECONDS) == 2
    said = "pretrain.py: error: unknown flag --learning_rat (did you mean --learning_rate?)\n"
    assert log_of(tmp_path / "run") == said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("train_data", None, "is required"),
        ("output_dir", None, "is required"),
        ("batch_hours", 0.0005, "raise it"),  # smaller than an utterance
        ("seed", 2**40, ""),
        ("mask_time_length", 0, ""),
        ("warmup_steps", -5, ""),
        ("diversity_scope", "world", ""),
        ("micro_batch_seconds", 1, "--crop_seconds"),  # smaller than a crop
        ("config_overrides", "hiden_size=3", "hiden_size"),
        ("config_overrides", "hidden_size=wide", "hidden_size"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_flag(refused, name, value, named):
    refused(f"--{name}", named, **{name: value})


@pytest.mark.parametrize(
    ("content", "named"), [(None, ""), ("", ""), ("audio,duration\n", ""), ("voice,colour\na,b\n", "voice, colour")]
)
def test_a_manifest_without_utterances_is_refused(refused, tmp_path, content, named):
    if content is not None:
        (tmp_path / "bad.csv").write_text(content)
    refused(tmp_path / "bad.csv", named, train_data=tmp_path / "bad.csv")


@pytest.mark.parametrize("measured", [False, True], ids=["duration given", "to be measured"])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.wav", None, "does not exist"),
        ("notes.wav", b"this is no audio, only words" * 20, "is not audio"),
        ("empty.wav", b"", "is an empty file"),
    ],
)
def test_unusable_audio_is_named_with_the_reason(refused, tmp_path, name, content, reason, measured):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(path, reason, train_data=write_csv(tmp_path / "train.csv", [path], None if measured else [3.0]))


@pytest.mark.parametrize("min_seconds", [2.0, 0.0])
def test_a_tenth_of_a_second_of_audio(refused, tmp_path, min_seconds):
    [path] = write_tones(tmp_path, [0.1])
    manifest = write_csv(tmp_path / "train.csv", [path])
    refused(manifest, "no utterance is left", "shorter than", train_data=manifest, min_seconds=min_seconds)


def test_stereo_and_other_rates_are_mixed_and_resampled(corpus, tmp_path):
    noise = np.random.default_rng(0).standard_normal((3 * 44_100, 2)) * 0.1
    paths = [tmp_path / name for name in ("stereo.wav", "cd.wav", "stereo_cd.flac", "telephone.wav")]
    soundfile.write(paths[0], noise[: 3 * 16_000], 16_000)
    soundfile.write(paths[1], noise[:, 0], 44_100)
    soundfile.write(paths[2], noise, 44_100)
    soundfile.write(paths[3], noise[: 3 * 8_000, 0], 8_000)
    manifest = write_csv(tmp_path / "train.csv", paths)
    record = accepted(corpus, tmp_path / "run", train_data=manifest, length_grid_seconds=0, batch_hours=12 / 3600)
    assert record["skipped_audio"] == 0
    assert record["batch_hours"] == pytest.approx(12 / 3600)


def test_output_dir_that_is_a_file_or_lies_in_one(corpus, refused):
    refused("--output_dir", output_dir=corpus / "train.csv")
    refused("--output_dir", output_dir=corpus / "train.csv" / "run")


@pytest.mark.parametrize("change", ["num_hidden_layers=1", "hidden_size=48", "num_codevectors_per_group=24"])
def test_checkpoint_of_another_architecture(finished, refused, change):
    run = dict(output_dir=finished, resume_from_checkpoint="auto")
    refused("checkpoint-1", "another architecture", change.split("=")[0], **run, config_overrides=change)


def save_bert(folder):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    BertModel(BertConfig(**sizes)).save_pretrained(folder)


def save_torn(folder):
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(folder)
    os.truncate(folder / "model.safetensors", 500)


@pytest.mark.parametrize(
    ("save", "named"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "config.json"),
        (save_torn, "weights cannot be loaded"),
        (save_bert, "bert"),
        (lambda folder: Wav2Vec2ForCTC(tiny_config()).save_pretrained(folder), "quantizer"),
        (lambda folder: Wav2Vec2ForPreTraining(tiny_config(hidden_size=48)).save_pretrained(folder), "architecture"),
    ],
    ids=["absent", "empty", "torn", "another kind", "fine-tuned", "another size"],
)
def test_a_model_to_start_from_that_is_none(refused, tmp_path, save, named):
    save(tmp_path / "model")
    start = dict(config_name=None, model_name_or_path=tmp_path / "model", config_overrides="hidden_size=32")
    refused(tmp_path / "model", named, **start)


def test_checkpoint_to_resume_that_is_none(finished, refused, tmp_path):
    refused("--resume_from_checkpoint", tmp_path / "absent", resume_from_checkpoint=tmp_path / "absent")
    refused(finished, "--model_name_or_path", resume_from_checkpoint=finished)


def spoiled(corpus, folder, monkeypatch):
    """Twelve utterances of which three cannot be read, each for another reason; only the first is met at the start."""
    monkeypatch.setattr("w2v2.data.utterances.NUM_INSPECTED", 1)
    folder.mkdir()
    paths = [Path(shutil.copy(path, folder)) for path in sorted((corpus / "audio").iterdir())]
    (folder / "notes.wav").write_text("only words")
    tone, _ = soundfile.read(paths[0])
    soundfile.write(folder / "cut.flac", np.tile(tone, 2), 16_000)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:15_000])
    soundfile.write(folder / "short.wav", tone[:8_000], 16_000)
    seconds = [soundfile.info(path).duration for path in paths[:9]]
    notes, *others = [folder / name for name in ("notes.wav", "cut.flac", "short.wav")]
    return write_csv(folder / "train.csv", [notes, *paths[:9], *others], [3.0, *seconds, 3.5, 3.0])


SKIPPING = dict(max_steps=6, logging_steps=1, max_skipped_fraction=0.3, save_total_limit=0)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_too_many_unreadable_files_stop_the_run(corpus, refused, tmp_path, monkeypatch):
    manifest, later = spoiled(corpus, tmp_path / "audio", monkeypatch), tmp_path / "later"
    refused("--max_skipped_fraction 0.01", "notes.wav", train_data=manifest)
    limit = dict(max_skipped_fraction=0.1)
    refused("--max_skipped_fraction 0.1", "2 of 12", output_dir=later, train_data=manifest, **SKIPPING | limit)
    assert len(read_lines(later / "skipped_audio.jsonl")) == 2


def test_unreadable_files_are_skipped_counted_and_listed(corpus, tmp_path, monkeypatch):
    """One of them is found before the first update, and again at a resumption; the others in updates before and after."""
    manifest, run = spoiled(corpus, tmp_path / "audio", monkeypatch), tmp_path / "run"
    more = dict(train_data=manifest, save_steps=1, **SKIPPING)
    accepted(corpus, run, **more)
    records, listed = read_metrics(run / "metrics.jsonl"), read_lines(run / "skipped_audio.jsonl")
    assert sorted(Path(entry["audio"]).name for entry in listed) == ["cut.flac", "notes.wav", "short.wav"]
    assert all(entry["reason"] and entry["id"] for entry in listed)
    before, first, last = (entry["step"] for entry in listed)
    assert before == 0 < first < last and records[-1]["skipped_audio"] == 3 and np.isfinite(records[-1]["loss"])
    for step in range(first + 1, 7):
        shutil.rmtree(run / f"checkpoint-{step}")
    accepted(corpus, run, **more, resume_from_checkpoint=run / f"checkpoint-{first}")
    assert [r["skipped_audio"] for r in read_metrics(run / "metrics.jsonl")] == [r["skipped_audio"] for r in records]
    assert read_lines(run / "skipped_audio.jsonl") == listed


def test_unreadable_validation_audio_is_listed_and_limited(corpus, refused, tmp_path, monkeypatch):
    run, manifest = tmp_path / "run", spoiled(corpus, tmp_path / "audio", monkeypatch)
    more = dict(validation_data=manifest, eval_steps=2, save_steps=1) | SKIPPING
    assert accepted(corpus, run, **more)["eval_skipped_audio"] == 3
    lines = (run / "skipped_validation.jsonl").read_bytes()
    found = [(Path(entry["audio"]).name, entry["step"]) for entry in read_lines(run / "skipped_validation.jsonl")]
    assert sorted(found) == [("cut.flac", 2), ("notes.wav", 0), ("short.wav", 2)]
    shutil.rmtree(run / "checkpoint-6")
    accepted(corpus, run, **more, resume_from_checkpoint="auto")
    assert (run / "skipped_validation.jsonl").read_bytes() == lines and not (run / "skipped_audio.jsonl").exists()
    limits = "--validation_data", "3 of 12", "--max_skipped_fraction 0.1", "skipped_validation.jsonl"
    refused(*limits, **more | dict(max_skipped_fraction=0.1, overwrite_output_dir=True))
