"""A user's slip ends a run with exit status 2 and one line that names the file, row or flag and says what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import run_here, tiny_config, write_csv, write_tones
from transformers import BertConfig, BertModel, Wav2Vec2ForCTC

import pretrain
from w2v2.train.log import read_metrics

REPOSITORY = Path(__file__).parents[2]
SECONDS = [2.0 + number / 10 for number in range(12)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve good files with a manifest, and a tiny model."""
    folder = tmp_path_factory.mktemp("bad_input")
    paths = write_tones(folder / "audio", SECONDS)
    write_csv(folder / "train.csv", paths, SECONDS)
    tiny_config().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def finished(corpus):
    """A run of one update."""
    assert run_here(pretrain.main, *flags(corpus, corpus / "finished")) == 0
    return corpus / "finished"


def flags(corpus, output_dir, **changes):
    values = dict(
        train_data=corpus / "train.csv",
        config_name=corpus / "model",
        output_dir=output_dir,
        batch_hours=0.002,
        micro_batch_seconds=8,
        max_steps=1,
        dataloader_num_workers=0,
        report_to="none",
        use_cpu=True,
    )
    return [f"--{name}={value}" for name, value in (values | changes).items() if value is not None]


@pytest.fixture
def refused(corpus, tmp_path, capsys):
    """Runs the script in this process; it has to end with status 2 and one line, in which all of the named things stand."""

    def check(*named, extra=(), **changes):
        capsys.readouterr()
        status = run_here(pretrain.main, *flags(corpus, changes.pop("output_dir", tmp_path / "run"), **changes), *extra)
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if "error:" in line]
        assert status == 2, err
        assert len(lines) == 1 and "Traceback" not in err, err
        for name in named:
            assert str(name) in lines[0], lines[0]
        return lines[0]

    return check


def accepted(corpus, output_dir, **changes):
    assert run_here(pretrain.main, *flags(corpus, output_dir, **changes)) == 0
    return read_metrics(output_dir / "metrics.jsonl")[-1]


def script(*arguments):
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY))
    command = [sys.executable, str(REPOSITORY / "pretrain.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_script_itself_exits_with_2_and_one_line(corpus, tmp_path):
    result = script(*flags(corpus, tmp_path / "run"), "--learning_rat", 0.1)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "pretrain.py: error: unknown flag --learning_rat: did you mean learning_rate?\n"
    assert not (tmp_path / "run").exists()


def test_unknown_yaml_key_offers_the_nearest(corpus, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"learnin_rate": 0.1}))
    assert run_here(pretrain.main, config, *flags(corpus, tmp_path / "run")) == 2
    line = f"pretrain.py: error: {config}: unknown key 'learnin_rate': did you mean learning_rate?\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("name", ["train_data", "output_dir"])
def test_missing_required_key_is_named(refused, name):
    refused(f"--{name} is required", **{name: None})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", "many"),
        ("batch_hours", 0),
        ("seed", -1),
        ("seed", 2**40),
        ("dataloader_num_workers", -1),
        ("mask_time_length", 0),
        ("warmup_steps", -5),
        ("diversity_scope", "world"),
        ("logging_steps", 0),
        ("save_total_limit", -1),
        ("dataloader_prefetch_factor", 0),
        ("max_non_finite_updates", 0),
        ("collapse_window_steps", 0),
        ("collapse_action", "panic"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_flags_name(refused, name, value):
    refused(f"--{name}", **{name: value})


def test_micro_batch_smaller_than_a_crop(refused):
    refused("--micro_batch_seconds 1", "--crop_seconds", micro_batch_seconds=1)


def test_effective_batch_smaller_than_one_utterance(refused):
    refused("--batch_hours 0.0005", "raise it", batch_hours=0.0005)


def test_manifest_without_a_usable_column(refused, tmp_path):
    (tmp_path / "bad.csv").write_text("voice,colour\na,b\n")
    refused(tmp_path / "bad.csv", "voice, colour", "audio", train_data=tmp_path / "bad.csv")


def test_manifest_that_does_not_exist(refused, tmp_path):
    refused(tmp_path / "absent.csv", train_data=tmp_path / "absent.csv")


def test_empty_manifest(refused, tmp_path):
    (tmp_path / "empty.csv").touch()
    refused(tmp_path / "empty.csv", train_data=tmp_path / "empty.csv")
    (tmp_path / "no_rows.csv").write_text("audio,duration\n")
    refused(tmp_path / "no_rows.csv", train_data=tmp_path / "no_rows.csv")


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


def test_output_dir_that_holds_a_run(finished, refused):
    before = (finished / "model.safetensors").stat().st_mtime_ns
    refused(finished, "--resume_from_checkpoint auto", "--overwrite_output_dir", output_dir=finished)
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


def test_output_dir_that_is_a_file_or_lies_in_one(corpus, refused):
    refused("--output_dir", output_dir=corpus / "train.csv")
    refused("--output_dir", output_dir=corpus / "train.csv" / "run")


@pytest.mark.parametrize("change", ["num_hidden_layers=1", "hidden_size=48", "num_codevectors_per_group=24"])
def test_checkpoint_of_another_architecture(finished, refused, change):
    name = change.split("=")[0]
    refused(
        "checkpoint-1",
        "another architecture",
        name,
        output_dir=finished,
        resume_from_checkpoint="auto",
        config_overrides=change,
    )


def test_weights_that_do_not_fit_the_configuration(finished, refused):
    refused(finished, "architecture", config_name=None, model_name_or_path=finished, config_overrides="hidden_size=48")


def test_model_of_another_kind(refused, tmp_path):
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "bert", "wav2vec2", config_name=None, model_name_or_path=tmp_path / "bert")


