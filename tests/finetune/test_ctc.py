"""Batching by seconds: one gradient however it is cut; scoring that no batch size moves; blanks that are noticed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from ranks import run_ranks
from two_ranks_ctc import ARPA, CASES, VOCABULARY, make_trainer, one_update, transcribe, write_speech

from w2v2.finetune.beam_search import BeamDecoder, Setting
from w2v2.finetune.ctc import build_recogniser, read_head
from w2v2.finetune.text import CTCArguments


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    table = write_speech(folder)
    table.save_to_disk(folder / "table")
    (folder / "lm.arpa").write_text(ARPA)
    return table


def assert_same(found, expected, tolerance):
    assert found[1] == pytest.approx(expected[1], rel=tolerance)
    assert found[0].keys() == expected[0].keys() and len(expected[0]) > 0
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=tolerance, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", ["mean", "sum"])
def test_micro_batches_do_not_change_the_gradient(table, tmp_path, case):
    results = [
        one_update(table, tmp_path / str(micro), case, batch_seconds=1_000.0, micro_batch_seconds=micro)
        for micro in (1_000.0, 4.0, 1.2)
    ]
    assert results[0][1]["grad_norm"] > 0
    for result in results[1:]:
        assert_same(result, results[0], 1e-4)


def test_the_loss_is_the_mean_over_the_effective_batch(table, tmp_path):
    """The plain alternative, all in one batch, is the reference."""
    plain = one_update(table, tmp_path / "plain", per_device_train_batch_size=len(table))
    assert_same(one_update(table, tmp_path / "s", batch_seconds=1_000.0, micro_batch_seconds=3.0), plain, 1e-4)


@pytest.fixture(scope="module")
def two_ranks(table, tmp_path_factory):
    """What two gloo processes found, in one launch for all the cases."""
    folder = Path(table["audio"][0]).parent
    script = Path(__file__).parents[1] / "two_ranks_ctc.py"
    run_ranks(folder, script, folder, folder / "found.pt", ACCELERATE_USE_CPU="true")
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradient_of_one(table, tmp_path, two_ranks, case):
    expected = one_update(table, tmp_path, case, batch_seconds=1_000.0, micro_batch_seconds=1_000.0)
    assert set(expected[0]) == ({"lm_head.weight", "lm_head.bias"} if case == "frozen" else set(two_ranks[case][0]))
    found = {name: two_ranks[case][0][name] for name in expected[0]}
    assert_same((found, two_ranks[case][1]), expected, 1e-4)


def test_two_processes_write_what_one_writes(table, tmp_path, two_ranks):
    """Eight utterances in batches of three: neither batches nor ranks come out even."""
    texts, beams = transcribe(table, tmp_path, str(Path(table["audio"][0]).with_name("lm.arpa")))
    assert two_ranks["texts"] == (texts, beams)
    assert any(texts) and len(texts) == len(table) and beams[0] != beams[1]


def test_processes_that_read_other_utterances_are_told(two_ranks):
    assert two_ranks["unequal"].startswith("the processes of this run read different utterances")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_beam_search_does_not_move_with_the_batch_size(table, tmp_path, reduction):
    (tmp_path / "lm.arpa").write_text(ARPA)
    found, losses = [], []
    for batch in (1, 3, 8):
        changes = dict(ctc_loss_reduction=reduction)
        trainer = make_trainer(table, tmp_path / str(batch), changes, per_device_eval_batch_size=batch)
        trainer.decoder = BeamDecoder(str(tmp_path / "lm.arpa"), VOCABULARY, [Setting(0.1, 3.0), Setting(1.0, 0.0)])
        output = trainer.predict(trainer.eval_dataset)
        found.append((output.predictions, trainer.beam_texts, output.metrics["test_wer"]))
        losses.append(output.metrics["test_loss"])
        assert trainer.model.config.ctc_loss_reduction == reduction
    assert any(found[0][1][0]) and found[0][1][0] != found[0][1][1] and found == found[:1] * 3
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_a_head_of_another_size_is_new_and_said(tmp_path, capsys):
    (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
    args = SimpleNamespace(model_name_or_path=str(tmp_path), print_once=print)
    for size, found in ((len(VOCABULARY), VOCABULARY), (99, None)):
        assert read_head(tiny_config(vocab_size=size, architectures=["Wav2Vec2ForCTC"]), args) == found
    assert capsys.readouterr().out.strip().endswith(f"has 99 outputs, and vocab.json {len(VOCABULARY)} entries")


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_a_new_head_begins_with_the_blank_that_is_asked_for(tmp_path, probability):
    text_args = CTCArguments(initial_blank_probability=probability)

    def build(source, **changes):
        model = build_recogniser(tiny_config(), VOCABULARY, source, text_args, **changes)
        return model, model.lm_head(torch.zeros(model.config.hidden_size)).softmax(-1)

    model, found = build(None)
    assert float(found.detach()[VOCABULARY["<pad>"]]) == pytest.approx(probability or 1 / len(VOCABULARY))
    model.lm_head.bias.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(build(tmp_path)[1], found)
    assert build(tmp_path, is_new=False)[0].lm_head.bias.unique().tolist() == [0.5]


@pytest.mark.parametrize("is_blank", [True, False])
def test_nothing_but_blanks_is_warned_of_after_a_while(table, tmp_path, capsys, is_blank):
    trainer = make_trainer(table, tmp_path, max_steps=4, eval_steps=1, save_steps=1, learning_rate=1e-9)
    trainer.blank_warning_steps = 2
    if is_blank:
        with torch.no_grad():
            trainer.model.lm_head.weight.zero_()
            trainer.model.lm_head.bias.copy_(3.0 * (torch.arange(len(VOCABULARY)) == 0))
    trainer.train()
    warned = [warning.split(":")[0] for warning in trainer.warnings]
    assert warned == (["update 2", "update 3", "update 4"] if is_blank else [])
    assert capsys.readouterr().out.count("warning: update") == len(warned)
