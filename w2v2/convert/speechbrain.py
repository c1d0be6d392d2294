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
    (r"model\.(.*)\.weight_g", r"\1.parametrizations.weight.original0"),
    (r"model\.(.*)\.weight_v", r"\1.parametrizations.weight.original1"),
    (r"model\.(.*)", r"\1"),
)

_LAYER = r"latent_encoder\.latent_encoder\.layers\.(\d+)\."
# Its own architecture: the recoverable's name (a file each), then its keys; attention is split beforehand.
OWN_KEYS = (
    (r"latent_extractor\.extractor\.convblock_(\d+)\.convs\.conv_0\.conv\.(\w+)", CONV + r"\1.conv.\2"),
    (r"latent_extractor\.extractor\.convblock_(\d+)\.convs\.norm_0\.norm\.(\w+)", CONV + r"\1.layer_norm.\2"),
    (r"latent_extractor\.norm\.(\w+)", r"wav2vec2.feature_projection.layer_norm.\1"),
    (r"latent_encoder\.input_projector\.(\w+)", r"wav2vec2.feature_projection.projection.\1"),
    (r"latent_encoder\.mask_emb", r"wav2vec2.masked_spec_embed"),
    (_LAYER + r"self_att\.att\.([qkv]_proj|out_proj)\.(\w+)", LAYER + r"attention.\2.\3"),
    (_LAYER + r"norm1\.norm\.(\w+)", LAYER + r"layer_norm.\2"),
    (_LAYER + r"norm2\.norm\.(\w+)", LAYER + r"final_layer_norm.\2"),
    (_LAYER + r"pos_ffn\.ffn\.0\.(\w+)", LAYER + r"feed_forward.intermediate_dense.\2"),
    (_LAYER + r"pos_ffn\.ffn\.3\.(\w+)", LAYER + r"feed_forward.output_dense.\2"),
    (r"latent_encoder\.latent_encoder\.norm\.norm\.(\w+)", r"wav2vec2.encoder.layer_norm.\1"),
    (r"target_quantiser\.quantiser\.vars", r"quantizer.codevectors"),
    (r"target_quantiser\.quantiser\.weight_proj\.(\w+)", r"quantizer.weight_proj.\1"),
    (r"target_quantiser\.proj\.(\w+)", r"project_q.\1"),
    (r"feat_proj\.(\w+)", r"project_hid.\1"),
)
_OWN_FILES = ("latent_extractor", "latent_encoder", "target_quantiser", "feat_proj")
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
    for name in _OWN_FILES:
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
        convs = [weights[f"{CONV}{i}.conv.weight"] for i in range(len(conv_stride))]
        hidden, intermediate = weights["wav2vec2.encoder.layers.0.feed_forward.output_dense.weight"].shape
        codes, code_width = weights["quantizer.codevectors"].shape[1:]
        projected, codevector_dim = weights["project_q.weight"].shape
        groups = codevector_dim // code_width
        return Wav2Vec2Config(
            feat_extract_norm="layer",
            conv_bias=f"{CONV}0.conv.bias" in weights,
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
        raise UserError(f"{folder}: no wav2vec 2.0 of SpeechBrain's: {error} does not fit these strides") from None
