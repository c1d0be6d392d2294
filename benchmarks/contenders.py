"""What `update.py` times: one update of this program, and one of the loop that people write with transformers' public classes.

Both hear the same utterances of an effective batch. Ours are cropped to the length grid, cut and padded as in training. The stock loop
shuffles them, takes a fixed number at a time, pads to the longest, and draws masks and negatives with the functions that transformers'
own example uses. Samples are noise: no kernel's time depends on them.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from stages import our_stages, stock_stages, synchronize
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices
from ways_to_batch import speech_lengths

import w2v2.data.collate
import w2v2.model.attention
import w2v2.model.cpu
import w2v2.model.pretraining
import w2v2.model.transformer
from w2v2.arguments import PretrainArguments
from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Crops, Cursor, EffectiveBatches, crop_length, plan_update
from w2v2.data.collate import CropDataset, PretrainBatch
from w2v2.model.config import build_config
from w2v2.model.cpu import keep_freed
from w2v2.model.loading import build_framing, build_model
from w2v2.train.update import UpdateSettings, build_optimizer, train_update

NUM_UTTERANCES = 20_000


@dataclass
class Work:
    """What both contenders are given."""

    lengths: str  # `librispeech`, or `equal`
    batch_seconds: float
    micro_batch_seconds: float
    crop_seconds: float
    length_grid_seconds: float
    seed: int = 0


def effective_batches(work: Work) -> EffectiveBatches:
    """The draw of utterances that both contenders follow."""
    longest, grid = round(work.crop_seconds * SAMPLING_RATE), round(work.length_grid_seconds * SAMPLING_RATE)
    num_samples = speech_lengths(NUM_UTTERANCES, work.seed)
    if work.lengths == "equal":
        num_samples[:] = crop_length(np.array([longest]), longest, grid)
    return EffectiveBatches(
        num_samples,
        batch_samples=round(work.batch_seconds * SAMPLING_RATE),
        crop_samples=longest,
        grid_samples=grid,
        seed=work.seed,
    )


def drawn(batches: EffectiveBatches, update: int) -> Crops:
    """The effective batch of this update."""
    cursor = Cursor()
    for _ in range(update + 1):
        crops, cursor = batches.draw(cursor)
    return crops


class NoiseCrops(CropDataset):
    """Micro-batches as in training, whose samples come from a pool of 16-bit noise instead of files."""

    POOL = np.random.default_rng(0).integers(-8_000, 8_000, 60 * SAMPLING_RATE).astype(np.int16)

    def entries(self, plan):
        return [{"num_samples": int(n)} for n in plan.crops.num_samples]

    def read(self, entry, start, num_samples):
        return self.POOL[:num_samples]


class Contender:
    """One side of the comparison. `prepare` readies an update's data outside the clock, `run` is what is timed."""

    def __init__(self, args: PretrainArguments, device: torch.device):
        self.args, self.device = args, device
        self.config = build_config(args)
        torch.manual_seed(0)

    def prepare(self, work: Work, update: int) -> None:
        raise NotImplementedError

    def run(self) -> None:
        raise NotImplementedError

    def micro_batch_samples(self) -> int:
        """Samples heard in the first micro-batch."""
        raise NotImplementedError

    def stages(self) -> dict[str, Callable]:
        """See `stages.py`."""
        raise NotImplementedError

    def step(self) -> None:
        """The optimizer's step alone."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def timed_update(self, work: Work, update: int) -> dict:
        """Seconds, CPU-seconds, audio heard and computed (each row's samples), and the peak of memory so far in bytes."""
        self.prepare(work, update)
        synchronize(self.device)
        before, started = time.process_time(), time.perf_counter()
        self.run()
        synchronize(self.device)
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - before,
            "heard": self.heard,
            "peak_bytes": peak_bytes(self.device),
        }


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Ours(Contender):
    keep_memory = staticmethod(keep_freed)

    def __init__(self, args, device):
        super().__init__(args, device)
        if device.type == "cpu":
            self.keep_memory()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no" if device.type == "cpu" else "bf16"
        )
        model = build_model(args, self.config)
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, args))
        extractor = Wav2Vec2FeatureExtractor(do_normalize=self.config.feat_extract_norm == "layer")
        self.dataset = NoiseCrops(None, build_framing(self.config, extractor), seed=0)

    def prepare(self, work, update):
        crops = drawn(effective_batches(work), update)
        cut = dict(rank=0, num_ranks=1, micro_batch_samples=round(work.micro_batch_seconds * SAMPLING_RATE))
        batches = [self.dataset[plan] for plan in plan_update(crops, update, Cursor(), **cut)]
        self.batches: list[PretrainBatch] = [b.pin_memory() for b in batches] if self.device.type == "cuda" else batches
        self.heard = [n for b in batches for n in b.num_samples.tolist()]
        self.settings = UpdateSettings(update, 0, 1e-5, 2.0, 0.1, False, 0.0)

    def run(self):
        train_update(self.accelerator, self.model, self.optimizer, self.batches, self.settings)

    def micro_batch_samples(self):
        return self.batches[0].heard_samples

    def stages(self):
        return our_stages(self, self.batches[0])


