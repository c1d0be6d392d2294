"""The model to pretrain, and what belongs to it: fresh, from given weights, or from a checkpoint."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.utils import logging as transformers_logging

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.collate import Framing
from w2v2.errors import UserError
from w2v2.model.backbone import (
    building,
    first_line,
    load_config,
    load_feature_extractor,
    locate,
    refuse_pickles,
    why_not_loaded,
)
from w2v2.model.dimensions import check_dimensions
from w2v2.model.pretraining import PretrainingModel

# Whatever differs here cannot take over weights.
ARCHITECTURE = (
    "conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm", "feat_extract_activation", "hidden_size",
    "hidden_act", "num_hidden_layers", "num_attention_heads", "intermediate_size", "do_stable_layer_norm",
    "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "num_codevector_groups", "num_codevectors_per_group",
    "codevector_dim", "proj_codevector_dim",
)  # fmt: skip


FLAGS = (
    "mask_time_prob",
    "mask_time_length",
    "mask_time_min_masks",
    "diversity_loss_weight",
)  # keys that are flags here


def override(config: Wav2Vec2Config, overrides: str) -> None:
    """Apply `key=value,…` in place. Raises `UserError` for an unknown key or a value of another kind."""
    for pair in overrides.split(","):
        key, separator, text = pair.partition("=")
        key, text = key.strip(), text.strip()
        if key in FLAGS:
            raise UserError(f"--config_overrides {pair!r}: use the flag --{key}, which would overrule it")
        if not separator or key not in Wav2Vec2Config().to_dict():
            raise UserError(
                f"--config_overrides {pair!r}: {key!r} is no key of Wav2Vec2Config (write key=value,key=value)"
            )
        old = getattr(config, key)
        if not isinstance(old, bool | int | float | str | None):
            raise UserError(f"--config_overrides {pair!r}: {key} is a {type(old).__name__}: change it in a config.json")
        try:
            if isinstance(old, bool):
                value = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            else:
                value = text if old is None else type(old)(text)
        except (KeyError, ValueError, TypeError):
            raise UserError(f"--config_overrides {pair!r}: {key} takes a {type(old).__name__}") from None
        try:
            setattr(config, key, value)
        except (ValueError, TypeError) as error:
            raise UserError(f"--config_overrides {pair!r}: {first_line(error)}") from None


def build_config(args) -> Wav2Vec2Config:
    """The run's configuration: its source, the overrides, and the flags that concern the objective, all of which end up in config.json."""
    config = load_config(args.model_name_or_path, args.config_name or "base")
    if args.config_overrides:
        override(config, args.config_overrides)
        check_dimensions(config, f"--config_overrides {args.config_overrides}")
    for name in FLAGS[:3]:
        setattr(config, name, getattr(args, name))
    if args.diversity_loss_weight is not None:
        config.diversity_loss_weight = args.diversity_loss_weight
    return config


def check_same_architecture(config: Wav2Vec2Config, checkpoint: Path) -> None:
    """Raises `UserError` naming the first difference."""
    saved = load_config(str(checkpoint), None)
    for key in ARCHITECTURE:
        ours, theirs = getattr(config, key), getattr(saved, key)
        if (list(ours) if isinstance(ours, list | tuple) else ours) != (
            list(theirs) if isinstance(theirs, list | tuple) else theirs
        ):
            raise UserError(
                f"checkpoint {checkpoint} is of another architecture: its {key} is {theirs}, this run's is {ours}; resume with the "
                "run's own configuration"
            )


def build_model(args, config: Wav2Vec2Config, checkpoint: Path | None = None) -> PretrainingModel:
    """Model from a checkpoint, from `model_name_or_path`, or with random weights.

    Raises `UserError` when weights are missing or have another shape.
    """
    source = str(checkpoint) if checkpoint else args.model_name_or_path
    if source is None:
        with building(config.name_or_path):
            model = PretrainingModel._from_config(config, attn_implementation="sdpa")
    else:
        model = _load_weights(locate(source), config)
    model.feature_grad_mult = args.feature_grad_mult
    model.feature_penalty_weight = args.feature_penalty_weight
    if args.gradient_checkpointing:
        model.recomputed = frozenset(args.gradient_checkpointing_stages)
    if args.positional_conv != "auto":
        model.positional_in_blocks = args.positional_conv == "blocks"
    if args.torch_compile:
        model.compile_layers()
    return model.train()


def _load_weights(source: str, config: Wav2Vec2Config) -> PretrainingModel:
    refuse_pickles(source)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what matters of its report becomes our error below
    try:
        model, report = PretrainingModel.from_pretrained(
            source, config=config, use_safetensors=True, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = why_not_loaded(source, error)
        raise UserError(f"{source}: weights cannot be loaded ({reason}): give a folder that holds them whole") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    for problem in ("mismatched_keys", "missing_keys"):
        if report[problem]:
            key = sorted(map(str, report[problem]))[0]
            raise UserError(
                f"{source} is of another architecture: {len(report[problem])} {problem.replace('_', ' ')}, the first is {key}; it has "
                "to be a Wav2Vec2ForPreTraining folder, quantizer included, that fits the configuration"
            )
    return model


def build_feature_extractor(args, config: Wav2Vec2Config) -> Wav2Vec2FeatureExtractor:
    """That of the run's source, or the one that `config` implies: LARGE normalises the waveform, BASE does not."""
    return load_feature_extractor(args.model_name_or_path or args.config_name or "base", config)


def build_framing(config: Wav2Vec2Config, feature_extractor: Wav2Vec2FeatureExtractor) -> Framing:
    """What the data has to know of the model."""
    return Framing(
        kernels=tuple(config.conv_kernel),
        strides=tuple(config.conv_stride),
        mask_prob=config.mask_time_prob,
        mask_length=config.mask_time_length,
        min_masks=config.mask_time_min_masks,
        num_layers=config.num_hidden_layers,
        layerdrop=config.layerdrop,
        sampling_rate=SAMPLING_RATE,
        normalize=bool(feature_extractor.do_normalize),
    )
