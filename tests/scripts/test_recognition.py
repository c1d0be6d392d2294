"""The recognition script beyond training: evaluation alone, a language model, few labels, phonemes."""

import json
import re
import shutil

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_finetune_ctc import check_pipeline, check_refusal, command, read_json, read_lines, write_manifest, write_rows
from test_finetune_ctc import data as data
from transformers import Wav2Vec2CTCTokenizer

import finetune_ctc
from w2v2.finetune.ctc_data import name_sets

ARPA = ("\\data\\\nngram 1=6\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\n-99\t<s>\t-0.3\n-1\t</s>\n-0.5\t{0}\t-0.2\n"
        "-0.7\t{1}\n-0.9\t{2}\n\n\\2-grams:\n-0.2\t{0} {1}\n\n\\end\\\n")  # fmt: skip


def test_every_test_set_has_a_name_of_its_own():
    assert name_sets(["a/test.csv", "b.tsv"]) == {"test": "a/test.csv", "b": "b.tsv"}
    paths = ["x/a.csv", "y/a.csv", "a_2.csv", "z/a.csv", "train.csv", "validation.csv"]
    named = name_sets(paths)
    assert sorted(named.values()) == sorted(paths) and not {"train", "validation", "run"} & set(named)


@pytest.fixture(scope="module")
def more(data):
    """Beside the fine-tuned run: a set without text, a language model."""
    for name in ("silent", "empty"):
        rows = []
        for i in range(2):
            samples = np.random.default_rng(i).uniform(-0.3, 0.3, 9_000 + 3_000 * i)
            soundfile.write(data / f"{name}_{i}.wav", samples, 16_000)
            rows.append({"audio": f"{name}_{i}.wav"} | ({"text": ""} if name == "empty" else {}))
        write_rows(data / f"{name}.csv", rows)
    (data / "lm.arpa").write_text(ARPA.format("ONE", "TWO", "THREE"))
    return data


def evaluate(folder, output, *flags, model="run"):
    finetune_ctc.main([
        "--do_train", "false", "--model_name_or_path", str(folder / model), "--output_dir", str(folder / output),
        "--use_cpu", "--report_to", "none", "--dataloader_num_workers", "0", *flags,
    ])  # fmt: skip
    return read_json(folder / output / "results.json"), read_lines(folder / output / "predictions.jsonl")


def test_a_folder_alone_gives_the_results_of_its_run(more):
    expected = read_json(more / "run" / "results.json")
    paths = (str(more / f"{name}.csv") for name in ("test", "silent", "empty"))
    results, lines = evaluate(more, "scores", "--test_data", *paths)
    same = ("wer", "cer", "utterances", "edits", "unknown_characters", "worst_utterances")
    assert {key: results["test"][key] for key in same} == {key: expected["test"][key] for key in same}
    assert results["test"]["loss"] == pytest.approx(expected["test"]["loss"], rel=1e-5)
    ran = [line for line in read_lines(more / "run" / "predictions.jsonl") if line["set"] == "test"]
    assert [line for line in lines if line["set"] == "test"] == ran
    for name in ("silent", "empty"):
        assert set(results[name]) == {"utterances", "hours"}
        found = [line for line in lines if line["set"] == name]
        assert {line["id"] for line in found} == {f"{name}_0.wav", f"{name}_1.wav"}
        assert all(set(line) == {"set", "id", "reference", "hypothesis", "words"} for line in found)
    assert not list((more / "scores").glob("checkpoint-*")) and not (more / "scores" / "model.safetensors").exists()


def test_a_checkpoint_can_be_scored_as_well(more):
    results, _ = evaluate(more, "scores_4", "--validation_data", str(more / "dev.csv"), model="run/checkpoint-4")
    assert set(results) == {"validation", "run"}


def test_results_hold_what_is_wrong_and_what_is_worst(more):
    results = read_json(more / "run" / "results.json")
    lines = [line for line in read_lines(more / "run" / "predictions.jsonl") if line["set"] == "validation"]
    validation, edits = results["validation"], results["validation"]["edits"]
    assert validation["unknown_characters"] == {"total": 3, "counts": {"Q": 1, "Ü": 1, "X": 1}}
    wrong = sum(edits[name] for name in ("substitutions", "deletions", "insertions"))
    assert validation["wer"] == pytest.approx(wrong / sum(len(line["reference"].split()) for line in lines))
    worst = validation["worst_utterances"]
    assert [line["wer"] for line in worst] == sorted((line["wer"] for line in lines if line["wer"]), reverse=True)


