import json
import re

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from two_ranks_ctc import make_trainer, write_speech

from w2v2.errors import UserError
from w2v2.finetune.batching import LengthSampler
from w2v2.train.schedule import lr_factor


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("audio"))


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(trainer, expected):
    torch.testing.assert_close(weights(trainer), expected, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 5, 64, 203])
def test_the_order_is_a_function_of_seed_and_epoch(n):
    sampler = LengthSampler(list(range(n)), 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(n)) and list(sampler) == first
    sampler.epoch = 1
    assert n < 8 or first not in (list(sampler), list(LengthSampler(list(range(n)), 8, seed=2)))


def test_batches_are_of_like_length_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 1_000, 800)
    batches = lengths[list(LengthSampler(lengths.tolist(), 8, seed=0))].reshape(-1, 8)
    means = batches.mean(1)
    assert np.ptp(batches, axis=1).mean() < 50  # a random batch of eight spreads over about 780
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.35  # sorted batches: above 0.9


def test_four_batches_of_one_equal_one_batch_of_four(table, tmp_path):
    flags = dict(max_steps=1, eval_steps=1, save_steps=1, optim="sgd", warmup_steps=0.0)
    results = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        trainer = make_trainer(table.select(range(4)), tmp_path / f"{batch}", **flags, **sizes)
        before = weights(trainer)
        trainer.train()
        change = {name: value - before[name] for name, value in weights(trainer).items()}
        results.append((change, trainer.state.log_history[0]["loss"]))
    for change, loss in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-4)
        torch.testing.assert_close(change, results[0][0], rtol=1e-3, atol=1e-6)


