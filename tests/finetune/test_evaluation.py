"""Evaluation goes by seconds and moves no result; the best update is the lowest error, then the tie-breakers, then the
later one.
"""

import math

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from safetensors.torch import load_file
from two_ranks_ctc import VOCABULARY, make_trainer, write_speech

from w2v2.finetune.batching import cut_evaluation
from w2v2.finetune.text import greedy_decode

LARGE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("audio"))


@pytest.mark.parametrize("seed", range(5))
def test_batches_keep_to_order_budget_and_number(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 300, 60).tolist()
    batches = cut_evaluation(lengths, budget=1_000, most=7)
    assert [row for batch in batches for row in batch] == list(range(60))
    assert all(len(batch) <= 7 and len(batch) * max(lengths[row] for row in batch) <= 1_000 for batch in batches)
    assert cut_evaluation([5_000, 400, 400, 5_000], 1_000, 7) == [(0,), (1, 2), (3,)]


@pytest.mark.parametrize("large", [False, True])
def test_results_do_not_move_with_the_batches(table, tmp_path, large):
    outputs, losses = [], []
    for seconds, number in ((0.01, 8), (2.5, 8), (100.0, 3), (100.0, 8)):
        flags = dict(eval_micro_batch_seconds=seconds, per_device_eval_batch_size=number)
        trainer = make_trainer(table, tmp_path / f"{seconds}_{number}", LARGE if large else None, **flags)
        found = trainer.predict(trainer.eval_dataset)
        outputs.append((found.predictions, found.metrics["test_wer"], found.metrics["test_cer"]))
        losses.append(found.metrics["test_loss"])
    assert any(outputs[0][0]) and outputs == outputs[:1] * 4
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)


@pytest.mark.parametrize("seconds", [0.01, 100.0])
def test_long_and_unreadable_recordings_weigh_nothing(tmp_path, seconds):
    """Long ones go through in chunks while training, too; the others are as they are alone."""
    random, lengths = np.random.default_rng(0), (9.0, 5.9, 5.5, 2.0, 1.0)
    rows = [{"id": str(n), "audio": f"{tmp_path}/{n}.wav", "start": 0.0, "num_samples": int(n * 16_000), "text": "AB"}
            for n in lengths]  # fmt: skip
    for row in rows[:-1]:
        soundfile.write(row["audio"], random.uniform(-0.3, 0.3, row["num_samples"]), 16_000)
    (tmp_path / "1.0.wav").write_bytes(b"RIFF no audio")
    flags = dict(eval_micro_batch_seconds=seconds, max_skipped_fraction=0.5, chunk_seconds=6.0)
    trainer, heard = make_trainer(Dataset.from_list(rows), tmp_path / "run", **flags), []
    listen = trainer.model.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].shape[1]))
    found = trainer.predict(trainer.eval_dataset)
    listen.remove()
    assert max(heard) <= 6 * 16_000 + 400 and found.predictions[-1] is None
    alone, losses = [], []
    for row in rows[1:-1]:
        item = trainer.eval_dataset[rows.index(row)]
        with torch.no_grad():
            output = trainer.model(torch.tensor(item["input_values"])[None], labels=torch.tensor([item["labels"]]))
        losses.append(output.loss.item())
        alone.append(greedy_decode(output.logits[0].argmax(-1).tolist(), VOCABULARY))
    assert found.predictions[1:-1] == alone and any(alone)
    assert found.metrics["test_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def follow(trainer, monkeypatch, validations):
    """Let validations say what a list says, by updates."""

    def evaluate(**_):
        metrics = {f"eval_{name}": value for name, value in validations[trainer.state.global_step - 1].items()}
        trainer.log(metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    return trainer


NAN = math.nan
TIES = {  # what updates 1 to 4 measure, and the best of them
    "the error itself": ([dict(wer=0.3, cer=0.1), dict(wer=0.2, cer=0.4), dict(wer=0.25, cer=0.1), dict(wer=0.9, cer=0.0)], 2),
    "characters": ([dict(wer=1.0, cer=c, loss=9.0) for c in (0.9, 0.5, 0.2, 0.4)], 3),
    "the loss": ([dict(wer=1.0, cer=1.0, loss=loss) for loss in (4.0, 3.0, 2.0, 2.5)], 3),
    "the later one": ([dict(wer=1.0, cer=1.0, loss=3.0)] * 4, 4),
    "no number": ([dict(wer=w, cer=0.5, loss=3.0) for w in (NAN, 0.7, NAN, NAN)], 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIES)
def test_ties_are_broken_also_after_a_resume(table, tmp_path, monkeypatch, kind):
    validations, best = TIES[kind]
    flags = dict(max_steps=4, eval_steps=1, save_steps=1, save_total_limit=1)
    whole = follow(make_trainer(table, tmp_path / "run", **flags), monkeypatch, validations)
    whole.train()
    assert whole.best_update == best
    short = follow(make_trainer(table, tmp_path / "two", **flags | dict(max_steps=2)), monkeypatch, validations)
    short.train()
    again = follow(make_trainer(table, tmp_path / "two", **flags), monkeypatch, validations)
    again.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    assert again.best_update == best


@pytest.mark.parametrize("text, flag, measure", [
    ("A B", None, "wer"), ("AB", None, "cer"), ("AB", "wer", "wer"), ("AB", "eval_wer", "wer"), ("A B", "loss", "loss"),
])  # fmt: skip
def test_the_measure_is_chosen_only_where_no_flag_did(table, tmp_path, text, flag, measure):
    table = table.map(lambda row: {"text": text})
    trainer = make_trainer(table, tmp_path, metric_for_best_model=flag)
    assert (trainer.measure, trainer.args.metric_for_best_model) == (measure, flag or "")


def test_greater_measures_win_and_losses_break_their_ties(table, tmp_path, monkeypatch):
    flags = dict(eval_steps=1, save_steps=1, metric_for_best_model="uar", greater_is_better=True)
    validations = [dict(uar=0.5, loss=3.0), dict(uar=0.7, loss=2.0), dict(uar=0.7, loss=1.0), dict(uar=0.6, loss=0.5)]
    trainer = follow(make_trainer(table, tmp_path, **flags), monkeypatch, validations)
    trainer.train()
    assert trainer.best_update == 3


def test_the_best_update_is_one_that_was_saved(table, tmp_path, monkeypatch):
    validations = [dict(wer=rate) for rate in (0.1, 0.3, 0.2, 0.4)]  # the best two are validated only
    for load in (True, False):
        flags = dict(eval_steps=1, save_steps=2, save_total_limit=1, load_best_model_at_end=load)
        trainer = follow(make_trainer(table, tmp_path / str(load), **flags), monkeypatch, validations)
        trainer.train()
        assert trainer.best_update == (2 if load else None)
        if load:
            saved = load_file(tmp_path / str(load) / "checkpoint-2" / "model.safetensors")
            assert all((trainer.model.state_dict()[name] == value).all() for name, value in saved.items())
