"""A loss or gradient that is not finite costs its own update and nothing else: not a weight, not a moment, not the
batches to come.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_batch, read_curve, run_here, tiny_config, write_csv, write_tones
from datasets import Dataset
from ranks import run_ranks
from tiny_run import same, tensors
from two_ranks import FIVE, NOISY, build_model, pieces, settings

import pretrain
from w2v2.errors import UserError
from w2v2.model import objective
from w2v2.train.records import NON_FINITE_FILE, SkippedUpdates
from w2v2.train.update import train_update

REPOSITORY = Path(__file__).parents[2]
SPOILED_PIECE = 1  # its only utterance is number 2 of `two_ranks.LENGTHS`
TABLE = Dataset.from_dict({"id": [f"utterance-{number}" for number in range(7)], "audio": [""] * 7})

SPOIL = {
    "nan": lambda sums: sums._replace(loss=sums.loss * math.nan, contrastive=sums.contrastive * math.nan),
    "infinite_loss_alone": lambda sums: sums._replace(
        loss=sums.loss + math.inf, contrastive=sums.contrastive + math.inf
    ),
    "gradient_alone": lambda sums: sums._replace(loss=objective.scale_gradient(sums.loss, math.inf)),
}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def scaled(monkeypatch):
    """An accelerator as under fp16, but on the CPU: its first loss scale overflows in float32, the next one does not."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    return accelerator


class Trainee:
    """A small model with its optimizer, and what it was told of its updates."""

    def __init__(self, accelerator, folder, dtype=torch.float64, most_in_a_row=20):
        self.accelerator, self.model, self.spoil = accelerator, build_model(dtype, **NOISY), None
        self.batches = pieces(self.model.config, FIVE, dtype)
        self.optimizer = accelerator.prepare(torch.optim.AdamW(self.model.parameters(), lr=1.0, weight_decay=0.1))
        self.model.register_forward_hook(self._spoiled)
        args = SimpleNamespace(output_dir=folder, max_non_finite_updates=most_in_a_row)
        self.notes = SkippedUpdates(args, accelerator, TABLE)

    def _spoiled(self, _, arguments, sums):
        if self.accelerator.scaler is not None:  # steep enough to overflow at the first loss scale
            sums = sums._replace(loss=objective.scale_gradient(sums.loss, 2.0**20))
        return self.spoil(sums) if self.spoil and arguments[0].plan.piece == SPOILED_PIECE else sums

    def update(self, step, spoil=None, batches=None):
        self.spoil = spoil
        update = settings(step=step, learning_rate=1e-3, shared_diversity=False)
        metrics, totals = train_update(self.accelerator, self.model, self.optimizer, batches or self.batches, update)
        return metrics, self.notes.note(step + 1, metrics, totals)

    def state(self):
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return {str(i): x.detach().clone() for i, x in enumerate((*self.model.parameters(), *moments))}


def listed(folder):
    path = folder / NON_FINITE_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("kind", SPOIL)
def test_a_skipped_update_leaves_no_trace(accelerator, tmp_path, kind):
    spoiled, other = Trainee(accelerator, tmp_path), Trainee(accelerator, tmp_path / "other")
    for trainee in (spoiled, other):
        assert trainee.update(0)[1] is False
    before = spoiled.state()
    metrics, is_skipped = spoiled.update(1, SPOIL[kind])
    assert is_skipped and same(spoiled.state(), before)
    assert math.isfinite(metrics["loss"]) == (kind == "gradient_alone")
    assert math.isfinite(metrics["grad_norm"]) == (kind == "infinite_loss_alone")
    for trainee in (spoiled, other):
        assert trainee.update(2)[1] is False
    assert same(spoiled.state(), other.state()) and not same(spoiled.state(), before)


