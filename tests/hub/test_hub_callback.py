"""A fine-tuned folder on its way to the Hub: `Trainer` with our push, the stand-in of the Hub, and back by `from_pretrained`."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import tiny_config
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard, close_session
from test_finetune_classification import command as classify
from test_finetune_classification import write_tones
from test_finetune_ctc import command, write_manifest
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)
from transformers.trainer_utils import HubStrategy

import finetune_classification
import finetune_ctc
from w2v2.errors import UserError
from w2v2.finetune.task_arguments import TEXT_FLAGS, CTCArguments, follow_folder
from w2v2.finetune.text import read_text_flags, read_vocabulary
from w2v2.hub.finetuned_card import write_finetuned_card
from w2v2.hub.hub_callback import HubCallback

TOKEN = "hf_" + "SecretOfTheTest" * 2
HUB = ["--push_to_hub", "--hub_model_id", "speech-lab/tiny-asr", "--hub_private_repo", "true",
       "--hub_license", "cc0-1.0", "--data_description", "noise, made by a test"]  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, in the place of the Hub; waits between retries are skipped."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with HubStandIn() as stand_in:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.url)
        address = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("transformers.utils.hub._is_offline_mode", False, raising=False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr("w2v2.hub.push.RETRY_DELAYS_SECONDS", (0.01,))
        close_session()
        yield stand_in
        close_session()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    write_manifest(folder / "train.csv", ["One two.", "two", "three one", "two three"], seed=0)
    write_manifest(folder / "dev.csv", ["two one", "three"], seed=1)
    write_manifest(folder / "test.csv", ["three two", "one one"], seed=2)
    torch.manual_seed(0)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(folder / "pretrained")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "pretrained")
    return folder


def test_a_fine_tuned_folder_comes_back_from_the_hub_with_the_same_outputs(data, hub, tmp_path):
    more = ["--test_data", str(data / "test.csv"), "--hub_strategy", "every_save", *HUB]
    finetune_ctc.main(command(data, *more, output="pushed"))
    run = data / "pushed"
    assert hub.commits[-1] == "Fine-tuned model" and hub.created[0]["visibility"] == "private"
    sent = b"\n".join(hub.files.values())
    assert TOKEN.encode() not in sent and str(data).encode() not in sent
    assert hub.files.keys() >= {"README.md", "results.json", "finetune_config.yaml", "vocab.json", "plots/loss.png"}
    assert not {"predictions.jsonl", "training_args.bin", "optimizer.pt", "trainer_state.json"} & hub.files.keys()
    assert json.loads(hub.files["results.json"])["run"]["model"] == "pretrained"
    assert yaml.safe_load(hub.files["finetune_config.yaml"])["train_data"] == ["train.csv"]

    options = dict(cache_dir=tmp_path, token=TOKEN)
    there, here = (AutoModelForCTC.from_pretrained(source, **options).eval() for source in ("speech-lab/tiny-asr", run))
    extractor = AutoFeatureExtractor.from_pretrained("speech-lab/tiny-asr", **options)
    inputs = extractor(torch.randn(8_000).numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(there(**inputs).logits, here(**inputs).logits)


def test_a_recogniser_on_the_hub_brings_its_normalisation_along(data, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    more = ["--text_case", "lower", "--fold_accents", "true", "--drop_characters", "e", *HUB]
    finetune_ctc.main(command(data, *more, output="accents"))
    text_flags = follow_folder(CTCArguments(), "speech-lab/tiny-asr", read_vocabulary("speech-lab/tiny-asr"))
    assert (text_flags.text_case, text_flags.fold_accents, text_flags.drop_characters) == ("lower", True, "e")
    del hub.files["finetune_config.yaml"]
    hub.commits.append("without the flags")
    assert read_text_flags("speech-lab/tiny-asr", TEXT_FLAGS) == {}


def test_a_classifier_comes_back_from_the_hub_with_the_same_outputs(data, hub, tmp_path):
    for name, count in (("tones", 12), ("tones_dev", 6)):
        write_tones(data / f"{name}.csv", count, seed=0)
    sets = ["--train_data", str(data / "tones.csv"), "--validation_data", str(data / "tones_dev.csv")]
    finetune_classification.main(classify(data, *sets, *HUB, output="classifier"))
    assert hub.commits[-1] == "Fine-tuned model"
    assert hub.files.keys() >= {"README.md", "results.json", "finetune_config.yaml", "plots/loss.png"}
    options = dict(cache_dir=tmp_path, token=TOKEN)
    there, here = (
        AutoModelForAudioClassification.from_pretrained(source, **options).eval()
        for source in ("speech-lab/tiny-asr", data / "classifier")
    )
    assert there.config.id2label == here.config.id2label == {0: "high", 1: "low", 2: "middle"}
    speech = torch.randn(2, 8_000)
    with torch.no_grad():
        assert torch.equal(there(speech).logits, here(speech).logits)


def test_checkpoints_are_pushed_as_they_are_saved(tmp_path, hub):
    callback = HubCallback(arguments(tmp_path, hub_strategy=HubStrategy.EVERY_SAVE))
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"2")
    (checkpoint / "optimizer.pt").write_bytes(b"private")
    callback.on_save(arguments(tmp_path), SimpleNamespace(global_step=2), None)
    assert callback.pusher.finish(30)
    assert hub.commits == ["Weights after 2 updates"] and hub.files == {"model.safetensors": b"2"}


def arguments(folder, **changes):
    values = dict(push_to_hub=True, process_index=0, world_size=1, output_dir=str(folder), hub_token=TOKEN,
                  hub_model_id="speech-lab/tiny-asr", hub_private_repo=True, hub_strategy=HubStrategy.END)  # fmt: skip
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize("failures", [{"": 401}, {"": 500}, {"": 0}, {"/commit/": 409}], ids=str)
def test_a_failing_hub_neither_ends_nor_holds_up_fine_tuning(data, hub, failures, caplog, capsys):
    hub.failures = failures
    finetune_ctc.main(command(data, *HUB, "--hub_strategy", "every_save", "--overwrite_output_dir", output="failing"))
    assert (data / "failing" / "model.safetensors").exists() and (data / "failing" / "README.md").exists()
    assert "pushed to: nowhere" in capsys.readouterr().out
    assert "speech-lab/tiny-asr" in caplog.text and TOKEN not in caplog.text


def test_only_the_main_process_pushes_and_the_trainer_never_does(tmp_path):
    for changes in (dict(process_index=1), dict(push_to_hub=False)):
        args = arguments(tmp_path, **changes)
        assert HubCallback(args).pusher is None and args.push_to_hub is False


def test_a_name_that_no_repository_can_have_is_the_users_slip(tmp_path):
    with pytest.raises(UserError, match="hub_model_id"):
        HubCallback(arguments(tmp_path, hub_model_id="a/b/c"))


@pytest.fixture(scope="module")
def fine_tuned(data):
    """A run that was not pushed: its card is written all the same."""
    finetune_ctc.main(command(data, "--test_data", str(data / "test.csv"), output="plain"))
    return data / "plain"


def test_the_card_has_the_scores_in_text_and_in_the_hubs_metadata(fine_tuned):
    results = json.loads((fine_tuned / "results.json").read_text())
    card = ModelCard.load(fine_tuned / "README.md")
    found = {(r.dataset_name, r.metric_type): (r.task_type, r.metric_value) for r in card.data.eval_results}
    expected = {
        (name, measure): ("automatic-speech-recognition", results[name][measure])
        for name in ("validation", "test")
        for measure in ("wer", "cer")
    }
    assert found == expected and card.data.pipeline_tag == "automatic-speech-recognition"
    assert f"| `test` | 2 | {results['test']['wer']:.2%} | {results['test']['cer']:.2%} |" in card.text
    assert "| Training | `train.csv`, 4 utterances, " in card.text and "| Test | `test.csv` |" in card.text
    assert "| Updates | 4 of 4 |" in card.text and "| Initial weights | pretrained |" in card.text
    assert "| Effective batch | 4 utterances |" in card.text and "| Device-hours" in card.text
    assert "![Error rates](plots/error_rate.png)" in card.text and "No licence was stated" in card.text
    assert str(fine_tuned) not in card.content and "None |" not in card.content and "$" not in card.text


def run_code_of(card, source, capsys):
    """What the card's own code prints, with a folder in the place of the repository."""
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    exec(re.sub(r'source = ".*?"', f"source = {str(source)!r}", code), {})
    return capsys.readouterr().out


