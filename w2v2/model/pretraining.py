"""`Wav2Vec2ForPreTraining` with a forward pass of its own: same parameters, same keys, stock weights in and out.

The stock forward computes quantizer and loss for all frames, this one for masked frames only. There is no padding, and
the loss of a micro-batch is the sum of the stock model's losses on each of its utterances alone.

Shapes: B utterances, N slots, P masked frames of all utterances, M of the one that has most, K distractors, C conv
channels, D width, G codebook groups, V entries of a group.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from w2v2.data.collate import PretrainBatch, sound
from w2v2.data.masking import distractors
from w2v2.errors import refuse
from w2v2.model import objective
from w2v2.model.cpu import dropout
from w2v2.model.feature_encoder import encoder_of
from w2v2.model.loading import load_weights, make_model
from w2v2.model.transformer import after_attention, layer, linear, norm, positional, skips_rows

# What a saved config.json says to those who fine-tune, as published BASE does. Pretraining's own masks are flags.
FINETUNING_MASKS = dict(
    apply_spec_augment=True, mask_time_prob=0.05, mask_time_length=10, mask_time_min_masks=2, mask_feature_prob=0.0,
    mask_feature_length=10, mask_feature_min_masks=0,
)  # fmt: skip


class PretrainSums(NamedTuple):
    """What a micro-batch adds to its effective batch: sums over masked frames, all zero for a dummy."""

    loss: torch.Tensor  # () weighted total: what is differentiated
    contrastive: torch.Tensor  # ()
    diversity: torch.Tensor  # ()
    penalty: torch.Tensor  # ()
    correct: torch.Tensor  # ()
    commonest: torch.Tensor  # () frames that always guessing the utterance's commonest codes would get right
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
    _after_attention = None  # compiled or fused, if asked for

    def get_input_embeddings(self):
        return None  # the model has none, and sharding asks for them

    get_output_embeddings = get_input_embeddings

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # custom code would miss the stock model's own start of `project_hid` and `project_q`

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
            mean_codes: (G, V) mean code distribution of the effective batch; by default the micro-batch's own.
        """
        rows, num_masked = batch.rows, batch.masked_rows.frames.sum()

        # 1. Latent frames, and what the transformer and the quantizer make of them.
        features = self._features(batch)  # (N, C)
        with torch.autocast(features.device.type, enabled=False):
            normed = norm(self.wav2vec2.feature_projection.layer_norm, features)
            logits = self._code_logits(normed, batch)  # (P, G, V)
            context = self._context(normed, batch)  # (P, D)

            # 2. Quantize the masked frames.
            one_hot, codes = objective.choose_codes(logits, gumbel_temperature if self.training else None)
            soft, hard, entropy = objective.code_statistics(logits, batch.masked_rows.inside)
            codevectors = objective.look_up(one_hot, self.quantizer.codevectors)  # (P, codevector_dim)

            # 3. Contrast them with distractors, other masked frames of the same utterance.
            context, quantized = self.project_hid(_full(context)), self.project_q(codevectors)
            contrast = self._contrast(context, quantized, codes, batch)

            # 4. The loss: L = L_m + α L_d (equation 2), and fairseq's feature penalty.
            if mean_codes is None:
                diversity = objective.diversity_loss(soft, num_masked)
            else:
                diversity = objective.shared_diversity_loss(soft, mean_codes, num_masked)
            share = (batch.masked_rows.frames / rows.frames.clamp_min(1))[rows.row] * rows.inside  # (N,)
            penalty = objective.feature_penalty(features, share)
            weight = self.config.diversity_loss_weight if diversity_weight is None else diversity_weight
            loss = contrast[0] + weight * diversity + self.feature_penalty_weight * penalty
        sums = loss, contrast[0], diversity, penalty, *contrast[1:], entropy, num_masked, soft, hard
        return PretrainSums(*(batch.weight * x for x in sums))

    @torch.no_grad()
    def code_sums(self, batch: PretrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the code distributions over masked frames (G, V), and their number (): the first pass of
        `diversity_scope: effective_batch`. From the same generator state it draws the same dropout as `forward`.
        """
        features = self._features(batch)
        with torch.autocast(features.device.type, enabled=False):
            normed = norm(self.wav2vec2.feature_projection.layer_norm, features)
            soft, _, _ = objective.code_statistics(self._code_logits(normed, batch), batch.masked_rows.inside)
        return batch.weight * soft, batch.weight * batch.masked_rows.frames.sum()

    def _features(self, batch: PretrainBatch) -> torch.Tensor:
        """Output of the convs (N, C), its gradient scaled, in autocast's type; zero in the gaps."""
        inputs = sound(batch.samples), batch.rows, batch.num_samples, self.wav2vec2.feature_extractor
        features = self._stage("convs", encoder_of(self.config), *inputs)
        if torch.is_autocast_enabled(features.device.type):
            features = features.to(torch.get_autocast_dtype(features.device.type))
        return objective.scale_gradient(torch.where(batch.rows.inside[:, None], features, 0.0), self.feature_grad_mult)

    def _stage(self, name: str, function, *arguments):
        """`function(*arguments)`. If `name` is in `recomputed`, the backward pass computes its activations again."""
        if name in self.recomputed and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _code_logits(self, normed: torch.Tensor, batch: PretrainBatch) -> torch.Tensor:
        """Quantizer logits of the masked frames (P, G, V), at least float32. Its dropout is the first draw."""
        masked = dropout(normed.index_select(0, batch.masked), self.dropout_features.p, self.training)  # (P, C)
        logits = _full(linear(self.quantizer.weight_proj, masked))  # (P, G · V)
        return logits.unflatten(-1, (self.quantizer.num_groups, self.quantizer.num_vars))

    def _contrast(self, context, quantized, codes, batch: PretrainBatch) -> torch.Tensor:
        """The sums of `objective.contrastive_loss` over all utterances, (4,): from context and quantized (P, D), codes (P, G)."""
        sums = []
        for rows, places, valid in batch.masked_groups():  # (b, M)
            counts = batch.masked_rows.frames[rows]
            drawn = distractors(batch.keys[rows], counts, valid.shape[1], self.config.num_negatives)
            own = (x.index_select(0, places.flatten()).unflatten(0, places.shape) for x in (context, quantized, codes))
            temperature = self.config.contrastive_logits_temperature
            sums.append(torch.stack(objective.contrastive_loss(*own, drawn, valid, temperature)))
        return torch.stack(sums).sum(0)

    def _context(self, normed: torch.Tensor, batch: PretrainBatch) -> torch.Tensor:
        """Transformer over the masked sequence: (P, D), the context of the masked frames. Others are not needed."""
        encoder, projection = self.wav2vec2.encoder, self.wav2vec2.feature_projection

        # 1. Project and mask: (N, C) -> (N, D). Masked frames that are only filled up with lie in a gap.
        hidden = dropout(linear(projection.projection, normed), projection.dropout.p, self.training)
        embedding = self.wav2vec2.masked_spec_embed.to(hidden.dtype).expand(len(batch.masked), -1)  # (P, D)
        hidden = hidden.index_copy(0, batch.masked, embedding)
        hidden = torch.where(batch.rows.inside[:, None], hidden, 0.0)

        # 2. Positions.
        hidden = hidden + positional(encoder.pos_conv_embed, hidden, batch.rows, self.positional_in_blocks)

        # 3. The layers. The last one gives (P, D).
        pre_norm = self.config.do_stable_layer_norm
        hidden = _full(hidden) if pre_norm else norm(encoder.layer_norm, hidden)
        hidden = dropout(hidden, encoder.dropout.p, self.training)
        for index, module in enumerate(encoder.layers):
            hidden = self._layer(module, hidden, batch, index, normed.dtype)
        return norm(encoder.layer_norm, hidden) if pre_norm else hidden

    def _layer(self, module, hidden: torch.Tensor, batch: PretrainBatch, index: int, dtype) -> torch.Tensor:
        """One layer, for the utterances that layerdrop leaves it: (N, D) → (N, D). The last gives the masked frames (P, D)."""
        rows, row = batch.rows, batch.rows.row
        kept = batch.kept[index] if self.training and self.config.layerdrop > 0 else None  # (B,)

        def run(x, rows, asked=None):
            return self._stage("encoder", layer, module, x, rows, dtype, self._after_attention, asked)

        # 1. The last layer's other frames are not needed.
        if index == self.config.num_hidden_layers - 1:
            out = run(hidden, rows, (batch.masked, batch.masked_rows))
            row, hidden = batch.masked_rows.row, hidden.index_select(0, batch.masked)
        # 2. A CPU computes a layer for those utterances alone.
        elif kept is not None and skips_rows(hidden) and kept.any():
            slots = kept[row].nonzero()[:, 0]
            return hidden.index_copy(0, slots, run(hidden.index_select(0, slots), rows.choose(kept)))
        else:
            out = run(hidden, rows)
        # 3. Elsewhere it is computed for all. So shapes stay the same, and every parameter has a gradient.
        return out if kept is None else torch.where(kept[row][:, None], out, hidden)


def _full(x: torch.Tensor) -> torch.Tensor:
    """At least float32: the loss is computed in full precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def build_model(args, config: Wav2Vec2Config, checkpoint: Path | None = None) -> PretrainingModel:
    """Model to pretrain: from a checkpoint, from `model_name_or_path`, or with random weights."""
    source = str(checkpoint) if checkpoint else args.model_name_or_path
    model = load_weights(PretrainingModel, source, config) if source else make_model(PretrainingModel, config)
    if args.freeze_feature_encoder:
        refuse((not source, "--freeze_feature_encoder would keep random convs: give weights with --model_name_or_path"))
        model.freeze_feature_encoder()
    model.feature_grad_mult = args.feature_grad_mult
    model.feature_penalty_weight = args.feature_penalty_weight
    if args.gradient_checkpointing:
        model.recomputed = frozenset(args.gradient_checkpointing_stages)
    model.positional_in_blocks = {"auto": None, "blocks": True, "stock": False}[args.positional_conv]
    if args.torch_compile:
        model._after_attention = torch.compile(after_attention, dynamic=True)  # one graph serves all shapes
    if args.fused_kernels:
        from w2v2.model.fused import fuse  # needs triton

        fuse(model)
    return model.train()
