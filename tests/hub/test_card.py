"""Model cards tell what was done and measured, and nothing else; curves."""

import json
import re

import pytest
import torch
from conftest import tiny_config
from huggingface_hub import ModelCard
from transformers import (
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
)

from w2v2.evaluate.plots import FINETUNING_PICTURES, draw_plots, gather_curves
from w2v2.hub.card import device_hours, publishable, write_finetuned_card, write_model_card

TOKEN = "hf_" + "SecretOfTheTest" * 2
CONFIG = {
    "hub_model_id": "speech-lab/tiny",
    "hub_token": TOKEN,
    "train_data": ["/home/somebody/corpus/train.csv", "lists/more.tsv"],
    "validation_data": ["/home/somebody/corpus/dev.csv"],
    "output_dir": "/home/somebody/runs/tiny",
    "batch_hours": 0.25,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10.0,
    "max_steps": 400,
    "learning_rate": 0.0005,
    "mask_time_prob": None,
    "max_gumbel_temperature": 2.0,
    "min_gumbel_temperature": 0.5,
    "data_description": "~3 h of read speech | openslr.org/0",
}
SUMMARY = {"utterances": 1234, "hours": 3.5, "validation_utterances": 56, "validation_hours": 0.2, "devices": "2 × CPU",
           "dropped": "3 too short, 1 unreadable"}  # fmt: skip
METRICS = [
    {"step": 10, "audio_hours": 2.5, "loss": 4.6, "contrastive_loss": 4.5, "accuracy": 0.02, "learning_rate": 1e-4},
    {
        "step": 20,
        "audio_hours": 5.0,
        "loss": None,
        "contrastive_loss": None,
        "accuracy": 0.1875,
        "learning_rate": 2e-4,
        "skipped_audio": 3,
    },
    {
        "step": 20,
        "audio_hours": 5.0,
        "eval_loss": 4.125,
        "eval_contrastive_loss": 4.0,
        "eval_accuracy": 0.15625,
        "eval_constant_guess_accuracy": 0.0625,
    },
]


def card_of(folder, config=CONFIG, metrics=METRICS):
    write_model_card(folder, config=config, summary=SUMMARY, metrics=metrics)
    return ModelCard.load(folder / "README.md")


def run_code_of(card, folder):
    """The names that the card's own code leaves, with a folder in the place of the repository."""
    names = {}
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    exec(re.sub(r'source = ".*?"', f"source = {str(folder)!r}", code), names)
    return names


def test_a_card_tells_recipe_data_and_results(tmp_path):
    tiny_config(num_negatives=9, num_codevectors_per_group=8, mask_time_prob=0.05).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    for row in (
        "| Effective batch | 0.25 h of audio |",
        "| Schedule | linear, warm-up 10 |",
        "| Updates | 20 of 400 |",
        "| Distractors | 9 |",
        "| Masks | probability 0.05, spans of 10 frames |",
        "| Training | `train.csv`, `lists/more.tsv`, 1,234 utterances, 3.50 h |",
        "| Unreadable in training, all told | 3 utterances |",
        "| Left out of training | 3 too short, 1 unreadable |",
        "| | Training, update 20 | Validation, update 20 |",
        "| Accuracy | 0.1875 | 0.1562 |",
        "| Accuracy of a constant guess | not measured | 0.0625 |",
        "| Loss | not measured | 4.125 |",
        "| Sources, as stated by who trained the model | ~3 h of read speech \\| openslr.org/0 |",
    ):
        assert row in card.text
    assert "codebooks: at most 2 × 8." in card.text
    assert "No licence was stated" in card.text and "Device-hours" not in card.text
    assert not any(secret in card.content for secret in (TOKEN, "somebody", str(tmp_path)))

    nothing = card_of(tmp_path, config={}, metrics=[])
    assert "| Accuracy | not measured | not measured |" in nothing.text
    assert "counting repetitions: not measured" in nothing.text
    assert not any(left in nothing.content for left in ("{{", "{%", "None"))


def test_texts_that_look_like_paths_are_published_as_they_are():
    texts = {"drop_characters": "/.,?!", "keep_characters": "/", "labels": ["/p/", "..", "~"], "label_map": ["/p/=/b/"],
             "train_labels": {"token": 5, "/p/": 3}, "id2label": {"0": "/p/"}}  # fmt: skip
    assert publishable(texts | {"hub_token": TOKEN, "data_root": "/home/somebody"}) == texts | {"data_root": "somebody"}


def test_device_hours_are_those_of_all_devices(tmp_path):
    rates = dict(audio_seconds_per_second=1000.0, loss=1.0)
    records = [
        {"step": 1, "audio_hours": 10.0, "num_processes": 2, **rates},  # 10 h at 1000 h an hour on two devices
        {"step": 1, "audio_hours": 10.0, "eval_loss": 1.0},
        {"step": 2, "audio_hours": 110.0, "num_processes": 4, **rates},
    ]
    assert device_hours(records) == pytest.approx(0.01 * 2 + 0.1 * 4)
    assert "| Device-hours | 0.42, " in card_of(tmp_path, metrics=records).text
    del records[0]["num_processes"]
    assert device_hours(records) is None