def test_the_cards_own_code_runs(fine_tuned, capsys):
    assert run_code_of(ModelCard.load(fine_tuned / "README.md"), fine_tuned, capsys).endswith("\n")


def test_a_classifiers_card_has_its_scores_classes_and_code(tmp_path, capsys):
    config = tiny_config(num_labels=2, id2label={0: "calm", 1: "angry"}, classifier_proj_size=8)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    results = {
        "test": {"accuracy": 0.75, "uar": 0.5, "macro_f1": 0.25, "loss": 1.0, "utterances": 8, "confusion": []},
        "run": {},
    }
    assert write_finetuned_card(tmp_path, config={"train_data": ["train.csv"]}, results=results)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| `test` | 8 | 75.00% | 50.00% | 0.2500 |" in card.text and "| Classes | 2: calm, angry |" in card.text
    assert {(r.task_type, r.metric_type, r.metric_value) for r in card.data.eval_results} == {
        ("audio-classification", "accuracy", 0.75), ("audio-classification", "recall", 0.5), ("audio-classification", "f1", 0.25)
    }  # fmt: skip
    assert "Device-hours" not in card.text and "'calm'" in run_code_of(card, tmp_path, capsys)
    labels = {
        entry["label"] for entry in pipeline("audio-classification", model=str(tmp_path))(torch.randn(8_000).numpy())
    }
    assert labels == {"calm", "angry"}


def test_scores_with_a_language_model_stand_beside_those_without(fine_tuned, tmp_path):
    (tmp_path / "config.json").write_text((fine_tuned / "config.json").read_text())
    test = {"wer": 0.5, "utterances": 9, "lm": {"wer": 0.25, "worst_utterances": []}}
    results = {"test": test, "run": {"lm": {"path": "/home/me/x.arpa"}}}
    assert write_finetuned_card(tmp_path, config={"batch": "1600 s of audio"}, results=results)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| Set | Utterances | WER | WER with the language model |" in card.text
    assert "| `test` | 9 | 50.00% | 25.00% |" in card.text and "| Effective batch | 1600 s of audio |" in card.text
    assert "| Language model of the search | x.arpa |" in card.text
    assert sorted(r.metric_value for r in card.data.eval_results) == [0.25, 0.5]


def test_a_model_without_a_card_of_its_own_gets_none(tmp_path):
    assert not write_finetuned_card(tmp_path, config={}, results={})
    assert not (tmp_path / "README.md").exists()
