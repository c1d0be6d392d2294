"""benchmarks/update.py and gpu_session.py: what they count and say, and that every step's command line is one."""

import importlib
import itertools
import json
import subprocess
import sys

import gpu_session
import numpy as np
import pytest
import torch
import update
from common import ROOT
from conftest import tiny_config
from contenders import LEVERS, group_by_length
from flops import MASKED, executed_flops, forward_flops, model_flops
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2ForPreTraining

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


def test_executed_operations_are_those_of_masked_frames_in_the_last_layer():
    config = tiny_config(num_hidden_layers=1, layerdrop=0.0)
    stages, D = forward_flops(config, 40_000), config.hidden_size
    frames = stages["projection"] / (2 * config.conv_dim[-1] * D)
    unmasked = (1 - MASKED) * frames  # they have a key and a value, but no query, output or feed-forward network
    saved = 2 * unmasked * (2 * D * D + 2 * D * config.intermediate_size) + 4 * unmasked * frames * D
    executed = 3 * (sum(stages.values()) - saved) - stages["first conv"]
    assert executed_flops(config, [40_000]) == pytest.approx(executed, rel=1e-9)


def test_a_run_says_how_all_sides_fared():
    flags = "--device cpu --config_name small --batch_seconds 6 --micro_batch_seconds 4 --crop_seconds 3 --pairs 1"
    sides = ["ours:bf16:2", "stock", "stock_tuned"]
    command = [sys.executable, "benchmarks/update.py", *flags.split(), "--lengths", "librispeech", "--profile"]
    done = subprocess.run([*command, "--contenders", *sides], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (result,) = found["results"]
    assert list(result["sides"]) == list(found["stages"]) == sides
    ours, *others = result["sides"].values()
    for other in others:
        rates = [side["audio_seconds_per_cpu_second"]["median"] for side in (ours, other)]
        assert other["ratio"]["median"] == pytest.approx(rates[0] / rates[1])
        assert other["memory_ratio"] == pytest.approx(ours["peak_gb"] / other["peak_gb"])
    assert ours["mfu"] is None and "ratio" not in ours
    assert {"cpu", "versions", "command", "date"} <= found.keys()
    assert all(set(table) == STAGES and min(table.values()) > 0 for table in found["stages"].values())


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


def test_update_understands_every_step_of_the_session():
    for step in (step for step in gpu_session.STEPS.values() if step.startswith("update.py")):
        for dry_run in (False, True):
            args = update.parse(gpu_session.command(step, dry_run)[2:])
            assert update.program_flags(args).torch_compile == ("compile" in step)
            assert not dry_run or (args.device, args.config_name) == ("cpu", "small")


def test_a_failing_step_is_reported_and_not_raised():
    text, went_well = gpu_session.run("update.py --no_such_flag", False, 60.0)
    assert "no_such_flag" in text and not went_well
