"""benchmarks/update.py: what it counts and says."""

import importlib
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import update
from common import ROOT
from conftest import make_batch, tiny_config
from contenders import LEVERS, group_by_length
from flops import executed_flops, forward_flops, model_flops
from stock_loop import Stock, StockTuned
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2ForPreTraining

from w2v2.model.loading import make_model
from w2v2.model.pretraining import PretrainingModel

FLAGS = "--device cpu --config_name small --batch_seconds 6 --micro_batch_seconds 4 --crop_seconds 3"
STAGES = {"convs", "projection", "positional", "layers", "head", "whole", "optimizer"}


@pytest.mark.parametrize("num_samples", [16_400, 40_000])
def test_operations_are_those_that_torch_counts(num_samples):
    """Without the head: the stock one computes for all frames."""
    config = tiny_config(num_conv_pos_embeddings=16)
    model = Wav2Vec2ForPreTraining._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.wav2vec2(torch.zeros(1, num_samples))
    counted = forward_flops(config, num_samples)
    frames = int(model._get_feat_extract_output_lengths(num_samples))
    one_more = counted["positional"] / frames  # the stock convolution computes a frame that it throws away
    assert sum(counted.values()) - counted["head"] + one_more == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert model_flops(config, [num_samples] * 2) == pytest.approx(6 * sum(counted.values()))


@pytest.mark.parametrize("large", [False, True], ids=["BASE", "LARGE"])
def test_executed_operations_are_those_that_torch_counts_in_the_transformer(large):
    config = tiny_config(large, attention_dropout=0.1)  # without dropout torch's counter misses attention
    model, batch = make_model(PretrainingModel, config).train(), make_batch(config, [80_000])
    features = model._features(batch).detach()
    with FlopCounterMode(display=False) as counter:
        model._context(features, batch)
    stages = forward_flops(config, 80_000, masked=len(batch.masked) / batch.rows.lengths[0])
    executed = sum(stages[name] for name in ("projection", "positional", "linear", "attention"))
    assert counter.get_total_flops() == pytest.approx(executed, rel=0.005)  # a gap's frame, and the stock convolution's


def test_layerdrop_saves_operations_on_a_cpu_alone():
    """The last layer is computed for every utterance there, too."""
    kept, dropping = tiny_config(layerdrop=0.0), tiny_config(layerdrop=0.5)
    assert executed_flops(dropping, [40_000], on_gpu=True) == executed_flops(kept, [40_000], on_gpu=True)
    saved = executed_flops(kept, [40_000], on_gpu=False) - executed_flops(dropping, [40_000], on_gpu=False)
    one, two = (forward_flops(tiny_config(layerdrop=0.0, num_hidden_layers=n), 40_000) for n in (1, 2))
    assert saved == pytest.approx(3 * 0.5 * (sum(two.values()) - sum(one.values())))


def test_a_run_says_how_both_sides_fared():
    sides = ["ours:bf16:2", "stock"]
    command = [
        sys.executable,
        "benchmarks/update.py",
        *FLAGS.split(),
        "--pairs",
        "1",
        "--lengths",
        "librispeech",
        "--profile",
    ]
    done = subprocess.run([*command, "--contenders", *sides], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (result,) = found["results"]
    assert list(result["sides"]) == list(found["stages"]) == sides
    ours, stock = result["sides"].values()
    rates = [side["audio_seconds_per_cpu_second"]["median"] for side in (ours, stock)]
    assert stock["ratio"]["median"] == pytest.approx(rates[0] / rates[1])
    assert stock["memory_ratio"] == pytest.approx(ours["peak_gb"] / stock["peak_gb"])
    assert ours["mfu"] is None and "ratio" not in ours
    assert {"cpu", "versions", "command", "date"} <= found.keys()
    assert all(set(table) == STAGES and min(table.values()) > 0 for table in found["stages"].values())


def test_the_tuned_loop_hears_what_the_stock_one_hears():
    flags = update.parse([*FLAGS.split(), "--tuned_micro_batch_seconds", "6"])
    flags.precision = "fp32"
    loops = [kind(update.program_flags(flags), flags) for kind in (Stock, StockTuned)]
    stock, tuned = (loop.timed_update("librispeech", 0) for loop in loops)
    assert sorted(stock["heard"]) == sorted(tuned["heard"])
    assert len(loops[1].batches) < len(loops[0].batches)
    assert loops[1].inputs(loops[1].batches[0]).keys() == loops[0].inputs(loops[0].batches[0]).keys()


@pytest.mark.parametrize(
    "sides, complaint",
    [
        ("ours stok", "stok: NAME"), ("ours:fp64", "fp64: NAME"), ("stock:2", "only ours and without run in several"),
        ("ours without", "--without LEVER"), ("speechbrain", "pip install speechbrain"),
    ],
)  # fmt: skip
def test_a_side_that_does_not_exist_is_refused(sides, complaint, capsys, monkeypatch):
    monkeypatch.setattr(update, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        update.parse(["--contenders", *sides.split()])
    assert complaint in capsys.readouterr().err


def test_batches_of_like_lengths_hold_every_utterance_and_fit():
    samples = np.random.default_rng(0).integers(16_000, 300_000, 200)
    groups = group_by_length(samples, 60.0)
    assert sorted(np.concatenate(groups)) == sorted(samples)
    assert all(len(group) * group[0] <= 60 * 16_000 and group[0] == group.max() for group in groups)
    assert all((len(a) + 1) * a[0] > 60 * 16_000 and a[-1] >= b[0] for a, b in itertools.pairwise(groups))


def test_every_lever_is_there_to_be_taken_away():
    assert all(hasattr(importlib.import_module(module), name) for module, name, _ in LEVERS.values())
