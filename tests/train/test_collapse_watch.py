"""What a run does about a collapse: it warns, then stops, and keeps the checkpoint from before."""

import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import run_here, tiny_config, write_csv, write_tones
from datasets import Dataset
from safetensors.numpy import save

import pretrain
from w2v2.arguments import PretrainArguments
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.train.checkpoint import FILES
from w2v2.train.collapse import CollapseWatch
from w2v2.train.log import read_metrics
from w2v2.train.records import json_line

GOOD = dict(accuracy=0.3, codebook_perplexity_hard=50.0, distractors_left=98.0)
BAD = dict(accuracy=0.5, codebook_perplexity_hard=2.5, distractors_left=40.0)
MAIN = SimpleNamespace(is_main_process=True, mixed_precision="no")


def record(step, measures):
    return measures | dict(
        step=step, contrastive_loss=3.0 + 0.1 * (step % 7), batch_hours=1.6, gumbel_temperature=2.0, skipped_updates=7
    )


def records():
    """Good up to update 100, bad from 110 on."""
    return [record(step, GOOD if step <= 100 else BAD) for step in range(10, 301, 10)]


@pytest.fixture
def utterances(tmp_path):
    """Four files of which three are silence, as near as a sound card comes to it."""
    paths = write_tones(tmp_path / "audio", [1.0])
    for number in range(3):
        paths.append(tmp_path / "audio" / f"silence{number}.wav")
        noise = 1e-4 * np.random.default_rng(number).standard_normal(16_000)
        soundfile.write(paths[-1], noise, 16_000, subtype="FLOAT")
    columns = dict(audio=list(map(str, paths)), start=[0.0] * 4, num_samples=[16_000] * 4, id=list("abcd"))
    return Utterances(Dataset.from_dict(columns), np.full(4, 16_000, np.int32), {})


@pytest.fixture
def build(tmp_path, utterances):
    def make(action="stop", first_step=0, accelerator=MAIN, **flags):
        args = PretrainArguments(
            train_data=["x"], output_dir=str(tmp_path), collapse_action=action, collapse_window_steps=100, **flags
        )
        return CollapseWatch(args, tiny_config(num_negatives=100), utterances, accelerator, first_step)

    return make


def checkpoint(folder, step):
    for name in FILES:
        path = folder / f"checkpoint-{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save({}) if name.endswith(".safetensors") else b"{}")


def show(watch, after=0, until=300):
    for entry in records():
        if after < entry["step"] <= until:
            watch.see(entry)


def test_it_stops_with_a_line_on_what_since_when_and_why(build, tmp_path, caplog):
    for step in (50, 100, 150):
        checkpoint(tmp_path, step)
    watch = build(accelerator=SimpleNamespace(is_main_process=True, mixed_precision="fp16"))
    show(watch, until=200)
    (warning,) = caplog.messages
    assert "half of --collapse_window_steps 100; the run stops" in warning and "since update 110" in warning
    assert "fp16, with 7 updates skipped" in warning
    with pytest.raises(UserError) as caught:
        show(watch, after=200)
    message = str(caught.value)
    assert message.startswith(
        "the codes have collapsed: codebook_perplexity_hard is 2.50, below 4 (2 for each of 2 groups)"
    )
    assert "since update 110" in message and "75% of the utterances looked at are silence" in message
    assert f"{tmp_path}/checkpoint-100 is from before it" in message and "--collapse_action warn" in message
    assert "\n" not in message and len(caplog.messages) == 1


def test_a_run_told_to_warn_alone_warns_twice_and_goes_on(build, caplog):
    show(build("warn"))
    assert ["half of" in message for message in caplog.messages] == [True, False]
    assert "goes on" in caplog.messages[0]


@pytest.mark.parametrize(("num_saved", "limit", "told"), [(3, 3, 1), (2, 3, 0), (3, 0, 0)])
def test_no_checkpoint_is_removed_during_a_suspicion(build, tmp_path, caplog, num_saved, limit, told):
    """It is told once, and only where the next one is more than asked for."""
    for step in range(num_saved):
        checkpoint(tmp_path, step + 1)
    watch = build("warn")
    kept = []
    for entry in records():
        watch.see(entry)
        kept.append(watch.keep(limit))
    # All of them from the first bad record until the matter is settled.
    assert kept == [limit] * 10 + [0] * 10 + [limit] * 10
    assert sum(f"--save_total_limit {limit} are kept" in message for message in caplog.messages) == told


def test_a_resumed_run_has_seen_what_was_logged(build, tmp_path):
    lines = [json_line(entry) for entry in records() if entry["step"] <= 150]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines, json_line({"step": 150, "eval_loss": 1.0})]))
    watch = build(first_step=150)
    assert watch.keep(3) == 0
    show(watch, after=150, until=200)
    with pytest.raises(UserError, match="since update 110"):
        show(watch, after=200, until=210)


def test_a_resumed_run_does_not_forget_a_sure_collapse(build, tmp_path, caplog):
    """The earlier part only warned of it, or looked over a longer window."""
    lines = [json_line(entry) for entry in records() if entry["step"] <= 250]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="since update 110"):
        show(build(first_step=250), after=250)
    show(build("warn", first_step=250), after=250)
    (again,) = caplog.messages
    assert "since update 110" in again


# -- the whole script


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    paths = write_tones(folder / "audio", [1.5] * 12)
    write_csv(folder / "train.csv", paths, [1.5] * 12)
    tiny_config(num_negatives=100).save_pretrained(folder / "model")
    return folder


def run(corpus, output_dir, **changes):
    values = dict(train_data=corpus / "train.csv", config_name=corpus / "model", output_dir=output_dir, min_seconds=1)
    values |= dict(batch_hours=0.001, micro_batch_seconds=8, max_steps=120, warmup_steps=0, learning_rate=1e-3)
    values |= dict(logging_steps=1, save_steps=5, save_total_limit=1, collapse_window_steps=24)
    values |= dict(dataloader_num_workers=0, report_to="none", use_cpu=True)
    flags = [f"--{name}={value}" for name, value in (values | changes).items()]
    return run_here(pretrain.main, *flags, "--disable_tqdm")


ABSURD = dict(diversity_loss_weight=0, learning_rate=0.3, feature_penalty_weight=0)


def test_a_forced_collapse_stops_and_leaves_a_checkpoint(corpus, tmp_path, capsys, caplog):
    """A sound run of 15 updates goes on without diversity loss and with a learning rate 300 times too high."""
    folder = tmp_path / "run"
    assert run(corpus, folder, max_steps=15) == 0
    assert run(corpus, folder, resume_from_checkpoint="auto", **ABSURD) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    kept, warning = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert "more checkpoints than --save_total_limit 1 are kept" in kept
    since, last = int(re.search(r"since update (\d+)", line)[1]), read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 15 < since < 60 and "the codes have collapsed: codebook_perplexity_hard is 2." in line
    assert f"since update {since} " in warning and "for half of" in warning and "for all of" in line
    assert last - since == 24
    *_, half, collapse, stop = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    assert (half["event"], half["message"]) == ("warning", warning)
    assert (collapse["event"], stop["event"]) == ("collapse", "stop") and line.endswith(collapse["message"])
    assert "--diversity_loss_weight 0" in line and "--learning_rate 0.3" in line and "fp16" not in line
    before = (since - 1) // 5 * 5
    assert f"run/checkpoint-{before} is from before it" in line and (folder / f"checkpoint-{before}").is_dir()
    weights = dict(model_name_or_path=folder / f"checkpoint-{before}", config_name="none")
    assert run(corpus, tmp_path / "other", max_steps=2, **weights) == 0
