"""Pushes to a stand-in of the Hub: what arrives, and that no failure reaches the run."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import run_here, write_recipe
from huggingface_hub import snapshot_download
from test_finetune_ctc import command
from test_finetune_ctc import data as data
from transformers import AutoModelForCTC
from transformers.trainer_utils import HubStrategy

import finetune_ctc
import pretrain
from w2v2.errors import UserError
from w2v2.finetune.text import CTCArguments, follow_text, read_vocabulary
from w2v2.hub.push import HubCallback, HubPusher, set_aside

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "SecretOfTheTest" * 2


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def make_folder(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


PUBLIC = {
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "README.md",
    "metrics.jsonl",
    "plots/loss.png",
}
PRIVATE = ("checkpoint-7/training_state/optimizer.safetensors", "checkpoint-7/config.json", "optimizer.safetensors",
           "trainer_state.json", "plan.json", "dry_run.json", "skipped_audio.jsonl",
           "runs/events.out.tfevents.1.host")  # fmt: skip


def flags(output_dir, **changes):
    values = dict(hub_model_id="speech-lab/tiny", hub_private_repo=True, hub_strategy="every_save")
    return SimpleNamespace(output_dir=output_dir, **values | changes)


def push_run(folder, message="the end", **changes):
    """A pusher that has taken this folder."""
    push = HubPusher(flags(make_folder(folder), **changes))
    push.push(folder, message)
    return push


@pytest.mark.parametrize("large", [(), (".safetensors", ".png")], ids=["regular", "lfs"])
def test_a_push_comes_down_byte_for_byte(tmp_path, hub, monkeypatch, large):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.large = large
    run = make_folder(tmp_path / "run")
    for name in (*PUBLIC, *PRIVATE):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(bytes(range(256)) if name.endswith("png") else b"---\ntags: [wav2vec2]\n---\n")
    before = {path.name for path in run.iterdir()}
    (run / ".hub_push-killed").mkdir()
    push = HubPusher(flags(run))
    push.push(run, "the end")
    assert push.finish(30) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["the end"] and hub.files.keys() == PUBLIC
    assert hub.created[0]["visibility"] == "private" and f"Bearer {TOKEN}" in hub.tokens
    downloaded = Path(snapshot_download("speech-lab/tiny", cache_dir=tmp_path / "cache"))
    assert all((downloaded / name).read_bytes() == (run / name).read_bytes() for name in PUBLIC)
    assert {path.name for path in run.iterdir()} == before


def test_pushed_urls_have_no_secrets(tmp_path):
    run, secret = make_folder(tmp_path / "run"), "https://me:s3cret@host/{0..9}.tar?sign=hid/den"
    (run / "pretrain_config.yaml").write_text(yaml.safe_dump({"train_data": [secret], "learning_rate": 0.1}))
    staged = yaml.safe_load((set_aside(run, run) / "pretrain_config.yaml").read_text())
    assert staged == {"train_data": ["https://host/{0..9}.tar?…"], "learning_rate": 0.1}


def test_the_last_push_waits_its_turn_a_checkpoint_does_not(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.large = (".safetensors",)
    hub.gate.clear()
    push = HubPusher(flags(make_folder(tmp_path / "run", b"last")))
    for step in (1, 2, 3):
        checkpoint = make_folder(tmp_path / "run" / f"checkpoint-{step}", b"%d" % step)
        push.push(checkpoint, f"step {step}")
        shutil.rmtree(checkpoint)  # as rotation does
    push.push(tmp_path / "run", "the end")
    hub.gate.set()
    assert push.finish(30)
    assert hub.commits == ["step 1", "the end"] and hub.files["model.safetensors"] == b"last"
    assert b"1" in hub.blobs.values()


@pytest.mark.parametrize("status", [401, 403, 500, 0])
@pytest.mark.parametrize("where", ["/preupload/", "/commit/", "/repos/create"])
def test_a_failing_hub_only_warns(tmp_path, hub, caplog, where, status):
    caplog.set_level(logging.INFO)
    hub.failures = {where: status}
    if where == "/repos/create":
        hub.failures["/api/models/"] = 404
    assert push_run(tmp_path / "run").finish(60) is None and hub.commits == []
    warnings = [record.message for record in caplog.records if record.name == "w2v2.hub.push"]
    assert any("speech-lab/tiny" in text and (str(status) in text or status == 0) for text in warnings)
    assert "offline" not in caplog.text and "SecretOfTheTest" not in caplog.text


def test_a_name_without_an_owner_becomes_the_users(tmp_path, hub):
    for step in (1, 2):  # the repository is made once
        push = push_run(tmp_path / "run-1", f"run {step}", hub_model_id=None, hub_private_repo=False)
        assert push.finish(30) == f"{hub.url}/{hub.user}/run-1"
    assert hub.commits == ["run 1", "run 2"] and "visibility" not in hub.created[0]


@pytest.mark.parametrize("status", [500, 429])
def test_a_hub_that_stumbles_is_asked_again(tmp_path, hub, status):
    hub.failures = {"/preupload/": [status] * 2}
    assert push_run(tmp_path / "run").finish(60) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["the end"] and hub.failures == {"/preupload/": []}


def test_a_silent_hub_is_given_up(tmp_path, hub, monkeypatch, caplog):
    monkeypatch.setattr("w2v2.hub.push.SILENCE_SECONDS", 0.3)
    hub.gate.clear()
    assert push_run(tmp_path / "run").finish(60) is None and "Timeout" in caplog.text


def test_a_silent_hub_cannot_hold_up_the_end(tmp_path, hub):
    hub.gate.clear()
    make_folder(tmp_path / "run")
    program = f"""
