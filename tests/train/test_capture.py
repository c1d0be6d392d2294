"""One graph for all micro-batches: what is recorded of one gives the gradients of others, and reads nothing on the host."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import recorded_graph
import torch
from accelerate import Accelerator
from conftest import NO_DROPOUT, assert_same_run, make_batch, run_here, tiny_config, write_recipe
from parity import assert_same_gradients, gradients, pair

import pretrain
from w2v2.data.batching import PieceSize
from w2v2.data.collate import FULL_SCALE
from w2v2.data.filling import Sizes, fill_up, find_sizes
from w2v2.errors import UserError
from w2v2.model import transformer
from w2v2.train import capture
from w2v2.train.log import read_metrics
from w2v2.train.schedule import UpdateSettings
from w2v2.train.update import accumulate, build_optimizer, seed_noise

SIZES = Sizes(slots=288, utterances=7, masked=160, most_masked=64, longest=96)
UPDATES = [  # lengths of the utterances of each micro-batch
    [[24_000, 16_400, 9_999, 5_440], [30_000, 8_000]],
    [[16_400] * 4, [5_440, 12_000, 20_000, 5_440, 8_080], [9_000]],
]


def settings(step):
    return UpdateSettings(
        step=step, seed=0, learning_rate=1e-3, gumbel_temperature=2.0 - step, diversity_weight=0.1 + step,
        shared_diversity=False, max_grad_norm=0.0,
    )  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The paths of a GPU in 16 bits, whose attention knows of utterances by their bounds alone."""

    def flash(query, key, value, bounds_q, bounds_k, longest_q, longest_k, dropout, *_):
        for bounds, longest, x in ((bounds_q, longest_q, query), (bounds_k, longest_k, key)):
            assert bounds.shape == bounds_q.shape and longest <= len(x)
        own = [
            torch.searchsorted(b[1:], torch.arange(len(x)).int(), right=True)
            for b, x in ((bounds_q, query), (bounds_k, key))
        ]
        mask = own[0][:, None] == own[1]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return [out.transpose(0, 1)]

    monkeypatch.setattr(transformer, "_FLASH", flash)
    monkeypatch.setattr(transformer, "takes_any_lengths", lambda x: True)
    monkeypatch.setattr(capture, "takes_any_lengths", lambda x: True)
    monkeypatch.setattr("w2v2.model.pretraining.skips_rows", lambda x: False)
    # Counts on a CPU look at the values, on a GPU they do not.
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda i, n: torch.zeros(*i.shape, n).scatter_(-1, i[..., None], 1)
    )