def last_layer_of_all_frames(
    module,
    hidden,
    rows,
    dtype,
    rest=None,
    positions=None,
    layer=w2v2.model.transformer.layer,
    take=w2v2.model.transformer.take,
):
    """A layer that is computed for all frames, also where some are wanted alone."""
    out = layer(module, hidden, rows, dtype, rest)
    return out if positions is None else take(out, positions).unflatten(0, positions.shape)


class Without(Ours):
    """This program without one of its levers (`--without`): what that one is worth in the whole update."""

    LEVERS = {
        "flat_convs": lambda args: setattr(w2v2.model, "is_flat", lambda config: False),
        "cpu_attention": lambda args: setattr(w2v2.attention, "has_kernel", lambda device: True),
        "one_dnn": lambda args: setattr(w2v2.products, "_ONE_DNN", None),
        "cheap_draws": lambda args: [
            setattr(module, "dropout", torch.nn.functional.dropout) for module in (w2v2.encoder, w2v2.model.pretraining)
        ],
        "masked_last_layer": lambda args: setattr(w2v2.model, "layer", last_layer_of_all_frames),
        "allocator": lambda args: setattr(Without, "keep_memory", staticmethod(lambda: None)),
        "layerdrop_rows": lambda args: setattr(
            w2v2.collate, "kept_rows", lambda keys, layers, p: torch.ones(layers, len(keys), dtype=torch.bool)
        ),
        "compile": lambda args: setattr(args, "torch_compile", False),
        "positional_blocks": lambda args: setattr(args, "positional_conv", "stock"),
        "checkpointing": lambda args: setattr(args, "gradient_checkpointing", False),
    }

    def __init__(self, args, device, without: str):
        self.LEVERS[without](args)
        super().__init__(args, device)


class Stock(Contender):
    def __init__(self, args, device):
        super().__init__(args, device)
        self.model = Wav2Vec2ForPreTraining._from_config(self.config, attn_implementation="sdpa").to(device).train()
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        large = self.config.feat_extract_norm == "layer"
        self.extractor = Wav2Vec2FeatureExtractor(do_normalize=large, return_attention_mask=large)

    def prepare(self, work, update):
        batches = effective_batches(work)
        utterances = np.random.default_rng(update).permutation(drawn(batches, update).utterance)
        longest = round(work.crop_seconds * SAMPLING_RATE)
        self.heard = np.minimum(batches.num_samples[utterances], longest).tolist()
        size = max(1, int(work.micro_batch_seconds / work.crop_seconds))
        self.batches = []
        for first in range(0, len(self.heard), size):
            waveforms = [NoiseCrops.POOL[:n] / np.float32(32_768) for n in self.heard[first : first + size]]
            self.batches.append(
                self.extractor(waveforms, sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
            )

    def inputs(self, batch) -> dict[str, torch.Tensor]:
        """The model's arguments: the batch, its masks and its negatives, drawn on the host as in transformers' example."""
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
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.model(**inputs).loss
            (loss / inputs["mask_time_indices"].sum() / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def micro_batch_samples(self):
        return sum(self.heard[: len(self.batches[0]["input_values"])])

    def stages(self):
        return stock_stages(self, self.batches[0], self.inputs)


CONTENDERS = {"ours": Ours, "stock": Stock, "without": Without}
