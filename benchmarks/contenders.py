"""What `update.py` times: one update of this program, and one of the loop that people write with transformers' public
classes.

Both hear the same utterances of an effective batch. Ours are cropped to the length grid, cut and padded as in
training. The stock loop shuffles them, takes a fixed number at a time, pads to the longest, and draws masks and
negatives with the functions that transformers' own example uses. Samples are noise: no kernel's time depends on them.
"""

import argparse
import importlib
import resource
import sys
import time

import numpy as np
import torch
from accelerate import Accelerator
from common import speech_lengths
from stages import autocast, our_stages, stock_stages, synchronize
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from w2v2.arguments import PretrainArguments
from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Crops, Cursor, EffectiveBatches, crop_length, plan_update
from w2v2.data.collate import CropDataset, PretrainBatch
from w2v2.model import cpu, transformer
from w2v2.model.loading import build_config, build_framing
from w2v2.model.pretraining import build_model
from w2v2.train.schedule import UpdateSettings
from w2v2.train.update import build_optimizer, train_update

NUM_UTTERANCES = 20_000


def draw(args, lengths: str, update: int) -> tuple[Crops, np.ndarray]:
    """The effective batch of this update, from utterances of `librispeech`'s lengths or `equal` ones; and those."""
    longest, grid = round(args.crop_seconds * SAMPLING_RATE), round(args.length_grid_seconds * SAMPLING_RATE)
    num_samples = speech_lengths(NUM_UTTERANCES)
    if lengths == "equal":
        num_samples[:] = crop_length(np.array([longest]), longest, grid)
    batch_samples = round(args.batch_seconds * SAMPLING_RATE)
    batches = EffectiveBatches(
        num_samples, batch_samples=batch_samples, crop_samples=longest, grid_samples=grid, seed=0
    )
    cursor = Cursor()
    for _ in range(update + 1):
        crops, cursor = batches.draw(cursor)
    return crops, num_samples


class NoiseCrops(CropDataset):
    """Micro-batches as in training, whose samples come from a pool of 16-bit noise instead of files."""

    POOL = np.random.default_rng(0).integers(-8_000, 8_000, 60 * SAMPLING_RATE).astype(np.int16)

    def entries(self, plan):
        return [{"num_samples": int(n)} for n in plan.crops.num_samples]

    def read(self, entry, start, num_samples):
        return self.POOL[:num_samples]


