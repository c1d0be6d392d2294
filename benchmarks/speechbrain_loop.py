"""SpeechBrain's own wav2vec 2.0, as `update.py` times it and `train_rival.py` trains it: `pip install speechbrain`.

The modules and their order are those of its recipe for LibriSpeech, with this configuration's sizes. What differs from
the stock model by design: every conv has a layer norm, positions are sinusoids, layers are pre-norm, and there is no
penalty of features. As its loader does, batches hold like lengths, and masks are drawn outside the clock.
"""

from pathlib import Path

import numpy as np
import torch
from contenders import NOISE, Contender, group_by_length
from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder
from speechbrain.lobes.models.wav2vec import (
    EncoderWrapper,
    W2VLatentExtractor,
    W2VTargetQuantiser,
    sample_negatives,
    w2v_mask_collate_fn,
)
from speechbrain.nnet.losses import ContrastiveLoss
from torch.nn.functional import layer_norm

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.convert.speechbrain import OWN_FILES, convert_without_positions


class SpeechBrain(Contender):
    by_length = True  # micro-batches hold like lengths

    def __init__(self, args, flags):
        super().__init__(args, flags)
        config = self.config
        self.extractor = W2VLatentExtractor(
            out_channels=list(config.conv_dim), kernel_sizes=list(config.conv_kernel), strides=list(config.conv_stride)
        )
        encoder = TransformerEncoder(
            num_layers=config.num_hidden_layers, nhead=config.num_attention_heads, d_ffn=config.intermediate_size,
            d_model=config.hidden_size, dropout=config.hidden_dropout, activation=torch.nn.GELU, normalize_before=True,
            layerdrop_prob=config.layerdrop,
        )  # fmt: skip
        self.encoder = EncoderWrapper(config.conv_dim[-1], config.hidden_size, encoder, dropout_encoder_input=0.1)
        self.quantiser = W2VTargetQuantiser(
            config.conv_dim[-1], config.proj_codevector_dim, num_vars=config.num_codevectors_per_group
        )
        self.project = torch.nn.Linear(config.hidden_size, config.proj_codevector_dim)
        self.contrast = ContrastiveLoss(config.contrastive_logits_temperature)
        parts = torch.nn.ModuleList([self.extractor, self.encoder, self.quantiser, self.project])
        self.model = parts.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.01, eps=1e-6)

    def prepare(self, lengths, update):
        (crops, num_samples), longest = self.draw(lengths, update), round(self.flags.crop_seconds * SAMPLING_RATE)
        rows = group_by_length(np.minimum(num_samples[crops.utterance], longest), self.flags.micro_batch_seconds)
        self.heard, self.num_rows = np.concatenate(rows).tolist(), len(rows[0])
        self.batches = [self.collate([NOISE[:n] / np.float32(32_768) for n in samples]) for samples in rows]

    def collate(self, waveforms: list[np.ndarray]) -> tuple[torch.Tensor, ...]:
        """Padded waveforms (B, S), the shares of each row that are no padding (B,), and masks (B, T)."""
        signals = [layer_norm(torch.from_numpy(waveform), waveform.shape) for waveform in waveforms]
        return w2v_mask_collate_fn(
            [{"id": "", "sig": signal} for signal in signals], get_out_len_fn=self.extractor.get_output_lengths,
            mask_prob=self.config.mask_time_prob, mask_length=self.config.mask_time_length,
        )  # fmt: skip

    def run(self):
        for batch in self.batches:
            with self.autocast():
                loss = self.loss(*(x.to(self.device) for x in batch))
            (loss / len(self.batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 100.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, waveforms: torch.Tensor, shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Contrast and diversity, summed over masked frames. `shares`: (B,) of a row that are no padding."""
        latents = self.extractor(waveforms, normalize_signal=False)  # (B, T, C)
        context = self.encoder(latents, wav_lens=shares, mask=mask)["embeddings"]  # (B, T, D)
        # Each row has as many masked frames: (B, T, …) -> (B, M, …).
        latents, context = (x[mask].unflatten(0, (len(mask), -1)) for x in (latents, context))
        targets, codes = self.quantiser(latents)
        negatives = sample_negatives(targets, self.config.num_negatives)
        contrast, _ = self.contrast(self.project(context), targets, negatives)
        return contrast + self.config.diversity_loss_weight * codes["diversity_loss"] * mask.sum()

    def stages(self):
        batch = [x.to(self.device) for x in self.batches[0]]
        return {"whole": lambda: self.loss(*batch), "optimizer": self.step}

    def set_temperature(self, temperature: float) -> None:
        self.quantiser.quantiser.curr_temp = temperature

    def save(self, folder: Path) -> None:
        """As SpeechBrain does, a file each; and for stock classes, whose positional convolution then begins at zero."""
        for name, part in zip(OWN_FILES, (self.extractor, self.encoder, self.quantiser, self.project), strict=True):
            torch.save(part.state_dict(), folder / f"{name}.ckpt")
        config = self.config
        model, extractor = convert_without_positions(folder, config.num_attention_heads, config.conv_stride)
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
