import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard, close_session, snapshot_download
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

from w2v2.errors import UserError
from w2v2.hub.card_parts import device_hours
from w2v2.hub.push import HubPusher, draw_plots, write_model_card

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "SecretOfTheTest" * 2
CONFIG = {
    "hub_model_id": "speech-lab/tiny",
    "hub_token": TOKEN,
    "train_data": ["/home/somebody/corpus/train.csv", "lists/more.tsv"],
    "validation_data": ["/home/somebody/corpus/dev.csv"],
    "output_dir": "/home/somebody/runs/tiny",
    "batch_hours": 0.25,
    "max_steps": 400,
    "learning_rate": 0.0005,
    "mask_time_prob": None,
    "max_gumbel_temperature": 2.0,
    "min_gumbel_temperature": 0.5,
    "data_description": "~3 h of read speech | openslr.org/0",
}
SUMMARY = {"utterances": 1234, "hours": 3.5, "validation_utterances": 56, "validation_hours": 0.2, "devices": "2 × CPU"}
METRICS = [
    {"step": 10, "audio_hours": 2.5, "loss": 4.6, "contrastive_loss": 4.5, "accuracy": 0.02, "learning_rate": 1e-4},
    {"step": 20, "audio_hours": 5.0, "loss": None, "contrastive_loss": None, "accuracy": 0.1875, "learning_rate": 2e-4},
    {"step": 20, "audio_hours": 5.0, "eval_loss": 4.125, "eval_contrastive_loss": 4.0, "eval_accuracy": 0.15625},
]


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, in the place of the Hub; waits between retries are skipped."""
    with HubStandIn() as stand_in:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.url)
        address = stand_in.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        close_session()
        yield stand_in
        close_session()


@pytest.fixture(scope="module")
def model():
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_codevectors_per_group=8,
        codevector_dim=8,
        proj_codevector_dim=8,
        num_negatives=9,
    )
    return Wav2Vec2ForPreTraining(config)


def make_folder(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def make_run(output_dir):
    """An output folder with everything that a run may leave in it; returns the names of what is to be published."""
    make_folder(output_dir)
    (output_dir / "README.md").write_text("---\ntags: [wav2vec2]\n---\n# tiny\n")
    (output_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    (output_dir / "plots").mkdir()
    (output_dir / "plots" / "loss.png").write_bytes(bytes(range(256)))
    public = {path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file()}
    make_folder(output_dir / "checkpoint-7")
    for private in (
        "checkpoint-7/training_state/optimizer.safetensors",
        "checkpoint-7/training_state/checksums.json",
        "training_state/state.json",
        "optimizer.safetensors",
        "trainer_state.json",
        "plan.json",
        "skipped_audio.jsonl",
        "runs/events.out.tfevents.1.host",
        "random_states.pkl",
    ):
        path = output_dir / private
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("private")
    return public


def pusher(output_dir, every_save=True, private=True, delays=(0.01, 0.01)):
    return HubPusher(
        output_dir,
        repo_id="speech-lab/tiny",
        private=private,
        token=TOKEN,
        every_save=every_save,
        retry_delays_seconds=delays,
    )


def wait_until(condition):
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("waited 10 s in vain")


@pytest.mark.parametrize("large", [(), (".safetensors", ".png")], ids=["regular", "lfs"])
def test_what_is_pushed_comes_down_byte_for_byte(tmp_path, hub, monkeypatch, large):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    hub.large = large
    public = make_run(tmp_path / "run")
    push = pusher(tmp_path / "run")
    push.push(tmp_path / "run", "the end")
    assert push.finish(30) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["the end"]
    downloaded = snapshot_download("speech-lab/tiny", cache_dir=tmp_path / "cache", token=TOKEN)
    for name in public:
        with open(os.path.join(downloaded, name), "rb") as file:
            assert file.read() == (tmp_path / "run" / name).read_bytes()


def test_only_what_belongs_to_the_model_is_sent(tmp_path, hub):
    public = make_run(tmp_path / "run")
    push = pusher(tmp_path / "run")
    push.push(tmp_path / "run", "the end")
    assert push.finish(30)
    assert hub.files.keys() == public


def test_the_resolved_configuration_is_sent_without_token_and_paths(tmp_path, hub):
    make_folder(tmp_path / "run")
    (tmp_path / "run" / "pretrain_config.yaml").write_text(yaml.safe_dump(CONFIG))
    push = pusher(tmp_path / "run")
    push.push(tmp_path / "run", "the end")
    assert push.finish(30)
    sent = hub.files["pretrain_config.yaml"].decode()
    assert TOKEN not in sent and "somebody" not in sent
    assert yaml.safe_load(sent)["train_data"] == ["train.csv", "lists/more.tsv"]
    assert yaml.safe_load(sent)["learning_rate"] == CONFIG["learning_rate"]


def test_a_checkpoint_is_pushed_to_the_root_even_when_it_is_rotated_away_at_once(tmp_path, hub):
    hub.gate.clear()
    checkpoint = make_folder(tmp_path / "run" / "checkpoint-7", weights=b"of step 7")
    push = pusher(tmp_path / "run")
    push.push(checkpoint, "step 7")
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    hub.gate.set()
    assert push.finish(30)
    assert hub.commits == ["step 7"]
    assert hub.files["model.safetensors"] == b"of step 7"


def test_pushes_go_one_at_a_time_and_a_waiting_one_gives_way_to_a_newer(tmp_path, hub):
    hub.gate.clear()
    push = pusher(tmp_path / "run")
    push.push(make_folder(tmp_path / "run" / "checkpoint-1", b"1"), "step 1")
    wait_until(lambda: push._waiting is None)
    for step in (2, 3):
        push.push(make_folder(tmp_path / "run" / f"checkpoint-{step}", b"%d" % step), f"step {step}")
    hub.gate.set()
    assert push.finish(30)
    assert hub.commits == ["step 1", "step 3"]
    assert hub.files["model.safetensors"] == b"3"


def test_nothing_is_left_behind_in_the_output_folder(tmp_path, hub):
    folder = make_folder(tmp_path / "run")
    (folder / ".hub_push-killed").mkdir()
    before = {path.name for path in folder.iterdir()} - {".hub_push-killed"}
    push = pusher(folder)
    push.push(folder, "the end")
    assert push.finish(30)
    wait_until(lambda: {path.name for path in folder.iterdir()} == before)


def test_without_every_save_only_the_output_folder_is_pushed(tmp_path, hub):
    make_folder(tmp_path / "run")
    push = pusher(tmp_path / "run", every_save=False)
    push.push(make_folder(tmp_path / "run" / "checkpoint-1"), "step 1")
    push.push(tmp_path / "run", "the end")
    assert push.finish(30)
    assert hub.commits == ["the end"]


@pytest.mark.parametrize("private, asked", [(True, "private"), (False, "public"), (None, None)])
def test_the_repository_is_made_as_private_as_was_asked(tmp_path, hub, private, asked):
    push = pusher(tmp_path, private=private)
    push.push(make_folder(tmp_path), "the end")
    assert push.finish(30)
    assert hub.created[0].get("visibility") == asked
    assert f"Bearer {TOKEN}" in hub.tokens


def test_a_name_without_an_owner_becomes_the_users_own(tmp_path, hub):
    push = HubPusher(make_folder(tmp_path / "run-1"), repo_id=None, private=True, token=TOKEN, every_save=False)
    push.push(tmp_path / "run-1", "the end")
    assert push.finish(30) == f"{hub.url}/{hub.user}/run-1"
    assert hub.files


@pytest.mark.parametrize(
    "where, status",
    [(where, status) for where in ("/preupload/", "/commit/") for status in (401, 403, 409, 500, 0)]
    + [("/repos/create", status) for status in (401, 403, 500, 0)],
)
def test_a_failing_hub_only_warns_and_never_shows_the_token(tmp_path, hub, caplog, where, status):
    caplog.set_level(logging.INFO)
    hub.failures = {where: status}
    if where == "/repos/create":
        hub.failures["/api/models/"] = 404
    push = pusher(make_folder(tmp_path / "run"))
    push.push(tmp_path / "run", "the end")
    assert push.finish(60) is None and hub.commits == []
    warnings = [record.message for record in caplog.records if record.name == "w2v2.hub.push"]
    assert any("speech-lab/tiny" in text and (str(status) in text or status == 0) for text in warnings)
    assert "offline" not in caplog.text and "SecretOfTheTest" not in caplog.text


def test_a_repository_that_exists_is_pushed_to(tmp_path, hub):
    for step in (1, 2):
        push = pusher(make_folder(tmp_path / "run", b"%d" % step))
        push.push(tmp_path / "run", f"run {step}")
        assert push.finish(30) == f"{hub.url}/speech-lab/tiny"
    assert len(hub.created) == 2 and hub.files["model.safetensors"] == b"2"


def test_a_hub_that_recovers_gets_the_next_push(tmp_path, hub, caplog):
    hub.failures = {"/repos/create": 403, "/api/models/": 403}
    push = pusher(make_folder(tmp_path / "run"))
    push.push(tmp_path / "run", "step 1")
    wait_until(lambda: any("the push failed" in record.message for record in caplog.records))
    hub.failures = {}
    push.push(tmp_path / "run", "step 2")
    assert push.finish(30) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["step 2"]


@pytest.mark.parametrize("status", [500, 409, 429, 0])
def test_a_push_that_fails_is_tried_again_until_it_arrives(tmp_path, hub, caplog, status):
    hub.failures = {"/preupload/": [status] * 2}  # 500 and 0 are tried again by huggingface_hub too, or by us
    push = pusher(make_folder(tmp_path / "run"))
    push.push(tmp_path / "run", "the end")
    assert push.finish(60) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["the end"] and hub.failures == {"/preupload/": []}


def test_what_is_tried_again_is_said_and_bounded(tmp_path, hub, caplog):
    hub.failures = {"/preupload/": 409}
    push = pusher(make_folder(tmp_path / "run"), delays=(0.01, 0.02, 0.03))
    push.push(tmp_path / "run", "the end")
    assert push.finish(60) is None
    said = [record.message.rpartition("; ")[2] for record in caplog.records if "the push failed" in record.message]
    assert said == ["next try in 0.01 s", "next try in 0.02 s", "next try in 0.03 s", "the run goes on"]


@pytest.mark.parametrize("status", [401, 403, 413])
def test_what_the_hub_refuses_is_not_tried_again(tmp_path, hub, caplog, status):
    hub.failures = {"/preupload/": status}
    push = pusher(make_folder(tmp_path / "run"), delays=(600,))
    push.push(tmp_path / "run", "the end")
    assert push.finish(60) is None
    assert sum("the push failed" in record.message for record in caplog.records) == 1


def test_a_push_that_waits_for_its_next_try_gives_way_to_a_newer_one(tmp_path, hub, caplog):
    hub.failures = {"/preupload/": [409]}
    push = pusher(tmp_path / "run", delays=(600,))
    push.push(make_folder(tmp_path / "run" / "checkpoint-1", b"1"), "step 1")
    wait_until(lambda: "next try in 600 s" in caplog.text)
    push.push(make_folder(tmp_path / "run" / "checkpoint-2", b"2"), "step 2")
    assert push.finish(30) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["step 2"]


def test_a_slow_hub_holds_up_nobody_and_gets_everything(tmp_path, hub):
    hub.delay_seconds = 0.2
    hub.gate.clear()
    push = pusher(make_folder(tmp_path / "run"))
    push.push(tmp_path / "run", "the end")  # returns, though no commit is answered before the next line
    assert hub.commits == []
    hub.gate.set()
    assert push.finish(60) == f"{hub.url}/speech-lab/tiny"
    assert hub.commits == ["the end"]


def test_a_hub_that_falls_silent_is_given_up_and_tried_again(tmp_path, hub, monkeypatch, caplog):
    monkeypatch.setattr("w2v2.hub.push.SILENCE_SECONDS", 0.3)
    hub.gate.clear()
    push = pusher(make_folder(tmp_path / "run"), delays=(0.01, 0.01, 0.01))
    push.push(tmp_path / "run", "the end")
    wait_until(lambda: "Timeout" in caplog.text)
    hub.gate.set()
    assert push.finish(60) == f"{hub.url}/speech-lab/tiny"
    assert "the end" in hub.commits


def test_a_hub_that_never_answers_cannot_hold_up_the_end(tmp_path, hub, caplog):
    hub.gate.clear()
    push = pusher(make_folder(tmp_path / "run"))
    push.push(tmp_path / "run", "step 1")
    assert push.finish(0.2) is None
    assert "given up" in caplog.text


def test_a_program_ends_though_its_push_never_does(tmp_path, hub):
    hub.gate.clear()
    make_folder(tmp_path / "run")
    program = f"""
