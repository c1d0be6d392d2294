"""SpeechBrain's pretraining checkpoints: the stock model under names of its own, and an architecture of its own.

The latter (speechbrain/lobes/models/wav2vec.py) adds sinusoidal positions to the transformer's input, where the stock
one adds the output of a convolution. No weights make these equal.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

from w2v2.convert.weights import CONV, LAYER, feature_extractor, fill_stock, read_weights, rename
from w2v2.errors import UserError
from w2v2.model.loading import load_config, make_model

# The interface to the stock model: its own attribute in front, and weight norm as torch named it before 2.0.
INTERFACE_KEYS = (
    ("model.{}.weight_g", "{}.parametrizations.weight.original0"),
    ("model.{}.weight_v", "{}.parametrizations.weight.original1"),
    ("model.{}", "{}"),
)

_LAYER = "latent_encoder.latent_encoder.layers.{}."
# Its own architecture: the recoverable's name (a file each), then its keys; attention is split beforehand.
OWN_KEYS = (
    ("latent_extractor.extractor.convblock_{}.convs.conv_0.conv.{}", CONV + "conv.{}"),
    ("latent_extractor.extractor.convblock_{}.convs.norm_0.norm.{}", CONV + "layer_norm.{}"),
    ("latent_extractor.norm.{}", "wav2vec2.feature_projection.layer_norm.{}"),
    ("latent_encoder.input_projector.{}", "wav2vec2.feature_projection.projection.{}"),
    ("latent_encoder.mask_emb", "wav2vec2.masked_spec_embed"),
    (_LAYER + "self_att.att.{}.{}", LAYER + "attention.{}.{}"),
    (_LAYER + "norm1.norm.{}", LAYER + "layer_norm.{}"),
    (_LAYER + "norm2.norm.{}", LAYER + "final_layer_norm.{}"),
    (_LAYER + "pos_ffn.ffn.0.{}", LAYER + "feed_forward.intermediate_dense.{}"),
    (_LAYER + "pos_ffn.ffn.3.{}", LAYER + "feed_forward.output_dense.{}"),
    ("latent_encoder.latent_encoder.norm.norm.{}", "wav2vec2.encoder.layer_norm.{}"),
    ("target_quantiser.quantiser.vars", "quantizer.codevectors"),
    ("target_quantiser.quantiser.weight_proj.{}", "quantizer.weight_proj.{}"),
    ("target_quantiser.proj.{}", "project_q.{}"),
    ("feat_proj.{}", "project_hid.{}"),
)
OWN_FILES = ("latent_extractor", "latent_encoder", "target_quantiser", "feat_proj")
_NOT_WEIGHTS = ("latent_encoder.positional_encoding.pe", "target_quantiser.quantiser.max_ent")


def convert_speechbrain(path: Path, config_name: str) -> tuple[Wav2Vec2ForPreTraining, Wav2Vec2FeatureExtractor]:
    """The model that SpeechBrain pretrained through transformers: a `CKPT+…` folder or its `wav2vec2.ckpt`.

    `config_name` has the architecture that the recipe named (`wav2vec2_hub`). Raises UserError for another checkpoint.
    """
    if path.is_dir():
        if (path / "latent_encoder.ckpt").exists():
            raise UserError(
                f"{path}: SpeechBrain's own wav2vec 2.0 (latent_encoder.ckpt) has sinusoidal positions, the stock model a "
                "convolution; --without_positions takes over everything else, for further pretraining"
            )
        path = path / "wav2vec2.ckpt"
    config = load_config(None, config_name)
    model = fill_stock(config, rename(read_weights(path), INTERFACE_KEYS, path), path)
    return model, feature_extractor(config, True)


def convert_without_positions(
    folder: Path, num_attention_heads: int, conv_stride: Sequence[int]
) -> tuple[Wav2Vec2ForPreTraining, Wav2Vec2FeatureExtractor]:
    """SpeechBrain's own architecture but for its positions: convs, transformer, quantizer and projections as they are.

    The stock positional convolution starts at zero and has to learn. Heads and strides are the recipe's (`nhead`,
    `latentextractor_strides`): the weights do not show them.
    """
    # 1. One file a module; their keys get the stock names.
    weights = {}
    for name in OWN_FILES:
        weights |= {f"{name}.{key}": tensor for key, tensor in read_weights(folder / f"{name}.ckpt").items()}
    for key in [key for key in weights if "in_proj_" in key]:  # (3 × D, …): queries, keys and values
        parts = zip("qkv", weights.pop(key).chunk(3), strict=True)
        weights |= {key.replace("in_proj_", f"{part}_proj."): tensor.contiguous() for part, tensor in parts}
    weights = {key: tensor for key, tensor in weights.items() if key not in _NOT_WEIGHTS}
    renamed = rename(weights, OWN_KEYS, folder)

    # 2. The shapes tell the architecture. Its positional convolution gets random directions; norm and bias are zero.
    config = _own_config(renamed, num_attention_heads, conv_stride, folder)
    positions = make_model(Wav2Vec2ForPreTraining, config).state_dict()
    for key, tensor in positions.items():
        if key.startswith("wav2vec2.encoder.pos_conv_embed."):
            renamed[key] = tensor if key.endswith("original1") else torch.zeros_like(tensor)
    return fill_stock(config, renamed, folder), feature_extractor(config, True)


def _own_config(
    weights: Mapping[str, torch.Tensor], num_attention_heads: int, conv_stride: Sequence[int], folder: Path
) -> Wav2Vec2Config:
    """What the shapes tell. SpeechBrain's recipe norms first, with an epsilon of 1e-6 in the transformer."""
    try:
        convs = [weights[CONV.format(i) + "conv.weight"] for i in range(len(conv_stride))]
        hidden, intermediate = weights["wav2vec2.encoder.layers.0.feed_forward.output_dense.weight"].shape
        codes, code_width = weights["quantizer.codevectors"].shape[1:]
        projected, codevector_dim = weights["project_q.weight"].shape
        groups = codevector_dim // code_width
        return Wav2Vec2Config(
            feat_extract_norm="layer",
            conv_bias=CONV.format(0) + "conv.bias" in weights,
            conv_dim=[conv.shape[0] for conv in convs],
            conv_kernel=[conv.shape[2] for conv in convs],
            conv_stride=list(conv_stride),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=sum(key.endswith("attention.q_proj.weight") for key in weights),
            num_attention_heads=num_attention_heads,
            do_stable_layer_norm=True,
            layer_norm_eps=1e-6,
            num_codevector_groups=groups,
            num_codevectors_per_group=codes // groups,
            codevector_dim=codevector_dim,
            proj_codevector_dim=projected,
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}: not SpeechBrain's wav2vec 2.0, or other --conv_stride than its recipe's ({error})"
        ) from None