class Contender:
    """One side of the comparison: `prepare(lengths, update)` readies an update's data outside the clock, `run()` is
    what is timed.

    `args` are the program's flags, `flags` those of the benchmark. `micro_batch_samples()` are those heard in the
    first micro-batch, `stages()` what `stages.py` times.
    """

    def __init__(self, args: PretrainArguments, flags: argparse.Namespace):
        self.args, self.flags, self.device = args, flags, torch.device(flags.device)
        self.config = build_config(args)
        torch.manual_seed(0)

    def step(self) -> None:
        """The optimizer's step alone."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def timed_update(self, lengths: str, update: int) -> dict:
        """Seconds, CPU-seconds, the samples of each utterance heard, and the peak of memory so far in bytes."""
        self.prepare(lengths, update)
        synchronize(self.device)
        cpu_started, started = time.process_time(), time.perf_counter()
        self.run()
        synchronize(self.device)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        peak = peak_bytes(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the other side takes its turn on the same device
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "heard": self.heard, "peak_bytes": peak}


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Ours(Contender):
    def __init__(self, args, flags):
        super().__init__(args, flags)
        is_cpu = self.device.type == "cpu"
        if is_cpu:
            cpu.keep_freed()
        self.accelerator = Accelerator(cpu=is_cpu, mixed_precision="no" if is_cpu else "bf16")
        model = build_model(args, self.config)
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, args))
        extractor = Wav2Vec2FeatureExtractor(do_normalize=self.config.feat_extract_norm == "layer")
        self.dataset = NoiseCrops(None, build_framing(self.config, extractor), seed=0)

    def prepare(self, lengths, update):
        crops, _ = draw(self.flags, lengths, update)
        cut = dict(rank=0, num_ranks=1, micro_batch_samples=round(self.flags.micro_batch_seconds * SAMPLING_RATE))
        batches = [self.dataset[plan] for plan in plan_update(crops, update, Cursor(), **cut)]
        self.batches: list[PretrainBatch] = [b.pin_memory() for b in batches] if self.device.type == "cuda" else batches
        self.heard = [n for b in batches for n in b.num_samples.tolist()]
        self.settings = UpdateSettings(
            step=update, seed=0, learning_rate=1e-5, gumbel_temperature=2.0, diversity_weight=0.1,
            shared_diversity=False, max_grad_norm=0.0,
        )  # fmt: skip

    def run(self):
        train_update(self.accelerator, self.model, self.optimizer, self.batches, self.settings)

    def micro_batch_samples(self):
        return self.batches[0].heard_samples

    def stages(self):
        return our_stages(self, self.batches[0])


def layer_for_all_frames(module, hidden, rows, dtype, rest=None, positions=None, layer=transformer.layer):
    """A layer that is computed for all frames, also where some are wanted alone."""
    out = layer(module, hidden, rows, dtype, rest)
    return out if positions is None else transformer.take(out, positions).unflatten(0, positions.shape)


class Without(Ours):
    """This program without one of its levers (`--without`): what that one is worth in the whole update."""

    # Lever → where the program has it, and what takes its place.
    LEVERS = {
        "flat_convs": ("w2v2.model.pretraining", "is_flat", lambda config: False),
        "cpu_attention": ("w2v2.model.attention", "has_kernel", lambda device: True),
        "one_dnn": ("w2v2.model.cpu", "_ONE_DNN", None),
        "cheap_draws": ("w2v2.model.cpu", "draw_kept", lambda kept, p: kept.bernoulli_(1 - p)),
        "masked_last_layer": ("w2v2.model.pretraining", "layer", layer_for_all_frames),
    }

    def __init__(self, args, flags):
        module, name, instead = self.LEVERS[flags.without]
        setattr(importlib.import_module(module), name, instead)
        super().__init__(args, flags)


class Stock(Contender):
    def __init__(self, args, flags):
        super().__init__(args, flags)
        model = Wav2Vec2ForPreTraining._from_config(self.config, attn_implementation="sdpa")
        self.model = model.to(self.device).train()
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        is_large = self.config.feat_extract_norm == "layer"
        self.extractor = Wav2Vec2FeatureExtractor(do_normalize=is_large, return_attention_mask=is_large)

    def prepare(self, lengths, update):
        crops, num_samples = draw(self.flags, lengths, update)
        utterances, longest = np.random.default_rng(update).permutation(crops.utterance), self.flags.crop_seconds
        self.heard = np.minimum(num_samples[utterances], round(longest * SAMPLING_RATE)).tolist()
        size = max(1, int(self.flags.micro_batch_seconds / longest))
        self.batches = []
        for first in range(0, len(self.heard), size):
            waveforms = [NoiseCrops.POOL[:n] / np.float32(32_768) for n in self.heard[first : first + size]]
            batch = self.extractor(waveforms, sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
            self.batches.append(batch)

    def inputs(self, batch) -> dict[str, torch.Tensor]:
        """The model's arguments: the batch, and masks and negatives drawn on the host as in transformers' example."""
        config = self.config
        frames = int(self.model._get_feat_extract_output_lengths(batch["input_values"].shape[1]))
        inside = None
        if "attention_mask" in batch:
            inside = self.model._get_feature_vector_attention_mask(frames, batch["attention_mask"])
        shape = (len(batch["input_values"]), frames)
        mask = _compute_mask_indices(shape, config.mask_time_prob, config.mask_time_length, inside, min_masks=2)
        negatives = _sample_negative_indices(shape, config.num_negatives, mask_time_indices=mask)
        drawn = {"mask_time_indices": torch.from_numpy(mask), "sampled_negative_indices": torch.from_numpy(negatives)}
        return {name: value.to(self.device) for name, value in (dict(batch) | drawn).items()}

    def run(self):
        for batch in self.batches:
            inputs = self.inputs(batch)
            with autocast(self.device):
                loss = self.model(**inputs).loss
            (loss / inputs["mask_time_indices"].sum() / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def micro_batch_samples(self):
        return sum(self.heard[: len(self.batches[0]["input_values"])])

    def stages(self):
        return stock_stages(self, self.batches[0], self.inputs)


CONTENDERS = {"ours": Ours, "stock": Stock, "without": Without}