def test_the_learning_rate_is_tri_stage(table, tmp_path):
    trainer = make_trainer(table, tmp_path, max_steps=10, eval_steps=10, save_steps=10)
    trainer.train()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in logged if "loss" in entry]
    expected = [1e-3 * lr_factor(step, 10, 0.1, "tri_stage", 0.4, 0.05) for step in range(10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rates[:5] == [1e-3] * 5 and rates[-1] < 2e-4


def test_each_record_is_a_line_on_the_console(table, tmp_path, capsys):
    make_trainer(table, tmp_path, max_steps=4, eval_steps=2, save_steps=2, logging_steps=2).train()
    expected = []
    for r in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        if "loss" in r:
            found = (
                rf"loss {r['loss']:.3f} \| rate {r['learning_rate']:.2e} \| epoch {r['epoch']:.2f} \| \d\d:\d\d left"
            )
        else:
            rates = rf"WER {r['eval_wer']:.1%} \| CER {r['eval_cer']:.1%}"
            found = rf"validation loss {r['eval_loss']:.3f} \| {rates}"
        expected.append(rf"step {r['step']}/4 \| {found}")
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("step ")]
    assert len(expected) == 4 and all(map(re.fullmatch, expected, lines)) and len(lines) == 4, lines
    assert "{" not in captured.out + captured.err


@pytest.mark.parametrize("by_seconds", [False, True])
def test_a_loss_of_nan_ends_the_run(table, tmp_path, by_seconds):
    flags = dict(batch_seconds=4.0, micro_batch_seconds=2.5) if by_seconds else {}
    trainer = make_trainer(table, tmp_path, max_steps=4, eval_steps=1, save_steps=1, **flags)
    with torch.no_grad():
        trainer.model.lm_head.bias[3] = torch.nan
    with pytest.raises(UserError, match="update 1: the loss is NaN or infinite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("batch", "accumulation", "expected"),
    [(64, 1, "3 of 8 s (all 8 utterances), 3.0 epochs"), (3, 2, "6 of 4 s (6 utterances), 3.0 epochs")],
)
def test_the_plan_counts_updates_as_trainer_does(table, tmp_path, capsys, batch, accumulation, expected):
    sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer = make_trainer(table, tmp_path, max_steps=-1, num_train_epochs=3, eval_steps=99, save_steps=99, **sizes)
    trainer.describe(None)
    trainer.train()
    assert f"updates: {expected}" in capsys.readouterr().out
    assert (trainer.state.global_step, trainer.state.epoch) == (int(expected.split()[0]), 3.0)


def test_a_finished_run_is_resumed_to_no_effect(table, tmp_path):
    flags = dict(max_steps=3, eval_steps=1, save_steps=1, load_best_model_at_end=False)  # an epoch has four updates
    whole, again = (make_trainer(table, tmp_path / name, **flags) for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == 3
    assert_equal(again, weights(whole))
    with pytest.raises(UserError, match="seed 7"):
        make_trainer(table, tmp_path / "other", **flags, seed=7).train(str(tmp_path / "whole" / "checkpoint-3"))


def test_a_resumed_run_takes_the_flags_of_its_optimizer(table, tmp_path, capsys):
    flags = dict(max_steps=4, eval_steps=1, save_steps=1, save_total_limit=9, load_best_model_at_end=False)
    make_trainer(table, tmp_path / "run", **flags).train()
    more = dict(learning_rate=1e-4, weight_decay=0.3, adam_beta2=0.5, eval_steps=2, save_steps=2)
    again = make_trainer(table, tmp_path / "again", **(flags | more))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    rates = [record["learning_rate"] for record in again.state.log_history if "loss" in record][-2:]
    expected = [1e-4 * lr_factor(step, 4, 0.1, "tri_stage", 0.4, 0.05) for step in (2, 3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert [(g["betas"][1], g["weight_decay"]) for g in again.optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "again").glob("checkpoint-*")] == ["checkpoint-4"]
    for text in ("learning_rate 0.0001 (was 0.001)", "weight_decay 0.3 (was 0.0)", "betas (0.9, 0.5) (was (0.9, "):
        assert f"resuming: {text}" in said


def test_at_first_only_the_head_learns(table, tmp_path):
    changed = []
    for steps in (2, 3):
        flags = dict(max_steps=steps, eval_steps=steps, save_steps=steps, freeze_encoder_steps=2)
        trainer = make_trainer(table, tmp_path / str(steps), **flags)
        before = weights(trainer)
        trainer.train()
        changed.append({name for name, value in weights(trainer).items() if not torch.equal(value, before[name])})
    assert changed[0] == {"lm_head.weight", "lm_head.bias"}
    assert "wav2vec2.encoder.layers.0.attention.q_proj.weight" in changed[1]
    assert "wav2vec2.feature_projection.projection.weight" in changed[1]
    assert not any(name.startswith("wav2vec2.feature_extractor") for name in changed[1])


@pytest.fixture
def broken(table, tmp_path):
    """Eight utterances, of which the fourth does not decode."""
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    rows = table.to_list()
    rows[3]["audio"] = str(tmp_path / "broken.wav")
    return Dataset.from_list(rows)


def test_unreadable_utterances_are_not_scored(broken, tmp_path):
    trainer = make_trainer(broken, tmp_path / "run", max_skipped_fraction=0.2)
    output = trainer.predict(trainer.eval_dataset)
    rows = zip(trainer.eval_dataset.table, output.predictions, strict=True)
    assert [row["id"] for row, text in rows if text is None] == ["3"]
    assert output.metrics["test_utterances"] == 7


def test_too_many_undecodable_files_stop_the_run(broken, tmp_path):
    trainer = make_trainer(broken, tmp_path / "run", per_device_train_batch_size=8)
    for act in (trainer.train, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(UserError, match="1 of 8 .*broken.wav.*--max_skipped_fraction"):
            act()


def test_an_undecodable_segment_is_one_utterance_of_its_recording(table, tmp_path):
    samples, rate = soundfile.read(table[0]["audio"])
    rows = [row | {"audio": table[0]["audio"], "start": 0.0, "num_samples": len(samples)} for row in table.to_list()]
    rows[3]["num_samples"] += 2 * rate  # it ends long after the recording
    trainer = make_trainer(Dataset.from_list(rows), tmp_path / "run", max_skipped_fraction=0.2)
    assert trainer.predict(trainer.eval_dataset).metrics["test_utterances"] == 7


# Updates of an epoch: 4. A run is cut in the middle of the first epoch and of the second, and at an epoch's end.
@pytest.mark.parametrize("by_seconds, interrupted_at", [(False, 2), (False, 5), (True, 3), (True, 4)])
def test_a_resumed_run_ends_with_the_same_weights(table, tmp_path, by_seconds, interrupted_at):
    random = dict(mask_time_prob=0.3, mask_time_length=4, layerdrop=0.3, activation_dropout=0.1)
    flags = dict(max_steps=7, eval_steps=1, save_steps=1, save_total_limit=9, load_best_model_at_end=False)
    if by_seconds:
        flags |= dict(batch_seconds=sum(table["num_samples"]) / 16_000 / 4, micro_batch_seconds=1.5)
    whole, again = (make_trainer(table, tmp_path / name, random, **flags) for name in ("run", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{interrupted_at}"))
    assert_equal(again, weights(whole))
    logged = [[(e["epoch"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (whole, again)]
    assert logged[0] == logged[1] and [epoch for epoch, _ in logged[0]] == pytest.approx(np.arange(1, 8) / 4)
    assert len((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()) == 14


CHANGES = {
    "utterances 7 (was 8), ": lambda rows: rows[:7],
    "other utterances, another order": lambda rows: rows[::-1],
    "other lengths: ": lambda rows: [row | {"num_samples": row["num_samples"] - 1} for row in rows],
    "other starts or channels: ": lambda rows: [row | {"start": 1e-3} for row in rows],
    "other transcripts or labels: ": lambda rows: [row | {"text": "C"} for row in rows],
}


def test_other_data_are_refused_unless_accepted(table, tmp_path, capsys):
    flags = dict(max_steps=2, eval_steps=1, save_steps=1, load_best_model_at_end=False)
    make_trainer(table, tmp_path / "run", **flags).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    for said, change in CHANGES.items():
        other = Dataset.from_list(change(table.to_list()))
        with pytest.raises(UserError, match=f"^the batches would differ .*{re.escape(said)}.*--accept_changed_batches"):
            make_trainer(other, tmp_path / "again", **flags).train(resume_from_checkpoint=checkpoint)
    for said, more in (
        ("seed 1 (was 42)", dict(seed=1)),
        ("batch_utterances 4 (was 2)", dict(gradient_accumulation_steps=2)),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            make_trainer(table, tmp_path / "again", **flags, **more).train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(table, tmp_path / "again", **flags)
    trainer.eval_dataset = make_trainer(table.select(range(3)), tmp_path / "again", **flags).eval_dataset
    with pytest.raises(UserError, match=r"validation_ids_sha256 \w+ \(was"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(other, tmp_path / "again", **flags, accept_changed_batches=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert (
        trainer.state.global_step == 2
        and "resuming: other batches from here on, as accepted: other" in capsys.readouterr().out
    )
