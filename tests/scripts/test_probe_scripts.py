"""probe.py and verify_speakers.py, end to end on tones: what they write, and what they refuse."""

import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import tiny_config
from transformers import (
    HubertConfig,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
)

import probe
import verify_speakers
from w2v2.errors import UserError
from w2v2.evaluate.scores import read_trials

PITCH = {"low": 200, "middle": 700, "high": 2_400}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tones whose pitch is the label, of four speakers with a texture of their own, and two checkpoints."""
    folder = tmp_path_factory.mktemp("probe")
    random = np.random.default_rng(0)
    rows = []
    for i in range(48):
        label, length = list(PITCH)[i % 3], int(16_000 * random.uniform(0.3, 0.6))
        tone = np.sin(2 * np.pi * PITCH[label] * random.uniform(0.9, 1.1) * np.arange(length) / 16_000)
        soundfile.write(folder / f"{i}.wav", 0.3 * tone + random.normal(0, 0.02, length), 16_000)
        text = {"low": "lo", "middle": "mid", "high": "hi"}[label]
        rows.append({"id": f"u{i}", "audio": f"{i}.wav", "duration": f"{length / 16_000:.3f}", "label": label,
                     "speaker": f"s{i // 3 % 4}", "text": text})  # fmt: skip
    for name, chosen in (("all", rows), ("train", rows[:36]), ("test", rows[36:])):
        pd.DataFrame(chosen).to_csv(folder / f"{name}.csv", index=False)
    for step in (10, 5):
        torch.manual_seed(step)
        checkpoint = folder / f"checkpoint-{step}"
        Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(checkpoint)
        Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(checkpoint)
        (checkpoint / "training_state").mkdir()
        (checkpoint / "training_state" / "state.json").write_text(json.dumps({"heard_samples": step * 16_000 * 3600}))
    return folder


def run_probe(data, output, *more, test=True):
    held = ["--test_data", str(data / "test.csv")] if test else []
    train = ["--train_data", str(data / ("train.csv" if test else "all.csv"))]
    checkpoints = ["--checkpoints", str(data / "checkpoint-10"), str(data / "checkpoint-5")]
    probe.main([*checkpoints, "--use_cpu", *train, *held, "--output_dir", str(data / output), *more])
    return json.loads((data / output / "probe.json").read_text())


def test_probes_of_a_label_stand_beside_random_weights(data, capsys):
    results = run_probe(data, "label")
    assert [model["name"] for model in results["models"]] == ["checkpoint-5", "checkpoint-10", "random weights"]
    assert [model["hours"] for model in results["models"]] == [5.0, 10.0, None]
    assert results["chance"] == pytest.approx(1 / 3)
    for model in results["models"]:
        assert [layer["layer"] for layer in model["layers"]] == [0, 1, 2]
        assert model["uar"] == model["layers"][model["best_layer"]]["uar"] > 0.6  # pitch is easily read
    printed = capsys.readouterr().out
    assert "layer" in printed and "checkpoint-10" in printed and "chance 33.3%" in printed
    page = (data / "label" / "report.html").read_text()
    assert "UAR by layer" in page and "start at update 0" in page and "transformers" in page

    # Results are not replaced unasked; the same command gives the same figures.
    with pytest.raises(UserError, match="already holds probe.json"):
        run_probe(data, "label")
    assert run_probe(data, "label", "--overwrite_output_dir") == results


def test_probes_by_folds_test_every_utterance(data):
    flags = ["--folds", "speaker", "--random_weights", "false", "--label_map", "low=dull"]
    results = run_probe(data, "folds", *flags, test=False)
    assert results["run"]["num_folds"] == 4 and results["run"]["tested"] == 48
    assert [model["name"] for model in results["models"]] == ["checkpoint-5", "checkpoint-10"]
    shorter = run_probe(data, "short", *flags, "--max_seconds", "0.5", test=False)  # these are tested all the same
    assert 0 < shorter["run"]["dropped"]["by their length (training)"] < shorter["run"]["tested"] == 48
    assert set(results["models"][0]["layers"][0]) >= {"mean", "std", "uar", "accuracy", "macro_f1", "validation"}


def test_characters_are_probed_with_a_linear_ctc_head(data):
    flags = ["--target", "characters", "--ctc_updates", "20", "--random_weights", "false"]
    results = run_probe(data, "characters", *flags)
    assert (results["measure"], results["chance"], results["run"]["tested"]) == ("cer", None, 12)
    for model in results["models"]:
        best = min(model["layers"], key=lambda layer: layer["validation"])
        assert (model["best_layer"], model["cer"]) == (best["layer"], best["cer"])
    assert not (data / "characters" / "_frames").exists()


def verify(data, output, *flags, model="checkpoint-10"):
    source = ["--model_name_or_path", str(data / model)] if model else []
    verify_speakers.main([*source, "--use_cpu", "--output_dir", str(data / output), *flags])
    return json.loads((data / output / "verification.json").read_text())


def test_verification_by_drawn_trials_scores_every_layer(data):
    flags = ["--manifest", str(data / "all.csv"), "--speaker_column", "label", "--num_trials", "200"]
    results = verify(data, "drawn", *flags, "--cohort", str(data / "train.csv"))
    assert set(results) == {"layer 0", "layer 1", "layer 2", "run"}
    assert results["layer 1"]["eer"] < 0.35  # pitches are far apart; by chance a half
    trials = read_trials(data / "drawn" / "trials.txt")
    assert (len(trials), results["run"]["targets"]) == (200, 100)
    counts = results["layer 1"]["histogram"]["counts"]
    assert {kind: sum(found) for kind, found in counts.items()} == {"one speaker": 100, "two speakers": 100}
    page = (data / "drawn" / "report.html").read_text()
    best = min((name for name in results if name != "run"), key=lambda name: results[name]["eer"])
    assert f"The equal error rate by {best} is {results[best]['eer']:.1%}".replace("%", "\u00a0%") in page
    assert f"Scores by {best}" in page and "command and versions are not known" not in page


def test_verification_by_a_list_and_a_models_projection(data):
    config = tiny_config(num_labels=4, classifier_proj_size=8, mask_time_prob=0.0)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(data / "tuned")
    (data / "lists").mkdir()
    lines = "1 0.wav 3.wav\n0 0.wav 1.wav\n1 1.wav 4.wav\n0 4.wav 2.wav\n"
    for path in (data / "list.txt", data / "lists" / "list.txt"):
        path.write_text(lines)
    results = verify(data, "listed", "--trials", str(data / "list.txt"), model="tuned")
    assert set(results) == {"projection", "run"} and 0 <= results["projection"]["eer"] <= 1
    results = verify(data, "one_layer", "--trials", str(data / "list.txt"), "--layer", "2", model="tuned")
    assert set(results) == {"layer 2", "run"}
    flags = ["--trials", str(data / "lists" / "list.txt"), "--layer", "2"]
    assert verify(data, "moved", *flags, "--data_root", str(data), model="tuned") == results
    with pytest.raises(UserError, match="--data_root names the folder"):
        verify(data, "lost", *flags, model="tuned")


def by_folds(*args):
    return run_probe(*args, test=False)


def test_what_a_probe_leaves_out_is_counted_and_shared_audio_told(data, capsys):
    held = ["--validation_data", str(data / "test.csv")]  # the test set's
    flags = [
        "--labels",
        "low",
        "high",
        "--label_map",
        "middel=low",
        "--min_seconds",
        "0.35",
        "--random_weights",
        "false",
    ]
    results = run_probe(data, "counted", *held, *flags)
    rows = pd.read_csv(data / "train.csv")
    known = rows[rows["label"] != "middle"]
    short = int((known["duration"] < 0.35).sum())
    others = len(rows) - len(known) + 2 * int((pd.read_csv(data / "test.csv")["label"] == "middle").sum())
    assert results["run"]["dropped"] == {"with other labels": others, "by their length (training)": short} and short
    assert "dropped with other labels" in (data / "counted" / "report.html").read_text()
    told = capsys.readouterr().out
    assert f"{len(known) - short}, 8, 8 (train, validation, test)" in told
    assert f"dropped: {others} with other labels, {short} by their length" in told
    assert "no training utterance has the label middel" in told
    run_probe(data, "shared", "--validation_data", str(data / "train.csv"), "--random_weights", "false")
    assert "warning: 36 of 36 utterances of validation are training data too" in capsys.readouterr().out


def test_a_probe_hears_the_channel_of_each_utterance(data, tmp_path):
    pitches = {"low": 200, "high": 2_400}
    rows, noise = [], np.random.default_rng(1)
    for i in range(24):
        sides = [np.sin(2 * np.pi * pitch * np.arange(8_000) / 16_000) for pitch in pitches.values()]
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * np.stack(sides, 1) + noise.normal(0, 0.02, (8_000, 2)), 16_000)
        rows.append({"audio": f"{i}.wav", "duration": 0.5, "channel": i % 2, "label": [*pitches][i % 2]})
    for name, chosen in (("train", rows[:16]), ("test", rows[16:])):
        pd.DataFrame(chosen).to_csv(tmp_path / f"{name}.csv", index=False)
    flags = ["--train_data", str(tmp_path / "train.csv"), "--test_data", str(tmp_path / "test.csv")]
    flags += ["--checkpoints", str(data / "checkpoint-5"), "--random_weights", "false", "--use_cpu"]
    probe.main([*flags, "--output_dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "probe.json").read_text())["models"][0]["uar"] > 0.9


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        (run_probe, ["--folds", "speaker"], "on --test_data or on --folds"),
        (run_probe, ["--target", "mood"], "'mood'"),
        (run_probe, ["--labels", "low"], "single class"),
        (by_folds, ["--target", "speaker", "--folds", "speaker"], "train without the label 's0'"),
        (run_probe, ["--config_nam", "x"], "config_name"),
        (run_probe, ["--checkpoints", "absent"], "absent: no such folder"),
        (run_probe, ["--checkpoints", "hubert"], "hubert model"),
        (run_probe, ["--num_folds", "3"], "--num_folds needs --folds"),
        (verify, [], "one of --trials and --manifest"),
        (verify, ["--manifest", "all.csv", "--layer", "3"], "layers 0 to 2"),
        (verify, ["--manifest", "all.csv", "--speaker_column", "voice"], "'voice'"),
        (verify, ["--manifest", "all.csv", "--p_target", "1.5"], "--p_target"),
    ],
)
def test_bad_input_is_one_line(data, run, flags, message):
    HubertConfig().save_pretrained(data / "hubert")
    flags = [str(data / flag) if flag in ("hubert", "all.csv") else flag for flag in flags]
    with pytest.raises(UserError, match=message) as caught:
        run(data, "bad", *flags)
    assert "\n" not in str(caught.value)