from types import SimpleNamespace
from w2v2.hub.push import HubPusher
push = HubPusher(SimpleNamespace(**{vars(flags(str(tmp_path / "run")))!r}))
push.push({str(tmp_path / "run")!r}, "the end")
print(push.finish(3))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, timeout=60, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"None\n") and b"given up" in run.stderr
    assert hub.created and f"Bearer {TOKEN}" in hub.tokens


def test_a_full_disk_only_warns(tmp_path, hub, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("w2v2.hub.push.shutil.copyfile", fail)
    assert push_run(tmp_path / "run").finish(30) is None
    assert "cannot push run" in caplog.text and "No space" in caplog.text


@pytest.mark.parametrize("name", ["a/b/c", "../evil", "a/../../b", "/etc"])
def test_a_name_of_no_repository_is_the_users_slip(tmp_path, name):
    with pytest.raises(UserError, match=f"--hub_model_id {name}"):
        HubPusher(flags(tmp_path, hub_model_id=name))


@pytest.mark.parametrize(("strategy", "pushed"), [("every_save", ["Weights after 2 updates"]), ("end", [])])
def test_trainers_checkpoints_are_pushed_as_asked(tmp_path, hub, strategy, pushed):
    for rank in (0, 1):  # the main process alone, and never Trainer itself
        args = flags(tmp_path, push_to_hub=True, process_index=rank, hub_strategy=HubStrategy(strategy))
        callback = HubCallback(args)
        assert args.push_to_hub is False
        (make_folder(tmp_path / "checkpoint-2") / "optimizer.pt").write_bytes(b"private")
        callback.on_save(args, SimpleNamespace(global_step=2), None)
        if callback.pusher:
            callback.pusher.finish(30)
    assert hub.commits == pushed and "optimizer.pt" not in hub.files


# Fine-tuned folders, to the Hub and back.

HUB = ["--push_to_hub", "--hub_model_id", "speech-lab/tiny", "--hub_private_repo", "true"]


def logits(source):
    model = AutoModelForCTC.from_pretrained(source).eval()
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 8_000)[None]).logits


def test_a_recogniser_comes_back_with_the_same_outputs(data, hub):
    more = ["--text_case", "lower", "--fold_accents", "true", "--drop_characters", "e", "--hub_strategy", "every_save"]
    finetune_ctc.main(command(data, *more, *HUB, output="pushed"))
    assert hub.commits[-1] == "Fine-tuned model" and hub.created[0]["visibility"] == "private"
    sent = b"\n".join(hub.files.values())
    assert TOKEN.encode() not in sent and str(data).encode() not in sent
    assert hub.files.keys() >= {"README.md", "results.json", "finetune_config.yaml", "vocab.json", "plots/loss.png"}
    assert not {"predictions.jsonl", "training_args.bin", "optimizer.pt", "trainer_state.json"} & hub.files.keys()
    assert json.loads(hub.files["results.json"])["run"]["model"] == "pretrained"
    assert yaml.safe_load(hub.files["finetune_config.yaml"])["train_data"] == ["train.csv"]
    assert torch.equal(logits("speech-lab/tiny"), logits(data / "pushed"))

    # It brings its normalisation of text along.
    flags = follow_text(CTCArguments(), "speech-lab/tiny", read_vocabulary("speech-lab/tiny"))
    assert (flags.text_case, flags.fold_accents, flags.drop_characters) == ("lower", True, "e")
    del hub.files["finetune_config.yaml"]
    hub.commits.append("without the flags")
    vocabulary = read_vocabulary("speech-lab/tiny")
    assert follow_text(CTCArguments(), "speech-lab/tiny", vocabulary) == CTCArguments(
        text_case="lower", keep_characters="."
    )


def test_a_failing_hub_ends_no_script(data, hub, caplog, capsys, tmp_path):
    hub.failures = {"": 401}
    finetune_ctc.main(command(data, *HUB, "--hub_strategy", "every_save", output="failing"))
    assert (data / "failing" / "model.safetensors").exists() and (data / "failing" / "README.md").exists()
    assert "pushed to: nowhere" in capsys.readouterr().out and "speech-lab/tiny" in caplog.text

    hub.failures = {"/commit/": 403}
    values = dict(batch_hours=0.001, micro_batch_seconds=4.0, max_steps=1, dataloader_num_workers=0, report_to=["none"])
    config = write_recipe(tmp_path, {}, **values, use_cpu=True)
    assert run_here(pretrain.main, config, "--output_dir", tmp_path / "run", *HUB) == 0
    assert (tmp_path / "run/model.safetensors").exists() and hub.created and hub.commits == []
