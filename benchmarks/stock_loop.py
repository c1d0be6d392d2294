"""The loops that people write with transformers' public classes, as `update.py` times them.

Both hear the utterances of the same effective batch. `Stock` shuffles them, takes a fixed number at a time, pads to the
longest, and draws masks and negatives with the functions of transformers' own example. `StockTuned` is the same model
in an expert's hands: masks and negatives come from workers (drawn outside the clock), AdamW is fused, and batches hold
like lengths, as many as `--tuned_micro_batch_seconds` allows.
"""

import numpy as np
import torch
from contenders import NOISE, Contender, group_by_length
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from w2v2.audio.crops import SAMPLING_RATE


class Stock(Contender):
    fused = None  # torch's default

    def __init__(self, args, flags):
        super().__init__(args, flags)
        model = Wav2Vec2ForPreTraining._from_config(self.config, attn_implementation="sdpa")
        self.model = model.to(self.device).train()
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.fused)
        is_large = self.config.feat_extract_norm == "layer"
        self.extractor = Wav2Vec2FeatureExtractor(do_normalize=is_large, return_attention_mask=is_large)

    def prepare(self, lengths, update):
        (crops, num_samples), longest = self.draw(lengths, update), round(self.flags.crop_seconds * SAMPLING_RATE)
        rows = self.split(np.minimum(num_samples[crops.utterance], longest), update)
        self.heard, self.num_rows = np.concatenate(rows).tolist(), len(rows[0])
        self.batches = [self.collate([NOISE[:n] / np.float32(32_768) for n in samples]) for samples in rows]

    def split(self, samples: np.ndarray, update: int) -> list[np.ndarray]:
        """The utterances' lengths, micro-batch by micro-batch."""
        count = max(1, int(self.flags.micro_batch_seconds / self.flags.crop_seconds))
        shuffled = np.random.default_rng(update).permutation(samples)
        return np.split(shuffled, range(count, len(shuffled), count))

    def collate(self, waveforms: list[np.ndarray]) -> dict[str, torch.Tensor]:
        options = dict(sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
        return dict(self.extractor(waveforms, **options))

    def draw_masks(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Masks and negatives, drawn on the host as in transformers' example."""
        config, inside = self.config, None
        frames = int(self.model._get_feat_extract_output_lengths(batch["input_values"].shape[1]))
        if "attention_mask" in batch:
            inside = self.model._get_feature_vector_attention_mask(frames, batch["attention_mask"])
        shape = (len(batch["input_values"]), frames)
        mask = _compute_mask_indices(shape, config.mask_time_prob, config.mask_time_length, inside, min_masks=2)
        negatives = _sample_negative_indices(shape, config.num_negatives, mask_time_indices=mask)
        return {"mask_time_indices": torch.from_numpy(mask), "sampled_negative_indices": torch.from_numpy(negatives)}

    def inputs(self, batch) -> dict[str, torch.Tensor]:
        """The model's arguments on its device."""
        return {name: value.to(self.device) for name, value in (batch | self.draw_masks(batch)).items()}

    def run(self):
        for batch in self.batches:
            inputs = self.inputs(batch)
            with self.autocast():
                loss = self.model(**inputs).loss
            (loss / inputs["mask_time_indices"].sum() / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def stages(self):
        base, batch = self.model.wav2vec2, self.batches[0]
        waveforms = batch["input_values"].to(self.device)
        with torch.no_grad(), self.autocast():
            outputs = base(**{name: self.inputs(batch)[name] for name in ("input_values", "mask_time_indices")})
            features = base.feature_extractor(waveforms).transpose(1, 2)  # (B, T, C)
            hidden = base.feature_projection(features)[0].float()  # (B, T, D)
        features, hidden = features.clone().requires_grad_(), hidden.clone().requires_grad_()
        for name in ("last_hidden_state", "extract_features"):
            outputs[name] = outputs[name].clone().requires_grad_()

        def run_layers():
            x = hidden
            for module in base.encoder.layers:
                x = module(x)
            return x

        def run_head():
            """Quantizer and contrast, with draws, from outputs of the transformer that are there already."""
            base.forward = lambda *args, **options: outputs
            try:
                return self.model(**self.inputs(batch)).loss
            finally:
                del base.forward

        return {
            "convs": lambda: base.feature_extractor(waveforms),
            "projection": lambda: base.feature_projection(features)[0],
            "positional": lambda: base.encoder.pos_conv_embed(hidden),
            "layers": run_layers,
            "head": run_head,
            "whole": lambda: self.model(**self.inputs(batch)).loss,
            "optimizer": self.step,
        }


class StockTuned(Stock):
    fused = True

    def split(self, samples, update):
        return group_by_length(samples, self.flags.tuned_micro_batch_seconds or self.flags.micro_batch_seconds)

    def collate(self, waveforms):
        batch = super().collate(waveforms)
        batch |= self.draw_masks(batch)
        return {name: x.pin_memory() for name, x in batch.items()} if self.device.type == "cuda" else batch

    def inputs(self, batch):
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
