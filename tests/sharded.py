"""FSDP2 on two CPU processes, for `test_sharding.py`. Accelerate shards on accelerators alone, so its state is told
otherwise here.

RANK=0 WORLD_SIZE=2 … python tests/sharded.py gradients OUT.pt
RANK=0 WORLD_SIZE=2 … python tests/sharded.py updates FOLDER
RANK=0 WORLD_SIZE=2 … python tests/sharded.py pretrain [CONFIG.yaml] --flag value …
"""

import itertools
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import REPOSITORY
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import Wav2Vec2FeatureExtractor
from two_ranks import DEALS, NOISY, build_model, dealt, full, gradient, settings

from w2v2.model.pretraining import PretrainingModel
from w2v2.train import launch
from w2v2.train.checkpoint import load_optimizer, save_checkpoint
from w2v2.train.launch import leave_group
from w2v2.train.update import build_optimizer, train_update

RECIPE = SimpleNamespace(decay_norms_and_biases=False, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.98,
                         adam_epsilon=1e-6, learning_rate=0.01)  # fmt: skip
FLAGS = SimpleNamespace(gradient_compression="none", micro_batch_seconds=10.0)
UPDATES, DEAL = 2, "4/1"


def told(accelerator: Accelerator, sharded: bool) -> None:
    """The same processes as FSDP2 or, again, as DDP on a CPU."""
    kind = DistributedType.FSDP if sharded else DistributedType.MULTI_CPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if sharded else None
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"], state["fsdp_plugin"] = kind, plugin
    if sharded:
        launch.configure_fsdp(accelerator, FLAGS)


def gradients(accelerator: Accelerator, out: str) -> None:
    """Of one effective batch, under both, however it is dealt: compared on the way, and with recomputed activations."""
    found, cases = {}, [*itertools.product(DEALS, (True, False), (False,)), ("4/1", True, True)]
    for deal, shared, recomputed in cases:
        for sharded in (False, True):
            told(accelerator, sharded)
            model = build_model(**NOISY)
            model.recomputed = frozenset(["encoder", "convs"] if recomputed else [])
            model, _ = launch.prepare_model(accelerator, model, build_optimizer(model, RECIPE))
            bare = accelerator.unwrap_model(model)
            assert any(isinstance(p, DTensor) for p in bare.parameters()) == sharded
            mine = dealt(bare.config, deal, accelerator.process_index)
            values, totals = gradient(accelerator, model, mine, settings(shared_diversity=shared))
            found[deal, shared, recomputed, sharded] = values, totals.metrics()
    if accelerator.is_main_process:
        torch.save(found, out)


def updates(accelerator: Accelerator, folder: str) -> None:
    """Two updates under FSDP, a checkpoint, and a third one: straight on, and resumed under FSDP and under DDP."""
    told(accelerator, sharded=True)
    model = build_model(**NOISY)
    model, optimizer = launch.prepare_model(accelerator, model, build_optimizer(model, RECIPE))
    for step in range(UPDATES):
        update_once(accelerator, model, optimizer, step)
    run = SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer)
    run.feature_extractor = Wav2Vec2FeatureExtractor()
    run.state = SimpleNamespace(step=UPDATES, as_dict=lambda: {"step": UPDATES})
    saved = save_checkpoint(folder, run, keep=0)
    found = {"straight on": update_once(accelerator, model, optimizer, UPDATES)}
    for sharded in (True, False):
        told(accelerator, sharded)
        model = loaded(saved)
        model, optimizer = launch.prepare_model(accelerator, model, build_optimizer(model, RECIPE))
        load_optimizer(saved, accelerator, model, optimizer)
        found["FSDP" if sharded else "DDP"] = update_once(accelerator, model, optimizer, UPDATES)
    if accelerator.is_main_process:
        torch.save(found, Path(folder) / "found.pt")


def loaded(saved: Path) -> PretrainingModel:
    """The checkpoint's weights, every digit of them."""
    model = build_model(**NOISY)
    model.load_state_dict(load_file(saved / "model.safetensors"))
    return model


def update_once(accelerator: Accelerator, model, optimizer, step: int) -> dict:
    """The weights after one more update, clipped, and its gradient's norm."""
    bare = accelerator.unwrap_model(model)
    batches = dealt(bare.config, DEAL, accelerator.process_index)
    update = settings(step=step, learning_rate=0.01, max_grad_norm=0.5)
    metrics, _ = train_update(accelerator, model, optimizer, batches, update)
    return {name: full(p) for name, p in bare.named_parameters()} | {"grad_norm": metrics["grad_norm"]}


def pretrain_sharded() -> None:
    """The whole program, its checks included, but for the one that there is an accelerator."""

    def sharded_accelerator(**arguments) -> Accelerator:
        accelerator = Accelerator(**arguments)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"], state["fsdp_plugin"] = DistributedType.FSDP, plugin
        return accelerator

    launch.Accelerator = sharded_accelerator
    runpy.run_path(str(REPOSITORY / "pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "pretrain":
        sys.argv = ["pretrain.py", *rest]
        pretrain_sharded()
    else:
        {"gradients": gradients, "updates": updates}[what](Accelerator(cpu=True), *rest)
        leave_group()
        torch.distributed.destroy_process_group()
