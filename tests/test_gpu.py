"""On a GPU: the CPU's loss and gradient, no waiting for the device within an update, the kernels that are meant, and
the scripts, end to end.
"""

import json
import math
import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import NO_DROPOUT, TIMINGS, make_batch, run_here, tiny_config, write_recipe
from parity import distance, fix_codes, gradients, pair, passes
from test_capture import SIZES, batches_of, settings
from test_finetune_ctc import command, write_manifest
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining

import finetune_ctc
import pretrain
from w2v2.data.rows import Rows
from w2v2.model.pretraining import PretrainingModel
from w2v2.model.transformer import after_attention, attend, takes_any_lengths
from w2v2.train.capture import CapturedStep
from w2v2.train.log import read_metrics
from w2v2.train.update import accumulate, seed_noise

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LENGTHS = [24_000, 16_400, 16_400, 9_000]
NOISY = dict.fromkeys(NO_DROPOUT, 0.1)


def fuse(model):
    pytest.importorskip("triton")
    from w2v2.model import fused

    fused.fuse(model)


def compile_layers(model):
    model._after_attention = torch.compile(after_attention, dynamic=True)


WAYS = {"eager": lambda model: None, "compiled": compile_layers, "fused": fuse}


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("in_blocks", [None, False], ids=["blocks", "stock"])
def test_loss_and_gradient_are_those_of_the_cpu(monkeypatch, large, in_blocks):
    fix_codes(monkeypatch)
    config = tiny_config(large, layerdrop=0.4)
    model, _ = pair(config, torch.float64, feature_penalty_weight=10.0)
    model.positional_in_blocks = in_blocks
    batch = make_batch(config, LENGTHS, dtype=torch.float64)
    (expected, reference), (found, gradient) = (passes(model, batch, d) for d in (torch.device("cpu"), DEVICE))
    assert found == pytest.approx(expected, rel=1e-8)  # seen: 2e-10, and 1e-8 of the gradient
    assert distance(gradient, reference) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("way", WAYS)
