"""fairseq's wav2vec 2.0 (fairseq/models/wav2vec/wav2vec2.py): its names, its options, and the stock model of them."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.convert.weights import CONV, LAYER, feature_extractor, fill_stock, read_weights, rename
from w2v2.errors import UserError
from w2v2.model.loading import MASK_EMBEDDING, load_config, load_feature_extractor, load_weights

_LAYER = "encoder.layers.{}."
_POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv."

# fairseq's names and ours, for both directions.
FAIRSEQ_NAMES = (
    ("mask_emb", MASK_EMBEDDING),
    ("feature_extractor.conv_layers.{}.0.{}", CONV + "conv.{}"),
    ("feature_extractor.conv_layers.{}.2.1.{}", CONV + "layer_norm.{}"),  # a layer norm, between two transpositions
    ("feature_extractor.conv_layers.{}.2.{}", CONV + "layer_norm.{}"),  # a group norm
    ("layer_norm.{}", "wav2vec2.feature_projection.layer_norm.{}"),
    ("post_extract_proj.{}", "wav2vec2.feature_projection.projection.{}"),
    ("encoder.pos_conv.0.weight_g", _POSITIONS + "parametrizations.weight.original0"),
    ("encoder.pos_conv.0.weight_v", _POSITIONS + "parametrizations.weight.original1"),
    ("encoder.pos_conv.0.bias", _POSITIONS + "bias"),
    (_LAYER + "self_attn.{}.{}", LAYER + "attention.{}.{}"),
    (_LAYER + "self_attn_layer_norm.{}", LAYER + "layer_norm.{}"),
    (_LAYER + "fc1.{}", LAYER + "feed_forward.intermediate_dense.{}"),
    (_LAYER + "fc2.{}", LAYER + "feed_forward.output_dense.{}"),
    (_LAYER + "final_layer_norm.{}", LAYER + "final_layer_norm.{}"),
    ("encoder.layer_norm.{}", "wav2vec2.encoder.layer_norm.{}"),
    ("quantizer.vars", "quantizer.codevectors"),
    ("quantizer.weight_proj.{}", "quantizer.weight_proj.{}"),
    ("project_q.{}", "project_q.{}"),
    ("final_proj.{}", "project_hid.{}"),
)

# Key of Wav2Vec2Config: fairseq's option, and fairseq's default.
_FAIRSEQ_OPTIONS = {
    "conv_bias": ("conv_bias", False),
    "hidden_size": ("encoder_embed_dim", 768),
    "num_hidden_layers": ("encoder_layers", 12),
    "intermediate_size": ("encoder_ffn_embed_dim", 3072),
    "num_attention_heads": ("encoder_attention_heads", 12),
    "hidden_act": ("activation_fn", "gelu"),
    "do_stable_layer_norm": ("layer_norm_first", False),
    "num_conv_pos_embeddings": ("conv_pos", 128),
    "num_conv_pos_embedding_groups": ("conv_pos_groups", 16),
    "num_codevectors_per_group": ("latent_vars", 320),
    "num_codevector_groups": ("latent_groups", 2),
    "hidden_dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "feat_proj_dropout": ("dropout_input", 0.0),
    "feat_quantizer_dropout": ("dropout_features", 0.0),
    "layerdrop": ("encoder_layerdrop", 0.0),
    "num_negatives": ("num_negatives", 100),
    "contrastive_logits_temperature": ("logit_temp", 0.1),
}

# Options that the stock model has a counterpart of for some values only: fairseq's default, and these values.
_FAIRSEQ_LIMITED = {
    "quantize_targets": (False, (True,)),
    "quantize_input": (False, (False,)),
    "target_glu": (False, (False,)),
    "quantizer_depth": (1, (1,)),
    "pos_conv_depth": (1, (1,)),
    "layer_type": ("transformer", ("transformer",)),
    "activation_fn": ("gelu", ("gelu", "relu")),
    "extractor_mode": ("default", ("default", "layer_norm")),
}

# Keys of Wav2Vec2Config that fairseq has no option for: the values that its code computes with.
_FAIRSEQ_FIXED = {
    "feat_extract_activation": ("gelu",),
    "hidden_act": ("gelu", "relu"),
    "layer_norm_eps": (1e-5,),
    "add_adapter": (False,),
}

_CONV_TERM = r"\[(?:\(\d+,\d+,\d+\),?)+\](?:\*\d{1,2})?"


def convert_fairseq(path: Path) -> tuple[Wav2Vec2ForPreTraining, Wav2Vec2FeatureExtractor]:
    """The model of a pretraining checkpoint (`.pt`). Raises UserError for any other, or what stock cannot hold."""
    checkpoint = read_weights(path)
    weights = checkpoint.get("model")
    if not isinstance(weights, Mapping):
        raise UserError(f"{path}: not a fairseq checkpoint, as it has no `model`: give the .pt file that fairseq saved")
    if any(key.startswith("w2v_encoder.") for key in weights):
        raise UserError(f"{path}: a fine-tuned model, whose quantizer is gone: give the pretraining checkpoint")
    # Options in one flat dictionary, from `cfg` (0.10.2 and later) or `args`; the model's own win.
    options: dict[str, Any] = {}
    cfg = checkpoint.get("cfg") or {}
    for part in (checkpoint.get("args"), cfg.get("task"), cfg.get("criterion"), cfg.get("model")):
        options |= vars(part) if isinstance(part, argparse.Namespace) else part or {}
    config = fairseq_config(options, path)
    normalize = bool(options.get("normalize", config.feat_extract_norm == "layer"))
    model = fill_stock(config, rename(weights, FAIRSEQ_NAMES, path), path)
    return model, feature_extractor(config, normalize)


def fairseq_config(options: Mapping[str, Any], path: Path) -> Wav2Vec2Config:
    """The stock configuration of the same model. Raises UserError for an option without a counterpart."""
    for name, (default, known) in _FAIRSEQ_LIMITED.items():
        if (found := options.get(name, default)) not in known:
            raise UserError(
                f"{path}: made with {name}={found}: the stock model has no counterpart, so it cannot be converted"
            )
    values = {key: options.get(name, default) for key, (name, default) in _FAIRSEQ_OPTIONS.items()}
    width = options.get("final_dim") or values["hidden_size"]
    if weights := options.get("loss_weights"):
        values["diversity_loss_weight"] = float(weights[0])  # its criterion weighs the feature penalty second
    convs = zip(*conv_layers(options.get("conv_feature_layers"), path), strict=True)
    values |= zip(("conv_dim", "conv_kernel", "conv_stride"), map(list, convs), strict=True)
    return Wav2Vec2Config(
        **values,
        feat_extract_norm="layer" if options.get("extractor_mode") == "layer_norm" else "group",
        proj_codevector_dim=width,
        codevector_dim=options.get("latent_dim") or width,
    )


def conv_layers(text: str | None, path: Path) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each conv, read from fairseq's Python: `[(512, 10, 5)] + [(512, 3, 2)] * 4`."""
    compact = re.sub(r"\s", "", text) if isinstance(text, str) else ""
    if not re.fullmatch(rf"{_CONV_TERM}(\+{_CONV_TERM})*", compact):
        raise UserError(f"{path}: conv_feature_layers {text!r} is not a list of (channels, kernel, stride)")
    layers = []
    for triples, times in re.findall(r"\[([^]]*)\](?:\*(\d+))?", compact):
        layers += [tuple(map(int, triple)) for triple in re.findall(r"(\d+),(\d+),(\d+)", triples)] * int(times or 1)
    return layers


