"""The loop that people write with transformers' public classes, as `update.py` times it.

It hears the utterances of the same effective batch: shuffles them, takes a fixed number at a time, pads to the longest,
and draws masks and negatives with the functions of transformers' own example.
"""

import numpy as np
import torch
from contenders import NOISE, Contender
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from w2v2.audio.crops import SAMPLING_RATE


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
        (crops, num_samples), longest = self.draw(lengths, update), self.flags.crop_seconds
        utterances = np.random.default_rng(update).permutation(crops.utterance)
        self.heard = np.minimum(num_samples[utterances], round(longest * SAMPLING_RATE)).tolist()
        self.num_rows = n = max(1, int(self.flags.micro_batch_seconds / longest))
        waveforms = [NOISE[:samples] / np.float32(32_768) for samples in self.heard]
        options = dict(sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
        self.batches = [self.extractor(waveforms[i : i + n], **options) for i in range(0, len(waveforms), n)]

    def inputs(self, batch) -> dict[str, torch.Tensor]:
        """The model's arguments: the batch, and masks and negatives drawn on the host as in transformers' example."""
        config, inside = self.config, None
        frames = int(self.model._get_feat_extract_output_lengths(batch["input_values"].shape[1]))
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
            with self.autocast():
                loss = self.model(**inputs).loss
            (loss / inputs["mask_time_indices"].sum() / len(self.batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def stages(self):
        base, batch = self.model.wav2vec2, self.batches[0]
        waveforms = batch["input_values"].to(self.device)
        with torch.no_grad(), self.autocast():
            features = base.feature_extractor(waveforms).transpose(1, 2)  # (B, T, C)
            hidden = base.feature_projection(features)[0].float()  # (B, T, D)
        features, hidden = features.clone().requires_grad_(), hidden.clone().requires_grad_()

        def run_layers():
            x = hidden
            for module in base.encoder.layers:
                x = module(x)
            return x

        return {
            "convs": lambda: base.feature_extractor(waveforms),
            "projection": lambda: base.feature_projection(features)[0],
            "positional": lambda: base.encoder.pos_conv_embed(hidden),
            "layers": run_layers,
            "whole": lambda: self.model(**self.inputs(batch)).loss,
            "optimizer": self.step,
        }
