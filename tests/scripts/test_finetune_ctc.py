"""The real script, end to end, on a few seconds of audio."""

import csv
import json
from pathlib import Path

import jiwer
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import yaml
from conftest import tiny_config
from ranks import SECONDS, Program, environment
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, pipeline

import finetune_ctc
from w2v2.errors import UserError
from w2v2.evaluate.scores import error_rates

ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--use_cpu",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--mask_feature_length", "8",
         "--learning_rate", "0.01", "--report_to", "none", "--dataloader_num_workers", "0"]  # fmt: skip


def write_manifest(path, texts, seed, rate=16_000, channels=1):
    random = np.random.default_rng(seed)
    rows = []
    for i, text in enumerate(texts):
        audio = f"{path.stem}_{i}.wav"
        shape = (int(rate * random.uniform(0.7, 1.3)), channels)
        soundfile.write(path.parent / audio, random.uniform(-0.3, 0.3, shape), rate)
        rows.append({"audio": audio, "duration": shape[0] / rate, "text": text})
    write_rows(path, rows)


def write_rows(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Manifests, a pretrained folder and a run that was fine-tuned from it."""
    folder = tmp_path_factory.mktemp("finetune")
    write_manifest(folder / "train.csv", ["One two.", "two", "three one", "two three", "one", ""], seed=0)
    write_manifest(folder / "dev.csv", ["two one", "three", "one qüx"], seed=1)
    write_manifest(folder / "test.csv", ["three two", "one one"], seed=2, rate=44_100, channels=2)
    torch.manual_seed(0)  # whatever ran before: four updates of some weights write only blanks
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(folder / "pretrained")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "pretrained")
    finetune_ctc.main(command(folder, "--test_data", str(folder / "test.csv"), "--freeze_encoder_steps", "1"))
    return folder


def command(folder, *more, output="run", model="pretrained"):
    start = ["--model_name_or_path", str(folder / model)] if model else []
    return ["--train_data", str(folder / "train.csv"), "--validation_data", str(folder / "dev.csv"),
            "--output_dir", str(folder / output), *start, *SHORT, *more]  # fmt: skip


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_folder_holds_model_processor_and_results(data):
    assert {path.name for path in (data / "run").iterdir()} >= {
        "preprocessor_config.json",
        "finetune_config.yaml",
        "report.html",
    }
    assert (data / "run" / "checkpoint-4" / "preprocessor_config.json").exists()
    assert Wav2Vec2FeatureExtractor.from_pretrained(data / "run").do_normalize
    model, report = Wav2Vec2ForCTC.from_pretrained(data / "run", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.architectures == ["Wav2Vec2ForCTC"]


def test_the_vocabulary_comes_from_the_training_text_alone(data):
    vocabulary = read_json(data / "run" / "vocab.json")
    assert set(vocabulary) == {"<pad>", "<unk>", "|", *"ONETWHR"}
    unknown = read_json(data / "run" / "results.json")["run"]["unknown_characters"]
    assert unknown == {"validation": {"Q": 1, "Ü": 1, "X": 1}}


def test_results_are_the_error_rates_of_the_predictions(data):
    results = read_json(data / "run" / "results.json")
    predictions = read_lines(data / "run" / "predictions.jsonl")
    for name, references in (("validation", {"TWO ONE", "THREE", "ONE QÜX"}), ("test", {"THREE TWO", "ONE ONE"})):
        lines = [line for line in predictions if line["set"] == name]
        assert {line["reference"] for line in lines} == references
        rates = error_rates([line["reference"] for line in lines], [line["hypothesis"] for line in lines])
        assert {key: results[name][key] for key in rates} == rates
    assert results["run"]["best_update"] in (2, 4)
    for line in predictions:
        assert line["wer"] == jiwer.wer(line["reference"], line["hypothesis"])


def check_pipeline(folder, run, lines):
    """The stock pipeline writes what the lines of `predictions.jsonl` hold."""
    recognise = pipeline("automatic-speech-recognition", model=str(folder / run), device="cpu")
    for line in lines:
        samples, rate = soundfile.read(folder / line["id"], dtype="float32")
        assert " ".join(recognise({"raw": samples, "sampling_rate": rate})["text"].split()) == line["hypothesis"]
    assert any(line["hypothesis"] for line in lines)


def test_the_stock_pipeline_gives_the_same_texts(data):
    lines = [line for line in read_lines(data / "run" / "predictions.jsonl") if line["set"] == "validation"]
    check_pipeline(data, "run", lines)


def test_a_second_run_in_the_folder_is_refused_and_auto_goes_on(data):
    with pytest.raises(UserError, match="already holds a run"):
        finetune_ctc.main(command(data))
    before = (data / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval_wer" in line] == [2, 4]
    rate = yaml.safe_load((data / "run" / "finetune_config.yaml").read_text())["learning_rate"]
    config = read_json(data / "run" / "config.json")
    more = ["--test_data", str(data / "test.csv"), "--learning_rate", "0.5", "--hidden_dropout", "0.7"]
    finetune_ctc.main(command(data, "--resume_from_checkpoint", "auto", *more))  # finished: neither acts on anything
    assert read_json(data / "run" / "config.json") == config
    assert (data / "run" / "metrics.jsonl").read_text() == before
    assert yaml.safe_load((data / "run" / "finetune_config.yaml").read_text())["learning_rate"] == rate
    assert f"| Peak learning rate | {rate} |" in (data / "run" / "README.md").read_text()
    events = read_lines(data / "run" / "events.jsonl")
    expected = [("start", 0), ("finish", 4), ("resume", 4), ("finish", 4)]
    assert [(event["event"], event["step"]) for event in events] == expected
    assert all({"command", "versions", "device", "num_processes", "precision"} <= event.keys() for event in events[::2])
    assert [event["precision"] for event in events[::2]] == ["fp32", "fp32"]
    page = (data / "run" / "report.html").read_text()
    assert "command and versions are not known" not in page and "resume at update 4" in page


def test_the_same_command_gives_the_same_run(data):
    more = ["--test_data", str(data / "test.csv"), "--freeze_encoder_steps", "1"]
    finetune_ctc.main(command(data, *more, output="twin"))
    for name in ("predictions.jsonl", "model.safetensors"):
        assert (data / "twin" / name).read_bytes() == (data / "run" / name).read_bytes()


def test_random_weights_from_a_configuration_are_the_baseline(data):
    tiny_config().save_pretrained(data / "config")
    finetune_ctc.main(command(data, "--config_name", str(data / "config"), output="baseline", model=None))
    assert read_json(data / "baseline" / "results.json")["run"]["model"] is None
    assert not Wav2Vec2FeatureExtractor.from_pretrained(data / "baseline").do_normalize


def test_resuming_with_another_vocabulary_is_refused(data):
    write_manifest(data / "other.csv", ["zoo", "zebra"], seed=3)
    with pytest.raises(UserError, match="another vocabulary"):
        finetune_ctc.main(command(data, "--resume_from_checkpoint", "auto", "--train_data", str(data / "other.csv")))


def test_few_unreadable_files_are_skipped_counted_and_listed(data):
    rows = list(csv.DictReader(open(data / "train.csv")))
    (data / "broken.wav").write_bytes(b"RIFF no audio")
    write_rows(data / "some_broken.csv", [*rows, rows[0] | {"audio": "broken.wav"}])
    more = ["--train_data", str(data / "some_broken.csv"), "--max_skipped_fraction"]
    with pytest.raises(UserError, match="1 of 7 utterances .*broken.wav.*--max_skipped_fraction"):
        finetune_ctc.main(command(data, *more, "0.1", output="skip"))
    finetune_ctc.main(command(data, *more, "0.2", "--resume_from_checkpoint", "auto", output="skip"))
    listed = read_lines(data / "skip" / "skipped_audio.jsonl")
    assert [line["audio"] for line in listed] == [str(data / "broken.wav")]
    run = read_json(data / "skip" / "results.json")["run"]
    assert run["skipped_audio"] == 1
    assert {reason: count for reason, count in run["dropped"].items() if count} == {"unreadable": 1, "without text": 1}


BAD_ROWS = {  # what is done to the rows of the training manifest, and what the message names
    "no_text": (lambda row: {"audio": row["audio"], "duration": row["duration"]}, "no_text.csv"),
    "blank_text": (lambda row: row | {"text": "?"}, "blank_text.csv"),
    "absent_audio": (lambda row: row | {"audio": "absent_" + row["audio"]}, "absent_audio.csv"),
    "short_audio": (lambda row: row | {"start": "0.1", "duration": "0.1"}, "--min_seconds"),
}
BAD_FLAGS = {
    "--train_data=absent.csv": "absent.csv",
    "--mask_feature_length=64": "--mask_feature_length 64",
    "--warmup_ratio=0.1": "warmup",
    "--output_dir={data}/train.csv/run": "train.csv/run cannot be made (Not a directory)",
}


def check_refusal(main, argv, culprit):
    with pytest.raises(UserError) as caught:
        main(argv)
    assert culprit in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_manifests_are_refused_in_one_line(data, kind):
    change, culprit = BAD_ROWS[kind]
    path = data / f"{kind}.csv"
    write_rows(path, list(map(change, csv.DictReader(open(data / "train.csv")))))
    check_refusal(finetune_ctc.main, command(data, "--train_data", str(path), output=f"bad_{kind}"), culprit)


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(data, flag):
    check_refusal(finetune_ctc.main, command(data, flag.format(data=data), output="bad"), BAD_FLAGS[flag])


def test_the_script_runs_from_yaml_and_ends_with_status_2(data):
    (data / "config.yaml").write_text("max_steps: 1\neval_steps: 1\nsave_steps: 1\nmask_feature_length: 8\n")
    flags = [f"--train_data={data}/train.csv", f"--validation_data={data}/dev.csv", f"--output_dir={data}/script",
             f"--model_name_or_path={data}/pretrained", "--per_device_train_batch_size=2", "--use_cpu"]  # fmt: skip
    script = ["finetune_ctc.py", data / "config.yaml", *flags]
    first, again = data / "first.log", data / "again.log"
    assert Program(script, first, environment()).wait(SECONDS) == 0, first.read_text()
    assert "WER" in first.read_text() and "vocabulary" in first.read_text()
    assert Program(script, again, environment()).wait(SECONDS) == 2
    assert len(again.read_text().strip().splitlines()) == 1 and "already holds a run" in again.read_text()