@pytest.mark.parametrize("kind", SPOIL)
def test_it_is_listed_with_the_utterances_to_blame_or_with_all(accelerator, tmp_path, kind):
    trainee = Trainee(accelerator, tmp_path)
    trainee.update(0)
    metrics, _ = trainee.update(1, SPOIL[kind])
    (line,) = listed(tmp_path)
    assert line["step"] == 2
    assert line["loss"] == (metrics["loss"] if kind == "gradient_alone" else None)
    assert line["grad_norm"] == (metrics["grad_norm"] if kind == "infinite_loss_alone" else None)
    assert line["ids"] == (TABLE["id"][:] if kind == "gradient_alone" else ["utterance-2"])


def test_too_many_in_a_row_end_the_run(accelerator, tmp_path):
    trainee = Trainee(accelerator, tmp_path, most_in_a_row=3)
    for step, kind in enumerate(("nan", "nan", None, "nan", "nan")):
        trainee.update(step, kind and SPOIL[kind])
    with pytest.raises(UserError) as caught:
        trainee.update(5, SPOIL["gradient_alone"])
    message = str(caught.value)
    assert "3 updates in a row (4 to 6)" in message and "heard in them: utterance-2, " in message
    assert "and 2 more" in message and str(tmp_path / NON_FINITE_FILE) in message and "--learning_rate" in message
    assert "\n" not in message and "fp16" not in message


def test_an_overflow_of_fp16_is_not_blamed_on_audio(scaled, tmp_path):
    trainee = Trainee(scaled, tmp_path, torch.float32)
    before, scale = trainee.state(), scaled.scaler.get_scale()
    metrics, is_skipped = trainee.update(0)
    assert is_skipped and math.isfinite(metrics["loss"]) and not math.isfinite(metrics["grad_norm"])
    assert same(trainee.state(), before) and scaled.scaler.get_scale() == scale * 2.0**-120
    metrics, is_skipped = trainee.update(1)
    assert not is_skipped and math.isfinite(metrics["grad_norm"]) and not same(trainee.state(), before)
    assert listed(tmp_path) == []
    _, is_skipped = trainee.update(2, SPOIL["nan"])
    assert is_skipped and [line["ids"] for line in listed(tmp_path)] == [["utterance-2"]]


@pytest.mark.parametrize("kind", ["infinite_loss_alone", "nothing_read"])
def test_a_loss_scaler_goes_on_after_an_update_without_a_step(scaled, tmp_path, kind):
    """Its gradients were unscaled, which the scaler allows once a step."""
    trainee = Trainee(scaled, tmp_path, torch.float32)
    trainee.update(0)
    nothing = [make_batch(trainee.model.config, [9_000], weight=0.0)]
    before, scale = trainee.state(), scaled.scaler.get_scale()
    _, is_skipped = trainee.update(1, SPOIL.get(kind), nothing if kind == "nothing_read" else None)
    assert is_skipped == (kind != "nothing_read")
    assert same(trainee.state(), before) and scaled.scaler.get_scale() == scale
    assert trainee.update(2)[1] is False and not same(trainee.state(), before)


def test_overflows_alone_end_the_run_with_other_advice(scaled, tmp_path):
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=0.999)
    trainee = Trainee(scaled, tmp_path, torch.float32, most_in_a_row=2)
    trainee.update(0)
    with pytest.raises(UserError, match=r"2 updates in a row \(1 to 2\).*fp16 overflowed.*use bf16 or fp32") as caught:
        trainee.update(1)
    assert "utterance" not in str(caught.value)


# -- the whole script, on a file that is finite and far too loud