def test_metadata_claims_only_what_was_stated(tmp_path):
    def stated(**config):
        return card_of(tmp_path, config=CONFIG | config).data.to_dict()

    expected = {"library_name": "transformers", "tags": ["wav2vec2", "pretraining"]}
    assert stated() == expected
    assert stated(hub_license="cc-by-4.0") == expected | {"license": "cc-by-4.0"}
    assert "`cc-by-4.0`, as stated" in ModelCard.load(tmp_path / "README.md").text
    base = "facebook/wav2vec2-base"
    assert stated(model_name_or_path=base) == expected | {"base_model": base}
    assert stated(dataset_name="speech-lab/tones") == expected | {"datasets": ["speech-lab/tones"]}
    assert stated(dataset_name=str(tmp_path)) == expected
    assert stated(model_name_or_path="runs/a/b") == stated(model_name_or_path="base") == expected


def test_a_cards_own_code_loads_the_folder(tmp_path):
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    frames = run_code_of(card_of(tmp_path), tmp_path)["frames"]
    assert frames.shape == (1, 49, 32) and torch.isfinite(frames).all()


def test_a_recognisers_card_has_scores_recipe_and_code(tmp_path, capsys):
    config = tiny_config(vocab_size=5, pad_token_id=0)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4}))
    Wav2Vec2CTCTokenizer(tmp_path / "vocab.json").save_pretrained(tmp_path)
    draw_plots(tmp_path, [{"step": 1, "loss": 2.0}], FINETUNING_PICTURES, over=("step", "update"))
    rates = {"wer": 0.5, "cer": 0.25, "utterances": 9, "lm": {"wer": 0.125, "worst_utterances": []}}
    run = {"lm": {"path": "/home/me/x.arpa"}, "updates": 4, "best_update": 3, "train_utterances": 4, "train_hours": 0.5,
           "dropped": {"by their length": 3, "with a text longer than their audio": 0}}  # fmt: skip
    flags = dict(train_data=["/home/me/train.csv"], test_data=["test.csv"], max_steps=4, batch_seconds=1600.0)
    results = {"validation": {"wer": 0.4}, "test": rates, "run": run}
    write_finetuned_card(tmp_path, config=flags | {"device_hours": 1.5}, results=results)
    card = ModelCard.load(tmp_path / "README.md")
    for line in (
        "| Set | Utterances | WER | CER | WER with the language model |",
        "| `validation` |  | 40.00% | not measured | not measured |",
        "| `test` | 9 | 50.00% | 25.00% | 12.50% |",
        "| Language model of the search | x.arpa |",
        "| Effective batch | 1600 s of audio |",
        "| Device-hours, validation in between included | 1.50 |",
        "| Training | `train.csv`, 4 utterances, 0.50 h |",
        "| Left out of training | 3 by their length |\n",
        "![Loss](plots/loss.png)",
        "The best update was chosen on the set `validation`.",
        "No licence was stated.",
    ):
        assert line in card.text
    assert "| Validation |" not in card.text
    assert not any(left in card.content for left in ("{{", "{%", "None", "/home"))
    results["run"] = run | {"best_update": None}  # --load_best_model_at_end false
    write_finetuned_card(tmp_path, config=flags | {"max_steps": -1, "mask_time_prob": 0.5}, results=results)
    other = ModelCard.load(tmp_path / "README.md").text
    assert "The best update" not in other and "| Updates | 4 |" in other
    assert f"| Time masks | probability {config.mask_time_prob}, " in other  # the model's, as of a probe
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("validation", "wer", 0.4), ("test", "wer", 0.5), ("test", "cer", 0.25), ("test", "wer", 0.125)
    }  # fmt: skip
    run_code_of(card, tmp_path)
    assert capsys.readouterr().out.endswith("\n")


def test_a_classifiers_card_has_scores_classes_and_code(tmp_path, capsys):
    config = tiny_config(num_labels=2, id2label={0: "calm", 1: "angry"}, classifier_proj_size=8)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    scores = {"accuracy": 0.75, "uar": 0.5, "macro_f1": 0.25, "loss": 1.0, "utterances": 8, "confusion": []}
    write_finetuned_card(tmp_path, config={"train_data": ["train.csv"]}, results={"test": scores, "run": {}})
    card = ModelCard.load(tmp_path / "README.md")
    assert "| `test` | 8 | 75.00% | 50.00% | 0.2500 |" in card.text and "| Classes | 2: calm, angry |" in card.text
    assert {(r.task_type, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("audio-classification", name, value) for name, value in (("accuracy", 0.75), ("recall", 0.5), ("f1", 0.25))
    }  # fmt: skip
    assert "Device-hours" not in card.text
    run_code_of(card, tmp_path)
    assert "'calm'" in capsys.readouterr().out


def test_pictures_show_what_was_logged_and_are_embedded(tmp_path):
    assert gather_curves(METRICS, ["accuracy", "constant_guess_accuracy"], "audio_hours") == {
        "training": ([2.5, 5.0], [0.02, 0.1875]), "validation": ([5.0], [0.15625]),
        "validation, constant guess": ([5.0], [0.0625]),
    }  # fmt: skip
    names = ["plots/loss.png", "plots/accuracy.png", "plots/schedule.png"]
    drawn = draw_plots(tmp_path, METRICS)
    assert [path.relative_to(tmp_path).as_posix() for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert re.findall(r"!\[.*\]\((.*)\)", card_of(tmp_path).text) == names
    assert draw_plots(tmp_path / "empty", []) == []