def test_a_language_model_is_tuned_and_reported(more):
    flags = ["--validation_data", f"{more}/dev.csv", "--test_data", f"{more}/test.csv", f"{more}/silent.csv"]
    results, lines = evaluate(more, "beam", *flags, "--lm", str(more / "lm.arpa"), "--tune_lm", "--beam_size", "20")
    greedy = read_json(more / "run" / "results.json")
    assert results["test"]["wer"] == greedy["test"]["wer"]
    run = results["run"]["lm"]
    best = min(run["grid"], key=lambda entry: entry["wer"])
    assert (run["lm_weight"], run["word_score"]) == (best["lm_weight"], best["word_score"])
    assert run["tuned_on"] == 3 and len(run["grid"]) == 25 and run["words"] == 3
    assert results["validation"]["lm"]["wer"] == pytest.approx(best["wer"], abs=1e-5)
    for line in lines:
        assert set(line["lm_hypothesis"].split()) <= {"ONE", "TWO", "THREE"}
        if line["reference"]:
            assert line["lm_wer"] == jiwer.wer(line["reference"], line["lm_hypothesis"])
    assert any(line["lm_hypothesis"] for line in lines)


def test_few_labels_by_seconds_and_by_list(more):
    flags = ["--train_hours", "0.0009", "--micro_batch_seconds", "2", "--batch_seconds", "3"]
    finetune_ctc.main(command(more, *flags, output="few"))
    run = read_json(more / "few" / "results.json")["run"]
    assert 0 < run["train_hours"] <= 0.0009 and 1 <= run["train_utterances"] < 5
    assert run["updates"] == 4
    (more / "list.txt").write_text("train_3.wav\ntrain_0\n")
    finetune_ctc.main(command(more, "--train_list", str(more / "list.txt"), output="listed"))
    assert read_json(more / "listed" / "results.json")["run"]["train_utterances"] == 2
    assert set(read_json(more / "listed" / "vocab.json")) == {"<pad>", "<unk>", "|", *"ONETWHR"}


def test_phonemes_are_learnt_and_scored(more):
    texts = {"train": ["W AH1 N sil T UW1", "T UW1", "W AH1 N"] * 2, "dev": ["T UW1 sil", "W AH1 ZH"]}
    for seed, (name, lines) in enumerate(texts.items()):
        write_manifest(more / f"phone_{name}.csv", lines, seed=10 + seed)
    flags = ["--train_data", str(more / "phone_train.csv"), "--validation_data", str(more / "phone_dev.csv"),
             "--target_unit", "tokens", "--drop_tokens", "sil", "--learning_rate", "0.003"]  # fmt: skip
    finetune_ctc.main(command(more, *flags, output="phones"))
    results = read_json(more / "phones" / "results.json")
    assert set(read_json(more / "phones" / "vocab.json")) == {"<pad>", "<unk>", "AH1", "N", "T", "UW1", "W"}
    assert results["validation"]["unknown_tokens"]["counts"] == {"ZH": 1} and "cer" not in results["validation"]
    assert results["validation"]["edits"]["words"] == 5
    lines = read_lines(more / "phones" / "predictions.jsonl")
    check_pipeline(more, "phones", lines)
    again, _ = evaluate(more, "phone_scores", "--test_data", str(more / "phone_dev.csv"), model="phones")
    assert again["phone_dev"]["per"] == results["validation"]["per"]
    assert again["phone_dev"]["edits"]["words"] == 5  # the folder says that sil is left out


SLIPS = {  # model to start from, flags, and what the message has to name
    "no_vocabulary": ("pretrained", "--test_data={data}/test.csv", "vocab.json"),
    "vocabulary_without_head": ("headless", "--test_data={data}/test.csv", "vocab.json has"),
    "torn_vocabulary": ("torn", "--test_data={data}/test.csv", "not a vocabulary"),
    "nothing_to_do": ("run", "--do_train=false", "--test_data"),
    "tuning_without_data": ("run", "--test_data={data}/test.csv --lm={data}/lm.arpa --tune_lm", "--validation_data"),
    "only_unknown_marks": ("run", "--test_data={data}/marks.csv", "marks.csv: none of its 1"),
}


@pytest.mark.parametrize("kind", SLIPS)
def test_a_slip_is_one_line_that_names_the_culprit(more, kind):
    shutil.copytree(more / "pretrained", more / "headless", dirs_exist_ok=True)
    shutil.copy(more / "run" / "vocab.json", more / "headless")
    (more / "torn").mkdir(exist_ok=True)
    (more / "torn" / "vocab.json").write_text("{")
    write_rows(more / "marks.csv", [{"audio": "test_0.wav", "text": "?!"}])
    model, flags, culprit = SLIPS[kind]
    flags = flags.format(data=more).split()
    check_refusal(lambda argv: evaluate(more, f"slip_{kind}", *argv, model=model), flags, culprit)


def test_lm_slips_show_before_any_training(more):
    (more / "lower.arpa").write_text(ARPA.format("one", "two", "three"))
    check_refusal(finetune_ctc.main, command(more, "--lm", str(more / "lower.arpa"), output="lm_slip"), "'one'")
    assert not list((more / "lm_slip").glob("checkpoint-*"))


