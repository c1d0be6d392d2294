"""FSDP2 gives DDP's numbers, and its checkpoints go on anywhere. Two processes with gloo; nothing here needs an
accelerator.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import assert_same_run, write_recipe
from ranks import Ranks, run_ranks
from safetensors.torch import load_file
from sharded import RECIPE, UPDATES, loaded
from test_update import assert_same_gradient, assert_same_metrics
from transformers import Wav2Vec2ForPreTraining
from two_ranks import DEALS, FIVE, NOISY, pieces, settings

from w2v2.errors import UserError
from w2v2.train import launch
from w2v2.train.checkpoint import load_optimizer
from w2v2.train.update import build_optimizer, train_update

CASES = [(deal, shared, False) for deal in DEALS for shared in (True, False)] + [("4/1", True, True)]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks(folder, "tests/sharded.py", "gradients", folder / "found.pt")
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sharded_gradients_and_totals_are_those_of_ddp(gradients, case):
    """With dropout, Gumbel noise and layerdrop, uneven deals with dummies, both scopes of the diversity loss, and
    recomputation.
    """
    (expected, totals), (found, sharded_totals) = (gradients[(*case, sharded)] for sharded in (False, True))
    assert_same_gradient(found, expected, 1e-11)
    assert_same_metrics(sharded_totals, totals, 1e-11)


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    run_ranks(folder, "tests/sharded.py", "updates", folder)
    return folder, torch.load(folder / "found.pt", weights_only=True)


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_a_sharded_checkpoint_is_the_stock_folder(updates):
    saved = updates[0] / f"checkpoint-{UPDATES}"
    model, report = Wav2Vec2ForPreTraining.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["Wav2Vec2ForPreTraining"]
    moments = load_file(saved / "training_state/optimizer.safetensors")
    expected = {f"{name}/{what}" for name, _ in model.named_parameters() for what in ("exp_avg", "exp_avg_sq", "step")}
    assert moments.keys() == expected
    for name, parameter in model.named_parameters():
        assert moments[f"{name}/exp_avg"].shape == parameter.shape and moments[f"{name}/step"] == UPDATES


@pytest.mark.parametrize("where", ["FSDP", "DDP", "one process"])
def test_a_sharded_checkpoint_goes_on_under_everything(updates, where):
    folder, found = updates
    expected = found["straight on"]
    assert expected["grad_norm"] > 0.5  # that is: the update was clipped
    if where == "one process":
        accelerator, saved = Accelerator(cpu=True), folder / f"checkpoint-{UPDATES}"
        model = loaded(saved)
        model, optimizer = launch.prepare_model(accelerator, model, build_optimizer(model, RECIPE))
        load_optimizer(saved, accelerator, model, optimizer)
        update = settings(step=UPDATES, learning_rate=0.01, max_grad_norm=0.5)
        metrics, _ = train_update(accelerator, model, optimizer, pieces(model.config, FIVE), update)
        found = {where: dict(model.named_parameters()) | {"grad_norm": metrics["grad_norm"]}}
    assert_same_weights(found[where], expected)


def test_a_whole_sharded_run_is_that_of_ddp(tmp_path):
    """Validation, saving and the model at the end included; the launch asks for layers wrapped one by one, which is not
    done.
    """
    values = dict(batch_hours=0.002, micro_batch_seconds=4, max_steps=3, warmup_steps=1, eval_steps=1, save_steps=2)
    values |= dict(max_grad_norm=1, diversity_scope="effective_batch", dataloader_num_workers=0, report_to=["none"])
    config = write_recipe(tmp_path, NOISY, **values)
    for name, script in (("fsdp", ["tests/sharded.py", "pretrain"]), ("ddp", ["pretrain.py"])):
        words = [*script, config, "--output_dir", tmp_path / name, "--use_cpu"]
        with Ranks(tmp_path / f"{name}_logs", *words) as ranks:
            assert ranks.statuses() == [0, 0], ranks.said(0) + ranks.said(1)
            assert ("not used: fsdp_auto_wrap_policy" in ranks.said(0)) == (name == "fsdp")
    assert_same_run(tmp_path / "fsdp", tmp_path / "ddp", exactly=False)


@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        (dict(fsdp_version=1), {}, "version 1"),
        (dict(fsdp_version=2, cpu_offload=True), {}, "fsdp_offload_params"),
        (dict(fsdp_version=2), dict(micro_batch_seconds=None), "micro_batch_seconds auto"),
        (dict(fsdp_version=2), dict(gradient_compression="bf16"), "gradient_compression"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings, flags, said):
    plugin = FullyShardedDataParallelPlugin(**settings)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16")
    args = SimpleNamespace(**(dict(gradient_compression="none", micro_batch_seconds=200.0) | flags))
    with pytest.raises(UserError, match=said):
        launch.configure_fsdp(accelerator, args)
