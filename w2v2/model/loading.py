"""Weights and feature extractors: fresh, or from a folder, the Hub or a checkpoint. Stock weights go in and out.

Weights that do not fit their configuration raise `UserError`, and so does a pickle.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.utils import logging as transformers_logging

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.collate import Framing
from w2v2.errors import UserError
from w2v2.model.config import first_line, locate
from w2v2.model.pretraining import PretrainingModel

# Without it transformers may load, in place of a Hub repository's weights, those of a stranger's pull request to it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MASK_EMBEDDING = "wav2vec2.masked_spec_embed"  # a model that masks nothing has none


def build_model(args, config: Wav2Vec2Config, checkpoint: Path | None = None) -> PretrainingModel:
    """Model to pretrain: from a checkpoint, from `model_name_or_path`, or with random weights."""
    source = str(checkpoint) if checkpoint else args.model_name_or_path
    model = load_weights(PretrainingModel, source, config) if source else make_model(PretrainingModel, config)
    model.feature_grad_mult = args.feature_grad_mult
    model.feature_penalty_weight = args.feature_penalty_weight
    if args.gradient_checkpointing:
        model.recomputed = frozenset(args.gradient_checkpointing_stages)
    if args.positional_conv != "auto":
        model.positional_in_blocks = args.positional_conv == "blocks"
    if args.torch_compile:
        model.compile_layers()
    return model.train()


def load_with_head(
    model_class: type[PreTrainedModel], source: str | None, config: Wav2Vec2Config, head: tuple[str, ...]
) -> PreTrainedModel:
    """`model_class` with pretrained weights below and a new, random head, or all random where `source` is None.

    The quantizer and projections of pretraining are left behind.

    Args:
        head: what is new, even if the folder was fine-tuned before. Modules get their values here. A single parameter
            may be missing, and is the caller's to fill.
    """
    if source is None:
        return make_model(model_class, config)
    model = load_weights(model_class, source, config, head)
    for module in (module for name, module in model.named_modules() if name in head):
        nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.zeros_(module.bias)
    return model


def make_model(model_class: type[PreTrainedModel], config: Wav2Vec2Config) -> PreTrainedModel:
    """A model of random weights. Raises UserError for an activation, norm or dropout that does not exist."""
    try:
        return model_class(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{config.name_or_path}: its config.json makes no model ({first_line(error)}): mend it"
        ) from None


def load_weights(
    model_class: type[PreTrainedModel], source: str, config: Wav2Vec2Config, head: tuple[str, ...] | None = None
) -> PreTrainedModel:
    """Model with the weights in `source`, which have to fit `config`: any key that does not raises `UserError`.

    Args:
        head: beginnings of keys that may be missing or of another shape. Without a head the model is one to pretrain,
            and may take over some of the layers.
    """
    folder = locate(source)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of keys becomes our error below
    transformers_logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{source}: weights cannot be loaded ({_explain(folder, error)})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)

    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]}
    left = set() if head is None else {key for key in report["unexpected_keys"] if key.startswith("wav2vec2.")}
    hint = "; a whole Wav2Vec2ForPreTraining folder, quantizer included, is needed" if head is None else ""
    optional = () if head is None else (*head, MASK_EMBEDDING)
    problems = {"lacks": report["missing_keys"], "has another shape for": mismatched, "has no place for": left}
    for problem, keys in problems.items():
        if keys := sorted(key for key in keys if not key.startswith(optional)):
            what = f"{problem} {len(keys)} weights, such as {keys[0]}"
            raise UserError(f"{source} is of another architecture than the configuration: it {what}{hint}")
    return model


def _explain(folder: str, error: BaseException) -> str:
    """The error's first line, and where there are no safetensors, what to do about a pickle."""
    if any(Path(folder).glob("*.safetensors")):
        return first_line(error)
    pickles = sorted(path.name for path in Path(folder).glob("*") if path.suffix in PICKLES)
    return (
        f"{first_line(error)}; only safetensors are loaded, because a pickle ({(pickles or ['pytorch_model.bin'])[0]}) "
        "can run programs: docs/security.md has the lines that convert one"
    )


def build_feature_extractor(args, config: Wav2Vec2Config) -> Wav2Vec2FeatureExtractor:
    """That of the run's source, or the one that `config` implies: LARGE normalises the waveform, BASE does not."""
    return load_feature_extractor(args.model_name_or_path or args.config_name or "base", config)


def load_feature_extractor(source: str | None, config: PretrainedConfig) -> Wav2Vec2FeatureExtractor:
    """The folder's own feature extractor (whether to normalise the waveform), else the one that `config` implies."""
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(locate(source))
    except (OSError, ValueError, TypeError, AttributeError):
        norm = config.feat_extract_norm == "layer"
        return Wav2Vec2FeatureExtractor(sampling_rate=SAMPLING_RATE, do_normalize=norm, return_attention_mask=norm)
    if extractor.sampling_rate != SAMPLING_RATE:
        raise UserError(f"{source}: made for {extractor.sampling_rate} Hz; this program feeds {SAMPLING_RATE} Hz")
    return extractor


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
