"""What `update.py` times: an update of this program on an effective batch, cropped and packed as in training.

The samples are noise: no kernel's time depends on them. `stock_loop.py` has the other side, on the same utterances.
Shapes: N slots of latent frames, P masked frames, C conv channels, D width.
"""

import argparse
import importlib
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from common import speech_lengths

from w2v2.arguments import PretrainArguments
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import Crops, Cursor, EffectiveBatches, MicroBatchPlan, PieceSize, crop_length, plan_update
from w2v2.data.collate import Framing, PretrainBatch, build_batch
from w2v2.data.filling import fill_up, find_sizes
from w2v2.model import transformer
from w2v2.model.cpu import attend_with_library
from w2v2.model.loading import build_config
from w2v2.model.pretraining import build_model
from w2v2.train.capture import CapturedStep
from w2v2.train.launch import prepare_model, start_accelerator
from w2v2.train.schedule import UpdateSettings
from w2v2.train.update import build_optimizer, train_update

NUM_UTTERANCES = 20_000
REPEATS = 3  # of a stage
NOISE = np.random.default_rng(0).integers(-8_000, 8_000, 60 * SAMPLING_RATE).astype(np.int16)


class Contender:
    """One side of the comparison, or one rank of it, in a process of its own.

    `args` are the program's flags, `flags` the benchmark's and this side's `precision`. `prepare(lengths, update)`
    readies an update outside the clock: its `batches`, the samples `heard` of each utterance, and `num_rows` of the
    first micro-batch, whose parts `stages()` gives. `run()` is what is timed.
    """

    def __init__(self, args: PretrainArguments, flags: argparse.Namespace):
        self.args, self.flags, self.device = args, flags, torch.device(flags.device)
        self.config = build_config(args)
        torch.manual_seed(args.seed)

    def draw(self, lengths: str, update: int) -> tuple[Crops, np.ndarray]:
        """The effective batch of this update, from utterances of `librispeech`'s lengths or `equal` ones; and those."""
        flags, num_samples = self.flags, speech_lengths(NUM_UTTERANCES)
        seconds = {"batch": flags.batch_seconds, "crop": flags.crop_seconds, "grid": flags.length_grid_seconds}
        recipe = {f"{name}_samples": round(value * SAMPLING_RATE) for name, value in seconds.items()}
        if lengths == "equal":
            longest = recipe["crop_samples"]
            num_samples[:] = crop_length(np.array([longest]), longest, recipe["grid_samples"])
        batches, cursor = EffectiveBatches(num_samples, **recipe, seed=0), Cursor()
        for _ in range(update + 1):
            crops, cursor = batches.draw(cursor)
        return crops, num_samples

    def timed_update(self, lengths: str, update: int) -> dict:
        self.prepare(lengths, update)
        return self.timed_run()

    def timed_run(self) -> dict:
        """Seconds, CPU-seconds, the samples of each utterance heard, and the peak of memory so far in bytes."""
        self.synchronize()
        cpu_started, started = time.process_time(), time.perf_counter()
        self.run()
        self.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # the other side takes its turn on the same device
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "heard": self.heard, "peak_bytes": peak}

    def stage_table(self) -> dict[str, float]:
        """Stage → µs for each second of audio in one micro-batch of equal lengths, forward and backward."""
        self.prepare("equal", 0)
        seconds = sum(self.heard[: self.num_rows]) / SAMPLING_RATE
        return {name: self.median_seconds(stage) * 1e6 / seconds for name, stage in self.stages().items()}

    def median_seconds(self, stage: Callable[[], torch.Tensor | None]) -> float:
        """Of a stage and of the backward pass from what it returns (None: there is no such pass)."""
        found = []
        for _ in range(REPEATS + 1):  # the first warms up
            self.synchronize()
            started = time.perf_counter()
            with self.autocast():
                out = stage()
            if out is not None:
                out.backward(torch.ones_like(out))
            self.synchronize()
            found.append(time.perf_counter() - started)
            self.model.zero_grad(set_to_none=out is not None)
        return statistics.median(found[1:])

    def step(self) -> None:
        """The optimizer's step alone."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.flags.precision == "bf16")


def group_by_length(samples: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Utterances cut into micro-batches of like lengths: longest first, as many at a time as fit with their padding."""
    samples, groups = np.sort(samples)[::-1], []
    while len(samples):
        count = max(1, int(seconds * SAMPLING_RATE / samples[0]))
        groups.append(samples[:count])
        samples = samples[count:]
    return groups


