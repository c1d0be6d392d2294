"""`Wav2Vec2ForPreTraining` with a forward pass of its own: same parameters, same keys, stock weights in and out.

What the stock forward computes for all frames and then ignores is computed for masked frames only, and nothing sees padding, so the
loss of a micro-batch is the sum of the stock model's losses on each of its utterances alone.

Shapes: B utterances, S samples, T latent frames of the longest, N of all of them, M masked frames of the row that has most, C conv channels, D width, G codebook
groups, V entries of a group.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Wav2Vec2ForPreTraining

from w2v2.data.collate import PretrainBatch, sound
from w2v2.data.masking import distractors
from w2v2.model import objective
from w2v2.model.attention import Rows
from w2v2.model.cpu import dropout
from w2v2.model.feature_encoder import flat_features, is_flat, stock_features
from w2v2.model.transformer import after_attention, gather, layer, linear, norm, positional, take


class PretrainSums(NamedTuple):
    """What a micro-batch adds to its effective batch: sums over masked frames, all zero for a dummy."""

    loss: torch.Tensor  # () weighted total: what is differentiated
    contrastive: torch.Tensor  # ()
    diversity: torch.Tensor  # ()
    penalty: torch.Tensor  # ()
    correct: torch.Tensor  # ()
    distractors_left: torch.Tensor  # ()
    code_entropy: torch.Tensor  # ()
    num_masked: torch.Tensor  # ()
    codes_soft: torch.Tensor  # (G, V)
    codes_hard: torch.Tensor  # (G, V)


class PretrainingModel(Wav2Vec2ForPreTraining):
    """The stock model; `forward` takes a `PretrainBatch` and gives `PretrainSums`."""

    feature_grad_mult: float = 0.1
    feature_penalty_weight: float = 10.0
    positional_in_blocks: bool | None = None  # None: where it pays, on an accelerator
    recomputed: frozenset[str] = frozenset()  # stages whose activations are computed again in the backward pass
    _after_attention = None  # compiled, if asked for

    def get_input_embeddings(self):
        return None  # there are none, and sharding asks

    def get_output_embeddings(self):
        return None

    def forward(
        self,
        batch: PretrainBatch,
        gumbel_temperature: float = 2.0,
        diversity_weight: float | None = None,
        mean_codes: torch.Tensor | None = None,
    ) -> PretrainSums:
        """Loss sums of one micro-batch (paper, sections 2 and 3).

        Args:
            gumbel_temperature: used in train mode; in eval mode codes are the most likely ones, without noise.
            diversity_weight: default the configuration's `diversity_loss_weight`.
            mean_codes: (G, V) mean code distribution of the whole effective batch; without it the micro-batch's own is used.
        """
        masked, positions = batch.num_masked, batch.positions
        valid = _valid(batch)
        num_masked = masked.sum() * batch.weight

        features = self._features(batch)  # (B, T, C)
        with torch.autocast(features.device.type, enabled=False):
            normed = norm(self.wav2vec2.feature_projection.layer_norm, features)
            logits = self._code_logits(normed, positions)  # (B, M, G, V)
            context = self._context(normed, batch)  # (B, M, D)

            one_hot, codes = objective.choose_codes(logits, gumbel_temperature if self.training else None)
            statistics = objective.code_statistics(logits, valid)
            quantized = self.project_q(objective.look_up(one_hot, self.quantizer.codevectors))
            contrast = objective.contrastive_loss(
                context_BMD=self.project_hid(_full(context)),
                quantized_BMD=quantized,
                codes_BMG=codes,
                distractors_BMK=distractors(batch.keys, masked, positions.shape[1], self.config.num_negatives),
                valid_BM=valid,
                temperature=self.config.contrastive_logits_temperature,
            )
            if mean_codes is None:
                diversity = objective.diversity_loss(statistics, masked.sum())
            else:
                diversity = objective.shared_diversity_loss(statistics, mean_codes, masked.sum())
            penalty = objective.feature_penalty(features, batch.frames, masked)
            weight = self.config.diversity_loss_weight if diversity_weight is None else diversity_weight
            loss = contrast.loss + weight * diversity + self.feature_penalty_weight * penalty
        sums = (
            loss,
            contrast.loss,
            diversity,
            penalty,
            contrast.correct,
            contrast.distractors_left,
            statistics.entropy,
        )
        return PretrainSums(
            *(batch.weight * x for x in sums),
            num_masked,
            batch.weight * statistics.soft,
            batch.weight * statistics.hard,
        )

    @torch.no_grad()
    def code_sums(self, batch: PretrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the code distributions over masked frames (G, V) and their number (): the first pass of `diversity_scope:
        effective_batch`, convs and `weight_proj` alone. Draws the same dropout as `forward` from the same generator state."""
        features = self._features(batch)
        with torch.autocast(features.device.type, enabled=False):
            normed = norm(self.wav2vec2.feature_projection.layer_norm, features)
            logits = self._code_logits(normed, batch.positions)
            soft = objective.code_statistics(logits, _valid(batch)).soft
        return batch.weight * soft, batch.weight * batch.num_masked.sum()

    def compile_layers(self) -> None:
        """Fuse what a layer does frame by frame. One graph serves all shapes."""
        self._after_attention = torch.compile(after_attention, dynamic=True)

    def _features(self, batch: PretrainBatch) -> torch.Tensor:
        """Output of the convs (B, T, C), its gradient scaled, in autocast's type. Frames past a row's end are zero."""
        encode = flat_features if is_flat(self.config) else stock_features
        arguments = encode, sound(batch), batch.num_samples, self.wav2vec2.feature_extractor
        features = self._stage("convs", *arguments)[:, : batch.mask.shape[1]]
        if torch.is_autocast_enabled(features.device.type):
            features = features.to(torch.get_autocast_dtype(features.device.type))
        if not batch.uniform:
            features = torch.where(_inside(batch)[..., None], features, 0.0)
        return objective.scale_gradient(features, self.feature_grad_mult)

    def _stage(self, name: str, function, *arguments):
        """`function(*arguments)`, whose activations are thrown away and computed again if `name` is one of `recomputed`."""
        if name in self.recomputed and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _code_logits(self, normed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Quantizer logits of the masked frames (B, M, G, V), in float32 at least. Its dropout is the forward's first random draw."""
        quantizer = self.quantizer
        logits = linear(quantizer.weight_proj, self._dropout(self.dropout_features, gather(normed, positions)))
        return _full(logits).unflatten(-1, (quantizer.num_groups, quantizer.num_vars))

    def _context(self, normed: torch.Tensor, batch: PretrainBatch) -> torch.Tensor:
        """Transformer over the masked sequence: (B, M, D), the context of the masked frames, which alone the loss looks at."""
        encoder, projection = self.wav2vec2.encoder, self.wav2vec2.feature_projection
        hidden = self._dropout(projection.dropout, linear(projection.projection, normed))
        hidden = torch.where(batch.mask[..., None], self.wav2vec2.masked_spec_embed.to(hidden.dtype), hidden)
        if not batch.uniform:
            hidden = torch.where(_inside(batch)[..., None], hidden, 0.0)
        in_blocks = hidden.device.type != "cpu" if self.positional_in_blocks is None else self.positional_in_blocks
        hidden = hidden + positional(encoder.pos_conv_embed, hidden, in_blocks)
        hidden = hidden.flatten(0, 1)
        if not batch.uniform:
            hidden = hidden.index_select(0, batch.inside)  # from here on without padding: (N, D)
        pre_norm = self.config.do_stable_layer_norm
        hidden = _full(hidden) if pre_norm else norm(encoder.layer_norm, hidden)
        hidden = self._dropout(encoder.dropout, hidden)
        for index, module in enumerate(encoder.layers):
            hidden = self._layer(module, hidden, batch, index, normed.dtype)
        return norm(encoder.layer_norm, hidden) if pre_norm else hidden

    def _layer(
        self, module, hidden: torch.Tensor, batch: PretrainBatch, index: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """One layer on the concatenated frames (N, D), computed for the utterances that layerdrop leaves it.

        One at least, so that no parameter is without a gradient. The last layer gives the masked frames alone, (B, M, D).
        """
        is_last = index == self.config.num_hidden_layers - 1

        def run(x, rows, own=slice(None)):
            positions = _masked_among(batch, rows, own) if is_last else None
            return self._stage("encoder", layer, module, x, rows, dtype, self._after_attention, positions)

        everyone = Rows(batch.lengths, batch.bounds[-1])
        kept = batch.kept_rows[index]
        if not self.training or len(kept) == len(batch.lengths):
            return run(hidden, everyone)
        present = kept or (0,)
        segments = _segments(batch.lengths, present)
        pieces = hidden.split([frames for frames, _ in segments])
        chosen = [piece for piece, (_, is_kept) in zip(pieces, segments, strict=True) if is_kept]
        own = batch.kept[index, : len(present)]
        rows = Rows([batch.lengths[row] for row in present], batch.bounds[index, : len(present) + 1])
        out = run(chosen[0] if len(chosen) == 1 else torch.cat(chosen), rows, own)
        if is_last:
            masked = take(hidden, _masked_among(batch, everyone)).unflatten(0, batch.positions.shape)
            return masked.index_copy(0, own, out if kept else _ignored(out, masked[:1]))
        if not kept:
            out = _ignored(out, chosen[0])
        computed = iter(out.split([len(piece) for piece in chosen]))
        return torch.cat([next(computed) if is_kept else p for p, (_, is_kept) in zip(pieces, segments, strict=True)])

    def _dropout(self, module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, module.p, self.training)


def _valid(batch: PretrainBatch) -> torch.Tensor:
    """(B, M) bool: slots that hold a masked frame."""
    return torch.arange(batch.positions.shape[1], device=batch.mask.device) < batch.num_masked[:, None]


def _inside(batch: PretrainBatch) -> torch.Tensor:
    """(B, T) bool: frames that belong to their row."""
    return torch.arange(batch.mask.shape[1], device=batch.mask.device) < batch.frames[:, None]


def _masked_among(batch: PretrainBatch, rows: Rows, own: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Where the masked frames of the rows `own` lie among the concatenated frames of `rows`, which are the same: (B, M) int64.

    A slot without a masked frame gets another frame of its row, never of the next one.
    """
    return rows.bounds[:-1, None] + torch.minimum(batch.positions[own], batch.frames[own, None] - 1)


def _segments(lengths: Sequence[int], kept: Sequence[int]) -> list[tuple[int, bool]]:
    """Neighbouring utterances that are kept, or not: (their frames, whether they are), in order."""
    flags = [False] * len(lengths)
    for row in kept:
        flags[row] = True
    groups = groupby(zip(flags, lengths, strict=True), itemgetter(0))
    return [(sum(length for _, length in group), is_kept) for is_kept, group in groups]


def _ignored(out: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
    """`instead`; `out` is there for its gradient alone, which is zero."""
    return torch.where(out.new_zeros((), dtype=torch.bool), out, instead)


def _full(x: torch.Tensor) -> torch.Tensor:
    """At least float32: the loss head is an island of full precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
