"""The real script, end to end, on a few seconds of tones: what it writes, and what it refuses."""

import csv
import shutil

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import tiny_config
from ranks import run_ranks
from safetensors.torch import load_file
from test_finetune_ctc import check_refusal, read_json, read_lines, write_rows
from transformers import (
    AutoFeatureExtractor,
    HubertConfig,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

import finetune_classification
from w2v2.errors import UserError
from w2v2.evaluate.scores import classification_scores

SHORT = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--logging_steps", "1", "--use_cpu",
         "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "0.01",
         "--report_to", "none", "--dataloader_num_workers", "0"]  # fmt: skip
PITCH = {"low": 200, "middle": 700, "high": 2_400}


def read_rows(path):
    return list(csv.DictReader(open(path)))


def write_tones(path, count, seed):
    """Tones whose pitch is the label, of four speakers and two sessions each."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label, length = list(PITCH)[i % 3], int(16_000 * random.uniform(0.3, 0.6))
        tone = np.sin(2 * np.pi * PITCH[label] * random.uniform(0.9, 1.1) * np.arange(length) / 16_000)
        audio = f"{path.stem}_{i}.wav"
        soundfile.write(path.parent / audio, 0.3 * tone + random.normal(0, 0.02, length), 16_000)
        rows.append({"audio": audio, "duration": f"{length / 16_000:.3f}", "label": label,
                     "speaker": f"s{i // 3 % 4}", "room": f"r{i // 3 % 3}"})  # fmt: skip
    write_rows(path, rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Manifests, a pretrained folder and a run that was fine-tuned from it."""
    folder = tmp_path_factory.mktemp("classify")
    for seed, (name, count) in enumerate({"train": 24, "dev": 6, "test": 9}.items()):
        write_tones(folder / f"{name}.csv", count, seed)
    torch.manual_seed(0)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(folder / "pretrained")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "pretrained")
    HubertConfig().save_pretrained(folder / "hubert")
    finetune_classification.main(command(folder, "--test_data", str(folder / "test.csv")))
    return folder


def command(folder, *more, output="run", validation=True):
    held = ["--validation_data", str(folder / "dev.csv")] if validation else []
    return ["--train_data", str(folder / "train.csv"), *held, "--output_dir", str(folder / output),
            "--model_name_or_path", str(folder / "pretrained"), *SHORT, *more]  # fmt: skip


