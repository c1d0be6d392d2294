"""A pretraining model that computes with the Triton kernels of `kernels.py`, where they take what they are given."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from w2v2.errors import UserError
from w2v2.model import transformer
from w2v2.model.cpu import dropout
from w2v2.model.kernels import Dropout, add_dropped, available, gelu


class Gelu(nn.Module):
    """Takes the place of a stock activation that has no product's bias before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gelu(x) if available(x) else F.gelu(x)


def after_attention(module: nn.Module, hidden: torch.Tensor, attended: torch.Tensor, before: bool) -> torch.Tensor:
    """`transformer.after_attention` in fewer kernels: (N, D) → (N, D)."""
    if not available(attended):
        return transformer.after_attention(module, hidden, attended, before)
    forward, output, training = module.feed_forward, module.attention.out_proj, module.training
    first, last = (module.final_layer_norm, None) if before else (module.layer_norm, module.final_layer_norm)
    seeds = torch.empty(2, 2, dtype=torch.int64, device=attended.device).random_()  # rows of 16 bytes are aligned alike
    sites = module.dropout, forward.output_dropout
    drops = [Dropout(site.p if training else 0.0, seed) for site, seed in zip(sites, seeds, strict=True)]
    hidden, x = add_dropped(_product(output, attended), output.bias, hidden, drops[0], first)
    residual = hidden if before else x
    x = gelu(_product(forward.intermediate_dense, x), forward.intermediate_dense.bias)
    x = _product(forward.output_dense, dropout(x, forward.intermediate_dropout.p, training))
    hidden, x = add_dropped(x, forward.output_dense.bias, residual, drops[1], last)
    if not before:
        return x
    return hidden if module.adapter_layer is None else hidden + module.adapter_layer(hidden)


def _product(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear layer without its bias, which the next kernel adds."""
    return F.linear(x, module.weight.to(x.dtype))


def fuse(model: PreTrainedModel) -> None:
    """Let a `PretrainingModel` compute with the kernels. Raises `UserError` where its activations are others."""
    for key in ("hidden_act", "feat_extract_activation"):
        found = getattr(model.config, key)
        if found != "gelu":
            raise UserError(f"--fused_kernels computes gelu, and the model's {key} is {found}: leave the flag out")
    model._after_attention = after_attention
    base = model.wav2vec2
    for layer in (*base.feature_extractor.conv_layers, base.encoder.pos_conv_embed):
        layer.activation = Gelu()