def test_a_folder_of_lower_case_is_scored_in_lower_case(more):
    finetune_ctc.main(command(more, "--text_case", "lower", output="lower"))
    (more / "lower" / "finetune_config.yaml").unlink()  # the vocabulary tells it too
    results, lines = evaluate(more, "lower_scores", "--test_data", str(more / "test.csv"), model="lower")
    assert results["test"]["unknown_characters"]["total"] == 0
    assert {line["reference"] for line in lines} == {"three two", "one one"}


def test_long_recordings_go_in_chunks_with_subtitles(more):
    samples = np.concatenate([soundfile.read(more / f"dev_{i % 3}.wav")[0] for i in range(24)])
    soundfile.write(more / "long.wav", samples, 16_000)
    write_rows(more / "long.csv", [{"audio": "long.wav"}, {"audio": "dev_0.wav"}])
    flags = [
        "--test_data",
        f"{more}/long.csv",
        "--chunk_seconds",
        "10",
        "--subtitles",
        "srt",
        "--lm",
        f"{more}/lm.arpa",
    ]
    results, lines = evaluate(more, "long", *flags)
    assert results["long"]["utterances"] == 2 and results["long"]["in_chunks"] == 1
    words = next(line["words"] for line in lines if line["id"] == "long.wav")
    assert 0 <= words[0]["start"] < words[-1]["end"] <= len(samples) / 16_000
    assert all(a["end"] <= b["start"] for a, b in zip(words, words[1:], strict=False))
    for line in lines:
        assert " ".join(word["word"] for word in line["words"]) == line["hypothesis"]
    assert all(set(line["lm_hypothesis"].split()) <= {"ONE", "TWO", "THREE"} for line in lines)
    assert "-->" in (more / "long" / "subtitles" / "long" / "long.srt").read_text()


@pytest.mark.parametrize("texts, message", [
    (["one two", "three"], "head: kept from"),
    (["One four", "three"], "head: new, for .* has another vocabulary, without F, U"),
])  # fmt: skip
def test_going_on_keeps_the_head_of_the_same_vocabulary(more, capsys, texts, message):
    write_manifest(more / "on.csv", texts, seed=5)
    flags = ["--train_data", str(more / "on.csv"), "--max_steps", "1", "--eval_steps", "1", "--save_steps", "1",
             "--learning_rate", "0"]  # fmt: skip
    finetune_ctc.main(command(more, *flags, "--overwrite_output_dir", output="on", model="run"))
    assert re.search(message, capsys.readouterr().out)
    old, new = (load_file(more / run / "model.safetensors")["lm_head.weight"] for run in ("run", "on"))
    assert (old.shape == new.shape and torch.equal(old, new)) == ("kept" in message)
    assert (read_json(more / "on" / "vocab.json") == read_json(more / "run" / "vocab.json")) == ("kept" in message)


def test_text_without_spaces_is_measured_by_characters(more, capsys):
    write_manifest(more / "han.csv", ["天地人", "山水。火", "天地"], seed=6)
    write_manifest(more / "han_dev.csv", ["人山" * 40, "水火"], seed=7)
    flags = ["--train_data", str(more / "han.csv"), "--validation_data", str(more / "han_dev.csv")]
    finetune_ctc.main(command(more, *flags, output="han"))
    shown = capsys.readouterr().out
    assert "the lowest CER is the best" in shown and "dropped: from the text of train: 。 × 1" in shown
    assert "vocabulary: 9: |" in shown and "地 × 2" in shown
    state = read_json(next((more / "han").glob("checkpoint-*")) / "trainer_state.json")
    assert state["best_metric"] == min(line["eval_cer"] for line in state["log_history"] if "eval_cer" in line)
    assert read_json(more / "han" / "results.json")["validation"]["too_few_frames"] == 1
    assert "validation has 1 utterances with fewer frames than their text needs" in shown


def test_a_model_with_its_own_special_tokens_is_scored(more):
    """A folder as the stock tokenizer writes it: other names, and tokens added that the model may write."""
    shutil.copytree(more / "run", more / "theirs", dirs_exist_ok=True)
    own = {"<pad>": "[PAD]", "<unk>": "[UNK]"}
    vocabulary = {own.get(token, token): i for token, i in read_json(more / "run" / "vocab.json").items()}
    for path in (more / "theirs").glob("*.json"):
        if path.name not in ("config.json", "preprocessor_config.json"):
            path.unlink()
    (more / "theirs" / "finetune_config.yaml").unlink()
    (more / "theirs" / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(more / "theirs" / "vocab.json"), unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(more / "theirs")
    _, lines = evaluate(more, "their_scores", "--test_data", str(more / "test.csv"), model="theirs")
    _, ours = evaluate(more, "our_scores", "--test_data", str(more / "test.csv"))
    assert lines == ours