class Ours(Contender):
    """This program, in as many processes as `start_accelerator` finds to have been launched."""

    def __init__(self, args, flags):
        super().__init__(args, flags)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if flags.precision == "bf16" else "no"
        self.accelerator = start_accelerator(args)
        self.device = self.accelerator.device
        model = build_model(args, self.config)
        self.model, self.optimizer = prepare_model(
            self.accelerator, model, build_optimizer(model, args), bare=args.cuda_graph
        )
        self.passes, self.kind, self.with_graph = self.model, None, args.cuda_graph
        self.framing = Framing(self.config, normalize=self.config.feat_extract_norm == "layer")

    def prepare(self, lengths, update):
        crops, _ = self.draw(lengths, update)
        cut = dict(
            rank=self.accelerator.process_index, num_ranks=self.accelerator.num_processes,
            micro_batch_samples=round(self.flags.micro_batch_seconds * SAMPLING_RATE),
        )  # fmt: skip
        plans = plan_update(crops, update, Cursor(), **cut)
        batches = [self.build(plan) for plan in plans]
        if self.with_graph:
            batches = self.fill(batches, lengths)
        self.batches = [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
        self.heard = [n for plan in plans if not plan.dummy for n in plan.crops.num_samples.tolist()]
        self.num_rows = len(plans[0].crops.num_samples)
        self.settings = UpdateSettings(
            step=update, seed=0, learning_rate=1e-5, gumbel_temperature=2.0, diversity_weight=0.1,
            shared_diversity=False, max_grad_norm=0.0,
        )  # fmt: skip

    def fill(self, batches: list[PretrainBatch], lengths: str) -> list[PretrainBatch]:
        """In one shape for all updates of such lengths, which have a graph of their own."""
        if lengths != self.kind:
            slots, rows = (max(map(len, found)) for found in zip(*((b.rows.row, b.keys) for b in batches), strict=True))
            self.kind, self.sizes = lengths, find_sizes(batches, PieceSize(round(1.01 * slots), rows + 2))
            self.passes = CapturedStep(self.accelerator, self.model)
        return [fill_up(batch, self.sizes) if self.sizes.hold(batch) else batch for batch in batches]

    def build(self, plan: MicroBatchPlan) -> PretrainBatch:
        crops, weight = (plan.crops.take([0]), 0.0) if plan.dummy else (plan.crops, 1.0)
        return build_batch(plan, crops, [NOISE[:n] for n in crops.num_samples], self.framing, 0, weight)

    def run(self):
        train_update(self.accelerator, self.passes, self.optimizer, self.batches, self.settings)

    def synchronize(self):
        super().synchronize()
        self.accelerator.wait_for_everyone()

    def stages(self):
        """Parts of `PretrainingModel`, each from its own inputs."""
        model, device = self.accelerator.unwrap_model(self.model), self.device
        encoder, projection = model.wav2vec2.encoder, model.wav2vec2.feature_projection
        batch = self.batches[0].to(device)
        linear, norm = transformer.linear, transformer.norm
        plain = torch.autocast(device.type, enabled=False)  # the model leaves autocast behind after the convs
        with torch.no_grad(), self.autocast():
            features = model._features(batch)  # (N, C)
            context = plain(model._context)(norm(projection.layer_norm, features), batch)  # (P, D)
        context = context.clone().requires_grad_()
        dtype = features.dtype
        features = features.clone().requires_grad_()
        hidden = torch.randn(len(features), model.config.hidden_size, device=device)  # (N, D)
        frames = hidden.to(dtype).requires_grad_()
        # The pre-norm residual is float32, the post-norm one of autocast's type.
        hidden = hidden.to(torch.float32 if model.config.do_stable_layer_norm else dtype).requires_grad_()

        def run_layers():
            x = hidden
            for index, module in enumerate(encoder.layers):
                x = model._layer(module, x, batch, index, dtype)
            return x

        def run_head():
            """Quantizer and contrast from features and contexts that are there already."""
            model._features, model._context = lambda batch: features, lambda normed, batch: context
            try:
                return model(batch).loss
            finally:
                del model._features, model._context

        return {
            "convs": lambda: model._features(batch),
            "projection": plain(lambda: linear(projection.projection, norm(projection.layer_norm, features))),
            "positional": plain(
                lambda: transformer.positional(encoder.pos_conv_embed, frames, batch.rows, model.positional_in_blocks)
            ),
            "layers": plain(run_layers),
            "head": run_head,
            "whole": lambda: model(batch).loss,
            "optimizer": self.step,
        }


def layer_for_all_frames(module, hidden, rows, dtype, rest=None, asked=None, layer=transformer.layer):
    """A layer that is computed for all frames, also where some are wanted alone."""
    out = layer(module, hidden, rows, dtype, rest)
    return out if asked is None else out.index_select(0, asked[0])


# Lever of --without → where the program has it, and what takes its place.
LEVERS = {
    "flat_convs": ("w2v2.model.feature_encoder", "is_flat", lambda config: False),
    "cpu_attention": ("w2v2.model.transformer", "attend_in_blocks", attend_with_library),
    "one_dnn": ("w2v2.model.cpu", "_ONE_DNN", None),
    "cheap_draws": ("w2v2.model.cpu", "draw_kept", lambda kept, p: kept.bernoulli_(1 - p)),
    "masked_last_layer": ("w2v2.model.pretraining", "layer", layer_for_all_frames),
}


class Without(Ours):
    """This program without one of its levers: what that one is worth in the whole update."""

    def __init__(self, args, flags):
        module, name, instead = LEVERS[flags.without]
        setattr(importlib.import_module(module), name, instead)
        super().__init__(args, flags)