def test_training_in_16_bits_stays_close_to_float32(monkeypatch, large, dtype, way):
    fix_codes(monkeypatch)
    config = tiny_config(large, layerdrop=0.4)
    model, _ = pair(config, feature_penalty_weight=1.0)
    batch = make_batch(config, LENGTHS)
    expected, reference = passes(model, batch, torch.device("cpu"))
    WAYS[way](model)
    found, gradient = passes(model, batch, DEVICE, dtype)
    assert found == pytest.approx(expected, rel=2e-2)
    assert 0 < distance(gradient, reference) < 0.1


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("way", WAYS)
def test_neither_pass_waits_for_the_device(large, way):
    config = tiny_config(large, **NOISY | dict(layerdrop=0.6, num_hidden_layers=8))
    model = PretrainingModel(config).train().to(DEVICE)
    WAYS[way](model)
    waiting = make_batch(config, LENGTHS).pin_memory()

    def update():
        batch = waiting.to(DEVICE)
        seed_noise(0, 0, 0, DEVICE)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            sums = model(batch)
        (sums.loss * 0.5).backward()
        return sums

    update()  # libraries are loaded, memory is taken, graphs are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = update()
        with pytest.raises(RuntimeError):
            sums.loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_flash_kernel_attends_within_each_utterance():
    """Against the library's kernel, utterance by utterance, in float64: output and gradient, of all frames and of some."""
    lengths, gaps = [80, 96, 1, 96, 64], [1, 2, 1, 1, 2]
    rows = Rows.build(torch.tensor(lengths), torch.tensor(gaps)).map(lambda x: x.to(DEVICE))
    asked = Rows.build(torch.tensor([16, 30, 1, 0, 7]), torch.zeros(5, dtype=torch.int64)).map(lambda x: x.to(DEVICE))
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = (sum(lengths) + sum(gaps), 3, 12, 64), (sum(asked.lengths), 12, 64)
    qkv, some = (torch.randn(s, dtype=torch.bfloat16, device=DEVICE, generator=generator) for s in shapes)
    found = []
    for x, query in ((qkv, some), (qkv.cpu().double(), some.cpu().double())):
        x, query = x.clone().requires_grad_(), query.clone().requires_grad_()
        assert takes_any_lengths(x) == (x.device == qkv.device)
        whole = torch.cat(rows.split(attend(*x.unbind(1), rows, rows)))
        outputs = whole, attend(query, *x[:, 1:].unbind(1), asked, rows)
        sum(out.double().pow(2).sum() for out in outputs).backward()
        found.append([t.cpu().double() for t in (*outputs, x.grad, query.grad)])
    for ours, exact in zip(*found, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 2e-2


def test_attention_with_dropout_keeps_the_mean():
    rows = Rows.build(torch.tensor([64, 31]), torch.tensor([0, 1])).map(lambda x: x.to(DEVICE))
    qkv = torch.randn(96, 3, 4, 64, dtype=torch.bfloat16, device=DEVICE).unbind(1)
    draws = []
    for seed in (*range(200), 0):
        torch.manual_seed(seed)
        draws.append(attend(*qkv, rows, rows, dropout=0.3).double())
    assert torch.equal(draws[0], draws[-1]) and not torch.equal(draws[0], draws[1])
    mean, exact = torch.stack(draws[:-1]).mean(0), attend(*qkv, rows, rows).double()
    assert float((mean - exact).norm() / exact.norm()) < 0.15


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("way", ["eager", "fused"])
def test_replays_of_a_graph_are_the_passes_themselves(large, way):
    """With dropout, noise and layerdrop. The flash kernel and sums by index add in any order."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    accelerator, config = Accelerator(mixed_precision="bf16"), tiny_config(large, **NOISY)
    model = PretrainingModel(config).train()
    WAYS[way](model)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    captured = CapturedStep(accelerator, model)
    for update in (0, 1):
        found = []
        for step in (captured, model):
            model.zero_grad()
            totals, _ = accumulate(accelerator, step, batches_of(config, update, SIZES), settings(update))
            found.append((float(totals.sums.loss), gradients(model)))
        (loss, gradient), (expected, reference) = found
        assert loss == pytest.approx(expected, rel=1e-3) and distance(gradient, reference) < 1e-2
    assert captured.num_eager == 0


# -- the scripts


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    small = dict(batch_hours=0.004, micro_batch_seconds=6.0, max_steps=8, eval_steps=4)
    quiet = dict(dataloader_num_workers=2, collapse_action="none", report_to=["none"])
    return write_recipe(tmp_path_factory.mktemp("gpu"), NOISY, **small, **quiet)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_is_whole_and_goes_on_from_its_checkpoint(monkeypatch, flags, tmp_path, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert run_here(pretrain.main, flags, "--output_dir", tmp_path / "whole") == 0
    records = read_metrics(tmp_path / "whole/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    training = [r for r in records if "loss" in r]
    assert precision == "fp16" or all(math.isfinite(r["loss"] + r["grad_norm"]) for r in training)
    assert training[-1]["skipped_updates"] <= (4 if precision == "fp16" else 0)  # its loss scaler begins too high
    model = Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "whole")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())

    (tmp_path / "half").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "half/checkpoint-4")
    (tmp_path / "half/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records if r["step"] <= 4))
    assert run_here(pretrain.main, flags, "--output_dir", tmp_path / "half", "--resume_from_checkpoint", "auto") == 0
    resumed = read_metrics(tmp_path / "half/metrics.jsonl")
    assert [r["step"] for r in resumed] == [r["step"] for r in records]
    names = set().union(*records) - set(TIMINGS) - {"accuracy", "distractors_left", "codebook_perplexity_hard"}
    if precision == "fp16":  # one overflow more or less changes the course
        names = {"step", "masked_frames", "audio_hours", "learning_rate"}
    for ours, theirs in zip(resumed, records, strict=True):
        for name in names & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=1e-3), (name, ours["step"])


@pytest.mark.parametrize("kernels", [[], ["--fused_kernels"]], ids=["library", "kernels"])
def test_a_run_with_a_graph_goes_on_from_its_checkpoint(monkeypatch, flags, tmp_path, kernels):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = [flags, "--output_dir", tmp_path, "--cuda_graph", *kernels]
    assert run_here(pretrain.main, *run) == 0
    expected = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert run_here(pretrain.main, *run, "--resume_from_checkpoint", "auto") == 0
    found = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in found] == list(range(1, 9))
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "masked_frames"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2), (name, ours["step"])


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(flags, tmp_path):
    run = ["--output_dir", tmp_path / "run", "--resume_from_checkpoint", "auto"]
    assert run_here(pretrain.main, flags, *run) == 0
    expected = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    shutil.rmtree(tmp_path / "run/checkpoint-8")
    assert run_here(pretrain.main, flags, *run, "--use_cpu") == 0
    assert (tmp_path / "run/checkpoint-8").exists()
    found = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    for name in ("step", "masked_frames", "audio_hours", "learning_rate"):
        assert [r[name] for r in found] == [r[name] for r in expected]


def test_auto_finds_a_micro_batch(monkeypatch, flags, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run_here(pretrain.main, flags, "--output_dir", tmp_path, "--micro_batch_seconds", "auto") == 0
    assert "that is the device's share of an effective batch" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "pretrain_config.yaml").read_text())["micro_batch_seconds"] > 6


def test_memory_that_does_not_suffice_ends_a_run_with_one_line(flags, tmp_path, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48 * 2**20) / total)
    large = ["--output_dir", tmp_path, "--batch_hours", "0.4", "--micro_batch_seconds", "1000"]
    try:
        assert run_here(pretrain.main, flags, *large) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "--micro_batch_seconds" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fine_tuning_on_a_gpu(tmp_path, precision):
    write_manifest(tmp_path / "train.csv", ["One two.", "two", "three one", "two three", "one", ""], seed=0)
    write_manifest(tmp_path / "dev.csv", ["two one", "three"], seed=1)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(tmp_path / "pretrained")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "pretrained")
    finetune_ctc.main([word for word in command(tmp_path, f"--{precision}") if word != "--use_cpu"])
    model = Wav2Vec2ForCTC.from_pretrained(tmp_path / "run")
    assert all(p.isfinite().all() for p in model.parameters())
