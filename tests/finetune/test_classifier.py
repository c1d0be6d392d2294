"""The classifier and its trainer: padding unseen, accumulation without influence, a frozen encoder that stays frozen."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining, Wav2Vec2ForSequenceClassification
from two_ranks_ctc import QUIET, write_speech

from w2v2.finetune import labels
from w2v2.finetune.classifier import (
    ClassificationArguments,
    ClassificationTrainer,
    build_classifier,
    folder_labels,
)
from w2v2.finetune.ctc_data import longest_first

CLASSES = ["a", "b", "c"]
LENGTHS = (16_000, 9_123, 4_000, 700)
SMALL = dict(mask_time_prob=0.0, mask_feature_prob=0.0, classifier_proj_size=16)


def start_from(source=None):
    """The flags that a model is built by, and the lines that were said."""
    said = []
    return SimpleNamespace(model_name_or_path=source, freeze_feature_encoder=True, print_once=said.append, said=said)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("audio")).add_column("target", list("abcabbab"))


def make_trainer(table, output_dir, *, model_changes=None, weights=None, freeze_encoder=False, **flags):
    """A trainer without anything random but the order of utterances, unless `model_changes` says so."""
    args = ClassificationArguments(output_dir=str(output_dir), **(QUIET | flags))
    output_dir.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    config = tiny_config(**(SMALL | dict(use_weighted_layer_sum=freeze_encoder) | (model_changes or {})))
    model = build_classifier(config, CLASSES, start_from())
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    shared = dict(min_samples=400, skip_log=output_dir / "skipped_audio.jsonl")
    train = labels.LabelledDataset(table, CLASSES, extractor, substitute=True, crop_seconds=args.crop_seconds, **shared)
    held = labels.LabelledDataset(longest_first(table), CLASSES, extractor, substitute=False, **shared)
    return ClassificationTrainer(
        model, args, data_collator=labels.collate_labelled, train_dataset=train, eval_dataset=held,
        processing_class=extractor, class_weights=weights,
    )  # fmt: skip


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def items(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_values": torch.randn(n, generator=generator).numpy(), "labels": [i % 3]} for i, n in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_padded_batch_gives_what_the_stock_model_gives(large, weighted):
    torch.manual_seed(0)
    config = tiny_config(large, **SMALL, use_weighted_layer_sum=weighted, num_labels=3)
    stock = Wav2Vec2ForSequenceClassification(config).eval()
    ours = build_classifier(copy.deepcopy(config), CLASSES, start_from()).eval()
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        together = ours(**labels.collate_labelled(items())).logits
        alone = torch.cat([stock(torch.tensor(item["input_values"])[None]).logits for item in items()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.4, 2.5, 1.1]])
def test_four_batches_of_one_equal_one_batch_of_four(table, tmp_path, weights):
    flags = dict(max_steps=1, eval_steps=1, save_steps=1, optim="sgd", warmup_steps=0.0, max_grad_norm=1e9)
    norms, changes = [], []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        flags |= dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        trainer = make_trainer(table.select(range(4)), tmp_path / str(batch), weights=weights, **flags)
        before = weights_of(trainer)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
        changes.append({name: value - before[name] for name, value in weights_of(trainer).items()})
    assert norms[0] > 0.01 and norms == pytest.approx([norms[0]] * 3, rel=1e-3)
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], rtol=1e-3, atol=1e-6)


def test_the_loss_is_the_stock_models_or_weighted_by_class(table, tmp_path):
    trainer = make_trainer(table, tmp_path)
    batch = labels.collate_labelled(items())
    trainer.model.eval()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch).loss)
    trainer = make_trainer(table, tmp_path, weights=[0.0, 1.0, 3.0])
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
    losses = -logits.log_softmax(-1)
    expected = (losses[1, 1] + 3 * losses[2, 2]) / 3
    torch.testing.assert_close(trainer._loss(logits, targets), expected)


def test_a_frozen_encoder_neither_learns_drops_nor_masks(table, tmp_path):
    noisy = dict(hidden_dropout=0.5, attention_dropout=0.5, layerdrop=0.5, mask_time_prob=0.5, mask_time_length=2)
    trainer = make_trainer(table, tmp_path, model_changes=noisy, freeze_encoder=True)
    before = weights_of(trainer)
    trainer.train()
    changed = {name for name, value in weights_of(trainer).items() if not torch.equal(value, before[name])}
    assert changed == {"layer_weights", "projector.weight", "projector.bias", "classifier.weight", "classifier.bias"}
    batch = labels.collate_labelled(items())
    losses = {trainer.compute_loss(trainer.model.train(), dict(batch)).item() for _ in range(4)}
    assert len(losses) == 1
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == changed


def test_a_head_is_new_unless_its_labels_are_the_same(tmp_path):
    config = tiny_config(**SMALL, use_weighted_layer_sum=True)
    Wav2Vec2ForPreTraining(config).save_pretrained(tmp_path / "pretrained")
    fresh = start_from(str(tmp_path / "pretrained"))
    model = build_classifier(copy.deepcopy(config), CLASSES, fresh)
    torch.testing.assert_close(model.layer_weights.data, torch.full((3,), 1 / 3))
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([5.0, 1.0, 2.0]))
    model.save_pretrained(tmp_path / "tuned")
    assert fresh.said == [] and folder_labels(str(tmp_path / "tuned")) == CLASSES
    assert folder_labels(str(tmp_path / "pretrained")) == []

    def go_on(labels, **changes):
        args = start_from(str(tmp_path / "tuned"))
        return build_classifier(
            tiny_config(**SMALL | dict(use_weighted_layer_sum=True) | changes), labels, args
        ), args.said

    again, (line,) = go_on(CLASSES)
    assert "head: kept" in line and "same 3 labels" in line
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    other, (line,) = go_on(["x", "y"])
    assert "head: new" in line and "other labels (a, b, c)" in line
    torch.testing.assert_close(other.layer_weights.data, torch.full((3,), 1 / 3))
    assert other.classifier.out_features == 2 and other.config.id2label == {0: "x", 1: "y"}
    for changes in (dict(classifier_proj_size=8), dict(use_weighted_layer_sum=False)):
        _, (line,) = go_on(CLASSES, **changes)
        assert f"head: new, as {tmp_path / 'tuned'} has another {next(iter(changes))}" in line


def test_a_resumed_run_ends_with_the_same_weights(table, tmp_path):
    random = dict(mask_time_prob=0.3, mask_time_length=4, layerdrop=0.3, activation_dropout=0.1)
    flags = dict(max_steps=7, eval_steps=1, save_steps=1, save_total_limit=9, load_best_model_at_end=False,
                 crop_seconds=0.4)  # fmt: skip
    whole, again = (make_trainer(table, tmp_path / name, model_changes=random, **flags) for name in ("run", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    torch.testing.assert_close(weights_of(again), weights_of(whole), rtol=0, atol=0)


def test_the_mode_decides_rate_masks_and_layer_sum(tmp_path):
    shared = dict(output_dir=str(tmp_path), train_data=["t"], validation_data=["v"], config_name="c", use_cpu=True)
    whole = ClassificationArguments(**shared)
    frozen = ClassificationArguments(**shared, mode="probe", layerdrop=0.3)
    assert (whole.learning_rate, frozen.learning_rate) == (3e-5, 1e-3)
    assert ClassificationArguments(**shared, mode="probe", learning_rate=0.5).learning_rate == 0.5
    changes = frozen.model_changes()
    noise = [name for name in changes if name.endswith(("_prob", "dropout", "layerdrop"))]
    assert len(noise) == 8 and not any(changes[name] for name in noise) and changes["use_weighted_layer_sum"]
    assert whole.model_changes()["mask_time_prob"] == 0.05 and not whole.model_changes()["use_weighted_layer_sum"]
    assert whole.greater_is_better
    assert not ClassificationArguments(**shared, metric_for_best_model="loss").greater_is_better