def batches_of(config, update, sizes=None, dtype=torch.float32):
    lengths = UPDATES[update]
    found = [make_batch(config, own, first=10 * i, epoch=update, piece=i, dtype=dtype) for i, own in enumerate(lengths)]
    total = sum(map(sum, lengths))
    found = [replace(b, plan=b.plan._replace(num_rounds=len(lengths), batch_samples=total)) for b in found]
    return [fill_up(b, sizes) if sizes else b for b in found]


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_filling_up_changes_neither_loss_nor_gradient(request, large, on_gpu):
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    config = tiny_config(large, layerdrop=0.4, num_hidden_layers=4)
    model, _ = pair(config, torch.float64, feature_penalty_weight=10.0)
    model.positional_in_blocks = on_gpu
    for batch in batches_of(config, 0, dtype=torch.float64) + batches_of(config, 1, dtype=torch.float64):
        found = []
        for own in (batch, fill_up(batch, SIZES)):
            model.zero_grad()
            torch.manual_seed(0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("w2v2.model.objective.gumbel_noise", torch.zeros_like)
                sums = model(own, 1.3)
            sums.loss.backward()
            found.append((gradients(model), sums))
        assert_same_gradients(found[1][0], found[0][0], rtol=1e-9)
        for a, b in zip(found[1][1], found[0][1], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_replays_are_the_passes_themselves(monkeypatch, as_on_a_gpu, large):
    """Dropout, layerdrop, noise, schedules, lengths and numbers of utterances: all of it varies from replay to replay."""
    recorded = []
    monkeypatch.setattr(capture, "record", lambda step: recorded.append(recorded_graph.record(step)) or recorded[-1])
    config = tiny_config(large, **dict.fromkeys(NO_DROPOUT, 0.1))
    accelerator = Accelerator(cpu=True)
    model, _ = pair(config, feature_penalty_weight=10.0, positional_in_blocks=True)
    captured, found = capture.CapturedStep(accelerator, model), {"captured": [], "eager": []}
    for update in (0, 1):
        for name, step in (("captured", captured), ("eager", model)):
            model.zero_grad()
            totals, _ = accumulate(accelerator, step, batches_of(config, update, SIZES), settings(update))
            found[name].append((gradients(model), totals.sums))
    assert len(recorded) == 1 and captured.num_eager == 0
    for ours, theirs in zip(found["captured"], found["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    print(f"one graph of {recorded[0][0].launches} launches")


def test_what_does_not_fit_runs_without_the_graph(monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(capture, "record", recorded_graph.record)
    config, accelerator = tiny_config(), Accelerator(cpu=True)
    model, _ = pair(config, positional_in_blocks=True)
    fits, large, dummy = (
        make_batch(config, own, weight=w) for own, w in (([9_000], 1.0), ([90_000], 1.0), ([9_000], 0.0))
    )
    assert SIZES.hold(fits) and not SIZES.hold(large)
    step = capture.CapturedStep(accelerator, model)
    batches = [fill_up(fits, SIZES), large, fill_up(dummy, SIZES)]
    plan = fits.plan._replace(num_rounds=3)
    totals, _ = accumulate(accelerator, step, [replace(b, plan=plan) for b in batches], settings(0))
    found = gradients(model)
    model.zero_grad()
    expected, _ = accumulate(accelerator, model, [replace(b, plan=plan) for b in (fits, large, dummy)], settings(0))
    assert step.num_eager == 1 and totals.counts.heard_samples == expected.counts.heard_samples
    assert totals.sums.num_masked == expected.sums.num_masked and found.keys() == gradients(model).keys()


def test_sixteen_bits_and_floats_share_a_graph(monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(capture, "record", recorded_graph.record)
    config, accelerator, found = tiny_config(), Accelerator(cpu=True), []
    model, _ = pair(config, positional_in_blocks=True)
    batch = fill_up(make_batch(config, [9_000, 16_400]), SIZES)
    pcm = replace(batch, samples=(batch.samples * 8_000).to(torch.int16))
    floats = replace(batch, samples=pcm.samples.float() / FULL_SCALE)
    step = capture.CapturedStep(accelerator, model)
    for own in (floats, pcm):
        step.begin()
        seed_noise(0, 0, 0, torch.device("cpu"))
        found.append((step(own, settings(0), 1.0), gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_sizes_hold_the_micro_batches_they_were_found_from():
    config, rng = tiny_config(), np.random.default_rng(0)
    for _ in range(20):
        batches = [make_batch(config, rng.integers(5_000, 40_000, rng.integers(1, 9)).tolist()) for _ in range(4)]
        slots, rows = max(len(batch.rows.row) for batch in batches), max(len(batch.rows.lengths) for batch in batches)
        sizes = find_sizes(batches, PieceSize(slots, rows))
        assert all(sizes.hold(batch) for batch in batches)
        assert not all(sizes._replace(slots=slots).hold(batch) for batch in batches)  # one slot is nobody's


def test_gradients_stay_where_the_graph_adds_to_them(monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(capture, "record", recorded_graph.record)
    config, accelerator = tiny_config(), Accelerator(cpu=True)
    model, _ = pair(config, positional_in_blocks=True)
    step = capture.CapturedStep(accelerator, model)

    class Flags:
        learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon = 1e-3, 0.0, 0.9, 0.98, 1e-6
        decay_norms_and_biases = True

    optimizer, places = build_optimizer(model, Flags), []
    for _ in range(3):
        accumulate(accelerator, step, batches_of(config, 0, SIZES), settings(0))
        places.append([p.grad.data_ptr() for p in model.parameters()])
        assert all(p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert places[0] == places[1] == places[2]


def test_a_run_with_a_graph_is_the_run_without_and_resumes(monkeypatch, as_on_a_gpu, tmp_path):
    """From the flags on. What is drawn for places that are filled up comes after the others, so noise is the same too."""
    monkeypatch.setattr(capture, "record", recorded_graph.record)
    monkeypatch.setattr("pretrain.check_capture", lambda *_: None)
    small = dict(batch_hours=0.004, micro_batch_seconds=6.0, max_steps=6, save_steps=3, eval_steps=3, use_cpu=True)
    quiet = dict(dataloader_num_workers=0, collapse_action="none", report_to=["none"], positional_conv="blocks")
    flags = write_recipe(tmp_path, NO_DROPOUT, **small, **quiet)
    for name, more in (("plain", []), ("whole", ["--cuda_graph"]), ("again", ["--cuda_graph"])):
        assert run_here(pretrain.main, flags, "--output_dir", tmp_path / name, *more) == 0
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    assert (
        run_here(
            pretrain.main, flags, "--output_dir", tmp_path / "again", "--cuda_graph", "--resume_from_checkpoint", "auto"
        )
        == 0
    )
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    plain, whole = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "whole"))
    assert [r["step"] for r in whole if "loss" in r] == list(range(1, 7))
    for one, other in zip(plain, whole, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & set(one):
            assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


def test_what_a_graph_cannot_hold_is_refused():
    class Accelerated:
        device, mixed_precision, distributed_type = torch.device("cuda"), "bf16", None

    flags = dict(gradient_checkpointing=False, torch_compile=False, diversity_scope="micro_batch")
    flags |= dict(positional_conv="auto", gradient_compression="none")
    capture.check_capture(SimpleNamespace(**flags), Accelerated)
    others = dict(gradient_checkpointing=True, torch_compile=True, diversity_scope="effective_batch")
    for name, value in (others | dict(positional_conv="stock", gradient_compression="bf16")).items():
        with pytest.raises(UserError, match=f"--cuda_graph and --{name}"):
            capture.check_capture(SimpleNamespace(**flags | {name: value}), Accelerated)
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        capture.check_capture(SimpleNamespace(**flags), Accelerator(cpu=True))
    with pytest.raises(UserError, match="flash"):
        capture.CapturedStep(Accelerator(cpu=True), pair(tiny_config())[0])