NUM_FILES, LOUD, STEPS = 16, 5, 8
UNBOUNDED = """import math
import w2v2.audio.crops
w2v2.audio.crops.MAX_AMPLITUDE = math.inf
import pretrain
pretrain.run_script(pretrain.main)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixteen files of one length, one of which holds finite samples beyond all bounds, and LARGE's architecture in
    miniature.

    The reader's own bound, which keeps such files away from the model, is lifted.
    """
    folder = tmp_path_factory.mktemp("non_finite")
    paths = write_tones(folder / "audio", [2.0] * NUM_FILES)
    tone, _ = soundfile.read(paths[LOUD])
    soundfile.write(paths[LOUD], np.float32(tone / np.abs(tone).max() * 3e38), 16_000, subtype="FLOAT")
    write_csv(folder / "train.csv", paths, [2.0] * NUM_FILES)
    tiny_config(large=True, **NOISY).save_pretrained(folder / "model")  # BASE's group norm would bear even these
    (folder / "unbounded.py").write_text(UNBOUNDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("w2v2.audio.crops.MAX_AMPLITUDE", math.inf)
        yield folder


def flags(corpus, output_dir, **changes):
    """Four utterances an update, each a micro-batch of its own."""
    values = dict(train_data=corpus / "train.csv", config_name=corpus / "model", output_dir=output_dir)
    values |= dict(batch_hours=7.7 / 3600, micro_batch_seconds=2, max_steps=STEPS, warmup_steps=2, learning_rate=1e-3)
    values |= dict(logging_steps=1, save_steps=1, save_total_limit=0)
    values |= dict(dataloader_num_workers=0, report_to="none", use_cpu=True)
    return [f"--{name}={value}" for name, value in (values | changes).items()]


@pytest.fixture(scope="module")
def whole_run(corpus):
    assert run_here(pretrain.main, *flags(corpus, corpus / "whole")) == 0
    return corpus / "whole"


def test_a_run_skips_and_lists_the_updates_that_hear_it(corpus, whole_run):
    lines = listed(whole_run)
    skipped = [line["step"] for line in lines]
    assert 1 < len(skipped) == STEPS * 4 / NUM_FILES  # once an epoch
    loud = f"tone{LOUD}"
    assert all(len(line["ids"]) == 1 and loud in line["ids"][0] for line in lines)
    found = read_curve(whole_run)
    assert [r["skipped_updates"] for r in found] == [sum(s <= step for s in skipped) for step in range(1, STEPS + 1)]
    assert [r["step"] for r in found if r["loss"] is None] == skipped
    events = [json.loads(line) for line in (whole_run / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "skipped_updates"]
    assert told["step"] == skipped[0] and "1 (listed in" in told["message"]
    for step in range(2, STEPS + 1):
        ours, before = (tensors(whole_run / f"checkpoint-{number}") for number in (step, step - 1))
        assert same(ours, before) == (step in skipped)


def test_a_resumed_run_counts_and_lists_as_an_uninterrupted_one(corpus, whole_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(whole_run, output_dir)
    first = listed(whole_run)[0]["step"]
    for step in range(first + 1, STEPS + 1):
        shutil.rmtree(output_dir / f"checkpoint-{step}")
    assert run_here(pretrain.main, *flags(corpus, output_dir, resume_from_checkpoint="auto")) == 0
    assert read_curve(output_dir) == read_curve(whole_run)
    assert (output_dir / NON_FINITE_FILE).read_bytes() == (whole_run / NON_FINITE_FILE).read_bytes()


def test_two_processes_skip_the_same_updates_and_list_the_same(corpus, whole_run):
    output_dir = corpus / "two_processes"
    run_ranks(corpus / "logs", corpus / "unbounded.py", *flags(corpus, output_dir))
    assert (output_dir / NON_FINITE_FILE).read_bytes() == (whole_run / NON_FINITE_FILE).read_bytes()
    for ours, theirs in zip(read_curve(output_dir), read_curve(whole_run), strict=True):
        assert ours["skipped_updates"] == theirs["skipped_updates"]
        assert ours["loss"] == (theirs["loss"] and pytest.approx(theirs["loss"], rel=1e-3))
    ours, theirs = (tensors(run / f"checkpoint-{STEPS}") for run in (output_dir, whole_run))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-5) for key in theirs)