from w2v2.hub.push import HubPusher
push = HubPusher({str(tmp_path / "run")!r}, repo_id="speech-lab/tiny", private=True, every_save=False)
push.push({str(tmp_path / "run")!r}, "the end")
print(push.finish(3))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    run = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, timeout=60, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"None\n")
    assert hub.created and f"Bearer {TOKEN}" in hub.tokens


def test_a_folder_that_is_gone_only_warns(tmp_path, hub, caplog):
    push = pusher(tmp_path / "run")
    push.push(tmp_path / "run" / "checkpoint-9", "step 9")
    assert push.finish(30) is None
    assert "checkpoint-9" in caplog.text


def test_a_name_that_no_repository_can_have_is_the_users_slip(tmp_path):
    with pytest.raises(UserError, match="--hub_model_id a/b/c"):
        HubPusher(tmp_path, repo_id="a/b/c", private=None, every_save=False)


def card_of(folder, config=CONFIG, metrics=METRICS):
    write_model_card(folder, config=config, summary=SUMMARY, metrics=metrics)
    return (folder / "README.md").read_text()


def test_the_card_tells_recipe_data_and_results(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    for row in (
        "| Effective batch | 0.25 h of audio |",
        "| Updates | 20 of 400 |",
        "| Gumbel temperature | 2.0 to 0.5 |",
        "| Distractors | 9 |",
        "| Masks | probability 0.05, spans of 10 frames |",
        "| Training | `train.csv`, `lists/more.tsv`, 1,234 utterances, 3.50 h |",
        "| Accuracy | 0.1875 | 0.1562 |",
        "| Loss | not measured | 4.125 |",
        "| Codebook perplexity (hard) | not measured | not measured |",
        "| Sources, as stated by who trained the model | ~3 h of read speech \\| openslr.org/0 |",
        "| Devices at the end of the run | 2 × CPU |",
    ):
        assert row in card
    assert "by chance it is 0.1000" in card
    assert "counting repetitions: 5.00" in card
    assert "no speech recogniser" in card
    assert "at most 2 × 8." in card and "No licence was stated" in card and "Device-hours" not in card


def test_device_hours_are_those_of_the_updates_on_however_many_devices(tmp_path):
    rates = dict(audio_seconds_per_second=1000.0, loss=1.0)
    records = [
        {"step": 1, "audio_hours": 10.0, "num_processes": 2, **rates},  # 10 h at 1000 h an hour on two devices
        {"step": 1, "audio_hours": 10.0, "eval_loss": 1.0},
        {"step": 2, "audio_hours": 110.0, "num_processes": 4, **rates},
    ]
    assert device_hours(records) == pytest.approx(0.01 * 2 + 0.1 * 4)
    assert "| Device-hours | 0.42, " in card_of(tmp_path, metrics=records)
    del records[0]["num_processes"]
    assert device_hours(records) is None


def test_weights_from_the_hub_are_the_base_model_and_a_folder_is_not(tmp_path):
    for source, expected in (("facebook/wav2vec2-base", "facebook/wav2vec2-base"), ("runs/a/b", None), ("base", None)):
        card_of(tmp_path, config={**CONFIG, "model_name_or_path": source})
        assert ModelCard.load(tmp_path / "README.md").data.base_model == expected


def test_the_card_holds_no_token_and_no_path_of_the_machine(tmp_path):
    card = card_of(tmp_path)
    assert TOKEN not in card and "somebody" not in card and str(tmp_path) not in card


def test_the_cards_metadata_claims_a_licence_only_when_one_was_stated(tmp_path):
    card_of(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {
        "library_name": "transformers",
        "tags": ["wav2vec2", "pretraining"],
    }
    card_of(tmp_path, config={**CONFIG, "hub_license": "cc-by-4.0"})
    assert ModelCard.load(tmp_path / "README.md").data.license == "cc-by-4.0"


def test_a_card_of_a_run_without_any_record_invents_nothing(tmp_path):
    card = card_of(tmp_path, config={}, metrics=[])
    assert "| Accuracy | not measured | not measured |" in card
    assert "counting repetitions: not measured" in card
    assert "$" not in card and "None" not in card


def test_the_cards_own_code_loads_the_folder(tmp_path, model):
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    code = re.search(r"```python\n(.*?)```", card_of(tmp_path), re.DOTALL)[1]
    names = {}
    exec(code.replace('"speech-lab/tiny"', repr(str(tmp_path))), names)
    assert names["frames"].shape == (1, 49, 16) and torch.isfinite(names["frames"]).all()


def test_the_card_embeds_every_picture_that_was_drawn(tmp_path):
    drawn = draw_plots(tmp_path, METRICS)
    assert re.findall(r"!\[.*\]\((.*)\)", card_of(tmp_path)) == [f"plots/{path.name}" for path in drawn]


def test_pictures_are_drawn_of_what_was_logged(tmp_path):
    drawn = draw_plots(tmp_path, METRICS)
    assert [path.relative_to(tmp_path).as_posix() for path in drawn] == [
        "plots/loss.png",
        "plots/accuracy.png",
        "plots/schedule.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert draw_plots(tmp_path / "empty", []) == []


def test_curves_run_over_hours_heard_beside_the_chance_line(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append((path.stem, figure)))
    (tmp_path / "config.json").write_text(json.dumps({"num_negatives": 9}))
    draw_plots(tmp_path, METRICS)
    axes = dict(figures)["accuracy"].axes[0]
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert curves["training"] == ([2.5, 5.0], [0.02, 0.1875])
    assert curves["validation"] == ([5.0], [0.15625])
    assert curves["chance"][1] == [0.1, 0.1]
    assert "hours" in axes.get_xlabel()