def test_the_folder_holds_model_extractor_results_and_pictures(data):
    names = {path.name for path in (data / "run").iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "predictions.jsonl",
                     "results.json", "metrics.jsonl", "finetune_config.yaml", "checkpoint-4", "report.html"}  # fmt: skip
    pictures = {path.name for path in (data / "run" / "plots").iterdir()}
    assert pictures >= {"loss.png", "accuracy.png"}
    assert (data / "run" / "checkpoint-4" / "preprocessor_config.json").exists()
    assert AutoFeatureExtractor.from_pretrained(data / "run").do_normalize
    model, report = Wav2Vec2ForSequenceClassification.from_pretrained(data / "run", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.id2label == {0: "high", 1: "low", 2: "middle"}
    assert model.config.label2id == {"high": 0, "low": 1, "middle": 2}


def test_results_are_the_scores_of_the_predictions(data):
    results = read_json(data / "run" / "results.json")
    lines = read_lines(data / "run" / "predictions.jsonl")
    for name in ("validation", "test"):
        chosen = [line for line in lines if line["set"] == name]
        rows = read_rows(data / ("dev.csv" if name == "validation" else "test.csv"))
        expected = {row["audio"]: row["label"] for row in rows}
        assert {line["id"]: line["reference"] for line in chosen} == expected
        scores = classification_scores([line["reference"] for line in chosen], [line["prediction"] for line in chosen])
        assert {key: results[name][key] for key in scores} == pytest.approx(scores)
    assert results["run"]["labels"] == ["high", "low", "middle"]
    assert results["run"]["train_labels"] == {"low": 8, "middle": 8, "high": 8}


def test_what_is_left_out_of_training_is_told_by_reason(data):
    rows = read_rows(data / "train.csv")
    write_rows(
        data / "more.csv", [*rows, rows[0] | {"audio": "absent.wav"}, rows[1] | {"audio": "dev_0.wav", "label": "?"}]
    )
    flags = [
        "--train_data",
        str(data / "more.csv"),
        "--labels",
        "low",
        "middle",
        "high",
        "--max_skipped_fraction",
        "0.1",
    ]
    finetune_classification.main(command(data, *flags, "--min_seconds", "0.31", output="left_out"))
    run = read_json(data / "left_out" / "results.json")["run"]
    assert run["dropped"]["unreadable"] == run["dropped"]["with other labels"] == 1
    assert run["dropped"]["by their length"] == len(rows) - run["train_utterances"]


def test_the_stock_pipeline_gives_the_same_labels(data):
    classify = pipeline("audio-classification", model=str(data / "run"), device="cpu")
    for line in [line for line in read_lines(data / "run" / "predictions.jsonl") if line["set"] == "test"]:
        samples, rate = soundfile.read(data / line["id"], dtype="float32")
        best = classify({"raw": samples, "sampling_rate": rate})[0]
        assert best["label"] == line["prediction"]
        assert best["score"] == pytest.approx(line["probability"], abs=2e-4)


def label(data, *manifests, output, **flags):
    given = [f"--{name}={value}" for name, value in flags.items()]
    finetune_classification.main(["--do_train=false", "--model_name_or_path", str(data / "run"), "--use_cpu",
                                  "--output_dir", str(data / output), "--test_data", *map(str, manifests), *given])  # fmt: skip
    return read_json(data / output / "results.json"), read_lines(data / output / "predictions.jsonl")


def test_new_audio_is_labelled_with_and_without_labels(data, capsys):
    rows = read_rows(data / "test.csv")
    write_rows(data / "new.csv", [{"audio": row["audio"], "duration": row["duration"]} for row in rows])
    write_rows(data / "some.csv", [row | {"label": row["label"] if i else ""} for i, row in enumerate(rows)])
    results, lines = label(data, data / "test.csv", data / "new.csv", data / "some.csv", output="labelled")
    before = read_json(data / "run" / "results.json")["test"]
    assert results["test"] == pytest.approx(before) and results["new"] == {"utterances": 9, "scored": 0}
    assert (results["some"]["utterances"], results["some"]["scored"]) == (9, 8)
    by_set = [{line["id"]: line for line in lines if line["set"] == name} for name in ("test", "new", "some")]
    for id, line in by_set[0].items():
        assert {**line, "set": "new", "reference": None} == by_set[1][id]
        assert {**line, "set": "some", "reference": by_set[2][id]["reference"]} == by_set[2][id]
        assert line["probabilities"][line["prediction"]] == line["probability"] == max(line["probabilities"].values())
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-3) and len(line["probabilities"]) == 3
    said = capsys.readouterr().out
    assert "new: 9 utterances labelled in predictions.jsonl" in said and "1 without label" in said


def test_a_checkpoint_brings_the_labels_of_its_run(data):
    rows = [row | {"mood": row["label"], "label": "other"} for row in read_rows(data / "test.csv")]
    write_rows(data / "moods.csv", rows)
    config = yaml.safe_load((data / "run" / "finetune_config.yaml").read_text())
    shutil.copytree(data / "run" / "checkpoint-4", data / "moody" / "checkpoint-4")
    (data / "moody" / "finetune_config.yaml").write_text(yaml.safe_dump(config | {"label_column": "mood"}))
    results, lines = label(data, data / "moods.csv", output="moods", model_name_or_path=data / "moody" / "checkpoint-4")
    assert {line["reference"] for line in lines} == set(PITCH) and results["moods"]["utterances"] == 9