def test_fine_tuned_model_without_its_quantizer(refused, tmp_path):
    Wav2Vec2ForCTC(tiny_config()).save_pretrained(tmp_path / "ctc")
    refused(tmp_path / "ctc", "quantizer", config_name=None, model_name_or_path=tmp_path / "ctc")


def test_model_folder_that_is_absent_empty_or_torn(refused, tmp_path, finished):
    refused(tmp_path / "absent", "no such folder", config_name=None, model_name_or_path=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json", config_name=None, model_name_or_path=tmp_path / "empty")
    shutil.copytree(finished / "checkpoint-1", tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused(tmp_path / "torn", "weights cannot be loaded", config_name=None, model_name_or_path=tmp_path / "torn")


def test_checkpoint_to_resume_that_is_none(finished, refused, tmp_path):
    refused("--resume_from_checkpoint", tmp_path / "absent", resume_from_checkpoint=tmp_path / "absent")
    refused(finished, "--model_name_or_path", resume_from_checkpoint=finished)


@pytest.mark.parametrize("overrides", ["hiden_size=3", "hidden_size=wide", "hidden_size"])
def test_config_overrides_that_mean_nothing(refused, overrides):
    refused("--config_overrides", overrides.split("=")[0], config_overrides=overrides)


def spoiled(corpus, folder):
    """Twelve utterances of which three cannot be read, each for another reason; two show only when they are decoded."""
    folder.mkdir()
    paths = [Path(shutil.copy(path, folder)) for path in sorted((corpus / "audio").iterdir())]
    (folder / "notes.wav").write_text("only words")
    tone, _ = soundfile.read(paths[0])
    soundfile.write(folder / "cut.flac", np.tile(tone, 2), 16_000)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:15_000])
    soundfile.write(folder / "short.wav", tone[:8_000], 16_000)
    seconds = [soundfile.info(path).duration for path in paths[:9]]
    bad = [folder / name for name in ("notes.wav", "cut.flac", "short.wav")]
    return write_csv(folder / "train.csv", [*paths[:9], *bad], [*seconds, 3.0, 3.5, 3.0])


def test_unreadable_files_among_many_are_skipped_counted_and_listed(corpus, tmp_path):
    manifest = spoiled(corpus, tmp_path / "audio")
    output_dir = tmp_path / "run"
    run = dict(train_data=manifest, max_steps=6, save_steps=2, logging_steps=1, max_skipped_fraction=0.3)
    record = accepted(corpus, output_dir, **run)
    listed = [json.loads(line) for line in (output_dir / "skipped_audio.jsonl").read_text().splitlines()]
    assert {Path(entry["audio"]).name for entry in listed} == {"notes.wav", "cut.flac", "short.wav"} and len(
        listed
    ) == 3
    assert all(entry["reason"] and entry["id"] for entry in listed)
    assert record["skipped_audio"] == 3 and np.isfinite(record["loss"])


def test_too_many_unreadable_files_stop_the_run(corpus, refused, tmp_path):
    manifest = spoiled(corpus, tmp_path / "audio")
    refused("--max_skipped_fraction 0.01", "notes.wav", train_data=manifest)
    refused(
        "--max_skipped_fraction 0.1",
        "2 of 12",
        output_dir=tmp_path / "later",
        train_data=manifest,
        max_steps=6,
        max_skipped_fraction=0.1,
    )
    assert len((tmp_path / "later" / "skipped_audio.jsonl").read_text().splitlines()) == 2


def test_count_and_list_of_skipped_files_are_those_of_an_uninterrupted_run(corpus, tmp_path):
    """One of them is found before the first update, and again at the resumption; the others in updates before and after."""
    manifest, run = spoiled(corpus, tmp_path / "audio"), tmp_path / "run"
    more = dict(
        train_data=manifest, max_steps=6, save_steps=1, logging_steps=1, max_skipped_fraction=0.3, save_total_limit=0
    )
    accepted(corpus, run, **more)
    counts, lines = (
        [r["skipped_audio"] for r in read_metrics(run / "metrics.jsonl")],
        (run / "skipped_audio.jsonl").read_bytes(),
    )
    before, first, last = (json.loads(line)["step"] for line in lines.splitlines())
    assert before == 0 < first < last and counts[-1] == 3
    for step in range(first + 1, 7):
        shutil.rmtree(run / f"checkpoint-{step}")
    accepted(corpus, run, **more, resume_from_checkpoint=run / f"checkpoint-{first}")
    assert [r["skipped_audio"] for r in read_metrics(run / "metrics.jsonl")] == counts
    assert (run / "skipped_audio.jsonl").read_bytes() == lines