def export_fairseq(folder: Path) -> dict[str, Any]:
    """What `torch.save` writes as fairseq's checkpoint of a pretrained folder: plain dictionaries and tensors.

    Raises UserError for a folder of another kind, or a model that fairseq's code cannot compute.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json: --to fairseq takes a folder that pretrain.py wrote")
    config = load_config(None, str(folder))
    if not config.mask_time_prob and not config.mask_feature_prob:
        raise UserError(f"{folder}: mask_time_prob is 0, so the model has no mask embedding; fairseq's model needs one")
    options = _export_options(config, folder)
    model = load_weights(Wav2Vec2ForPreTraining, str(folder), config)
    has_layer_norm = config.feat_extract_norm == "layer"
    names = [(ours, theirs) for theirs, ours in FAIRSEQ_NAMES if has_layer_norm or ".2.1." not in theirs]
    normalize = bool(load_feature_extractor(str(folder), config).do_normalize)
    cfg = {
        "common": {"tpu": False},
        "task": {"_name": "audio_pretraining", "data": "", "sample_rate": SAMPLING_RATE, "normalize": normalize},
        "model": {"_name": "wav2vec2", **options},
        "criterion": {"_name": "wav2vec", "infonce": True, "loss_weights": [config.diversity_loss_weight, 10.0]},
        "lr_scheduler": None,  # its fine-tuning sets this key, so it has to be there
    }
    history = {"criterion_name": "Wav2vecCriterion", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    return {
        "args": None,
        "cfg": cfg,
        "model": rename(model.state_dict(), names, folder),
        "extra_state": {},
        "optimizer_history": [history | {"num_updates": 0}],
    }


def _export_options(config: Wav2Vec2Config, folder: Path) -> dict[str, Any]:
    """fairseq's options of the same model. Raises UserError for a key whose value fairseq has no counterpart of."""
    for name, known in _FAIRSEQ_FIXED.items():
        if (found := getattr(config, name)) not in known:
            raise UserError(f"{folder}: {name} is {found}; fairseq's model has {' or '.join(map(str, known))}")
    if config.conv_dim[-1] == config.hidden_size:
        raise UserError(
            f"{folder}: convs and transformer are equally wide; fairseq's model then has no place for the projection"
        )
    options = {name: getattr(config, key) for key, (name, _) in _FAIRSEQ_OPTIONS.items()}
    convs = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    return options | {
        "quantize_targets": True,
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "conv_feature_layers": str(list(convs)),
        "final_dim": config.proj_codevector_dim,
        "latent_dim": config.codevector_dim,
    }