def test_going_on_keeps_the_head_of_the_same_labels(data, capsys):
    argv = command(data, "--model_name_or_path", str(data / "run"), "--max_steps", "2", output="further")
    finetune_classification.main([*argv, "--learning_rate", "0"])
    assert "head: kept" in capsys.readouterr().out
    before, after = (load_file(data / name / "model.safetensors") for name in ("run", "further"))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_probe_learns_and_says_which_layers_it_reads(data):
    finetune_classification.main(
        command(data, "--mode", "probe", "--max_steps", "60", "--eval_steps", "30", "--save_steps", "30",
                "--learning_rate", "0.02", "--lr_scheduler_type", "constant", output="probe")
    )  # fmt: skip
    results = read_json(data / "probe" / "results.json")
    assert results["validation"]["uar"] > 0.6  # chance is a third
    assert len(results["run"]["layer_weights"]) == 3 and sum(results["run"]["layer_weights"]) == pytest.approx(1)
    model, report = Wav2Vec2ForSequenceClassification.from_pretrained(data / "probe", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pretrained = Wav2Vec2ForPreTraining.from_pretrained(data / "pretrained").state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("wav2vec2."):
            assert torch.equal(value, pretrained[name]), name


def test_folds_test_every_utterance_of_unheard_speakers(data):
    finetune_classification.main(command(data, "--folds", "speaker", output="folds", validation=False))
    results = read_json(data / "folds" / "results.json")
    lines = read_lines(data / "folds" / "predictions.jsonl")
    rows = {row["audio"]: row for row in read_rows(data / "train.csv")}
    assert sorted(line["id"] for line in lines) == sorted(rows)
    assert all(line["reference"] == rows[line["id"]]["label"] for line in lines)
    assert [fold["groups"] for fold in results["folds"]] == [["s0"], ["s1"], ["s2"], ["s3"]]
    for number, fold in enumerate(results["folds"]):
        tested = {rows[line["id"]]["speaker"] for line in lines if line["fold"] == fold["fold"]}
        assert tested == set(fold["groups"])
        own = read_lines(data / "folds" / fold["fold"] / "predictions.jsonl")
        validated = {rows[line["id"]]["speaker"] for line in own if line["set"] == "validation"}
        assert validated == {f"s{(number + 1) % 4}"} != tested
        trained = read_json(data / "folds" / fold["fold"] / "results.json")["run"]["train_utterances"]
        assert trained == len(rows) - sum(row["speaker"] in tested | validated for row in rows.values())
    pooled = classification_scores([line["reference"] for line in lines], [line["prediction"] for line in lines])
    assert {key: results["pooled"][key] for key in pooled} == pytest.approx(pooled)
    scores = [fold["uar"] for fold in results["folds"]]
    assert "Scores by fold" in (data / "folds" / "report.html").read_text()
    assert results["mean"]["uar"] == pytest.approx(np.mean(scores))
    assert results["std"]["uar"] == pytest.approx(np.std(scores, ddof=1))


def test_folds_on_two_processes_are_those_of_one(data, capsys):
    flags = ["--folds", "room", "--max_steps", "2"]
    given = command(data, *flags, "--per_device_train_batch_size", "2", output="dealt", validation=False)
    run_ranks(data / "logs", "finetune_classification.py", *given, ACCELERATE_USE_CPU="true")
    finetune_classification.main(command(data, *flags, output="whole", validation=False))
    assert "warning: 4 speakers, such as s0" in capsys.readouterr().out  # a room is not a speaker
    for results in (read_json(data / name / "results.json") for name in ("dealt", "whole")):
        assert [fold["groups"] for fold in results["folds"]] == [["r0"], ["r1"], ["r2"]]
        assert results["pooled"]["utterances"] == 24


def test_folds_go_on_where_they_were(data):
    histories = {*(data / "folds").rglob("events.jsonl")}
    configs = {*(data / "folds").rglob("finetune_config.yaml")}
    kept = {*(data / "folds").rglob("*.jsonl")} - histories | configs
    before = {path: path.read_bytes() for path in kept}
    again = command(data, "--folds", "speaker", output="folds", validation=False)
    with pytest.raises(UserError, match="already holds a run"):
        finetune_classification.main(again)
    resumed = [*again, "--resume_from_checkpoint", "auto"]
    finetune_classification.main([*resumed, "--learning_rate", "5e-3"])  # all is trained: the rate acts on nothing
    assert {path: path.read_bytes() for path in kept} == before
    assert len(histories) == len(configs) == 5  # of the whole and of each fold
    for events in map(read_lines, histories):
        assert [event["event"] for event in events] == ["start", "finish", "resume", "finish"] and events[0]["command"]
    with pytest.raises(UserError, match="other folds"):
        finetune_classification.main([*resumed, "--num_folds", "3"])


def test_the_same_command_gives_the_same_run_and_auto_goes_on(data):
    finetune_classification.main(command(data, "--test_data", str(data / "test.csv"), output="twin"))
    for name in ("predictions.jsonl", "model.safetensors"):
        assert (data / "twin" / name).read_bytes() == (data / "run" / name).read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        finetune_classification.main(command(data, output="twin"))
    before = (data / "twin" / "metrics.jsonl").read_text()
    finetune_classification.main(command(data, "--resume_from_checkpoint", "auto", output="twin"))
    assert (data / "twin" / "metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match="other labels"):
        finetune_classification.main(
            command(data, "--resume_from_checkpoint", "auto", "--label_map", "low=deep", output="twin")
        )


@pytest.mark.parametrize("flags", [["--mode", "probe"], ["--freeze_feature_encoder", "false"]])
@pytest.mark.parametrize("steps", [[], ["--max_steps", "9"]])  # a finished run, and one that would go on
def test_resuming_with_other_parameters_to_learn_is_refused(data, flags, steps):
    before = {path: path.read_bytes() for path in (data / "run").iterdir() if path.is_file()}
    with pytest.raises(UserError, match="run trains .* parameters, this one"):
        finetune_classification.main(command(data, "--resume_from_checkpoint", "auto", *flags, *steps))
    assert {path: path.read_bytes() for path in before} == before


BAD_ROWS = {  # what is done to the rows of the training manifest, and what the message names
    "empty_label": (lambda row: row | {"label": row["label"].replace("low", "")}, "empty_label.csv"),
    "absent_audio": (lambda row: row | {"audio": "absent_" + row["audio"]}, "absent_audio.csv"),
    "lengths": (
        lambda row: row | {"duration": "0.1" if row["label"] == "low" else row["duration"]},
        "they leave no utterance of the label 'low'",
    ),
}
BAD_FLAGS = {
    "--train_data=absent.csv": "absent.csv",
    "--model_name_or_path={data}/hubert": "hubert model",
    "--label_column=mood": "'mood'",
    "--fold=speaker": "did you mean --folds",
    "--folds=speaker": "--folds takes all from the training data",
    "--metric_for_best_model=f1": "--metric_for_best_model f1",
    "--do_train=false": "pretrained has no classifier",
    "--num_folds=3": "--num_folds needs --folds",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_manifests_are_refused_in_one_line(data, kind):
    change, culprit = BAD_ROWS[kind]
    path = data / f"{kind}.csv"
    write_rows(path, list(map(change, read_rows(data / "train.csv"))))
    argv = command(data, "--train_data", str(path), "--class_weights", "balanced", output=f"bad_{kind}")
    check_refusal(finetune_classification.main, argv, culprit)


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(data, flag):
    check_refusal(finetune_classification.main, command(data, flag.format(data=data), output="bad"), BAD_FLAGS[flag])


@pytest.mark.parametrize(
    "flag, culprit", [("--label_column=speaker", "without the label 's0'"), ("--folds=mood", "'mood'")]
)
def test_folds_that_cannot_be_are_refused(data, flag, culprit):
    argv = command(data, "--folds", "speaker", flag, output=f"bad_{flag[2:6]}", validation=False)
    check_refusal(finetune_classification.main, argv, culprit)
