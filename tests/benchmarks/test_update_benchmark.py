"""benchmarks/update.py and gpu_session.py: what they count, what they say, and that every step's command line is one."""

import importlib
import json
import subprocess
import sys

import gpu_session
import pytest
import torch
import update
from common import ROOT
from conftest import tiny_config
from contenders import LEVERS
from flops import forward_flops, model_flops
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


def test_a_run_says_how_both_sides_fared():
    flags = "--device cpu --config_name small --batch_seconds 6 --micro_batch_seconds 4 --crop_seconds 3 --pairs 1"
    command = [sys.executable, "benchmarks/update.py", *flags.split(), "--lengths", "librispeech", "--profile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (result,) = found["results"]
    ours, stock = (result[side]["audio_seconds_per_cpu_second"]["median"] for side in ("ours", "stock"))
    assert found["ratio_padded"] == result["ratio"]["median"] == pytest.approx(ours / stock)
    assert found["ratio_equal_lengths"] is None and found["mfu"] is None
    assert found["memory_ratio"] == pytest.approx(result["ours"]["peak_gb"] / result["stock"]["peak_gb"])
    assert found["audio_seconds_per_second"] == result["ours"]["audio_seconds_per_second"]["median"]
    assert {"cpu", "versions", "command", "date"} <= found.keys()
    assert {side: set(table) for side, table in found["stages"].items()} == {"ours": STAGES, "stock": STAGES}


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
