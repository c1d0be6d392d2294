"""What a model is made of: configuration, weights and feature extractor, from a folder, the Hub or `configs/models`.

Stock weights go in and out. Whatever a user or a stranger's folder can get wrong raises a `UserError` of one line.
"""

import json
import os
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.utils import logging as transformers_logging

import w2v2
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError, did_you_mean

# Without it transformers may load, in place of a Hub repository's weights, those of a stranger's pull request to it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

MODELS = w2v2.ROOT / "configs" / "models"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MASK_EMBEDDING = "wav2vec2.masked_spec_embed"  # a model that masks nothing has none
CONVS = ("conv_dim", "conv_kernel", "conv_stride")  # lists, of one number a conv
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups", "num_codevector_groups", "num_codevectors_per_group", "codevector_dim",
    "proj_codevector_dim", "num_negatives",
)  # fmt: skip
DIVISORS = {
    "num_attention_heads": "hidden_size",
    "num_conv_pos_embedding_groups": "hidden_size",
    "num_codevector_groups": "codevector_dim",
}
# Weights fit only where all of these are equal.
ARCHITECTURE = (
    *CONVS, "conv_bias", "feat_extract_norm", "feat_extract_activation", "hidden_act", "do_stable_layer_norm", *SIZES[:-1]
)  # fmt: skip
MASKING_FLAGS = ("mask_time_prob", "mask_time_length", "mask_time_min_masks")
# Ranges of keys that pretraining computes; and keys that it does not, with the value they need and the reason.
RANGES = {f"{name}_dropout": (0.0, 1.0) for name in "hidden attention activation feat_proj feat_quantizer".split()}
RANGES |= dict(layerdrop=(0.0, 1.0), layer_norm_eps=(0.0, 1.0))
RANGES |= dict(contrastive_logits_temperature=(1e-3, 1e3), diversity_loss_weight=(0.0, 1e3))
NOT_COMPUTED = {
    "add_adapter": (False, "it has no adapters after the transformer"),
    "mask_feature_prob": (0, "it masks frames, no channels"),
    "apply_spec_augment": (True, "it always masks"),
}


def locate(name: str) -> str:
    """A folder itself, the folder of a name in `configs/models` (with or without that prefix), or else a Hub id."""
    folders = (Path(name), MODELS / name, w2v2.ROOT / name)
    return next((str(folder) for folder in folders if (folder / "config.json").is_file()), name)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_config(model_name_or_path: str | None, config_name: str | None, **changes) -> Wav2Vec2Config:
    """Configuration of the pretrained model, or of the random one, with `changes`."""
    flag, source = ("model_name_or_path", model_name_or_path) if model_name_or_path else ("config_name", config_name)
    where = f"--{flag} {source}"
    try:
        config = AutoConfig.from_pretrained(locate(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
        # A strict dataclass says what is wrong in its second line. Others advise there to run the folder's own code.
        reason = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        wrong = "no such folder or Hub id, or its configuration cannot be read"
        raise UserError(f"{where}: {wrong} ({reason[:300]})") from None
    if not isinstance(config, Wav2Vec2Config):
        raise UserError(f"{where}: this is a {config.model_type} model: give a wav2vec2 one")

    # Configurations accept any key. Refuse one that is nearly a known one; others may be another program's.
    path, known = Path(locate(source), "config.json"), Wav2Vec2Config().to_dict()
    for key in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ():
        if key not in known and (hint := did_you_mean(key, known, otherwise="", cutoff=0.85)):
            raise UserError(f"{path}: unknown key {key!r}: {hint}")
    _check_sizes(config, where)
    config.update(changes)
    if config.mask_feature_prob > 0 and config.mask_feature_length > config.hidden_size:
        wrong = f"--mask_feature_length {config.mask_feature_length} is more than the model's width"
        raise UserError(f"{wrong}, {config.hidden_size}: lower it, or set --mask_feature_prob 0")
    return config


def _check_sizes(config: Wav2Vec2Config, where: str) -> None:
    """Raises UserError, naming the key, for sizes that no model has and for weights beyond this machine's memory."""
    sizes = {name: getattr(config, name) for name in (*SIZES, *CONVS)}
    for name, value in sizes.items():
        numbers = value if name in CONVS and isinstance(value, list | tuple) else [value]
        if not numbers or not all(type(number) is int and number > 0 for number in numbers):
            raise UserError(f"{where}: {name} is {str(value)[:60]}: sizes are whole numbers from 1")
        sizes[name] = max(numbers)
    for divisor, name in DIVISORS.items():
        if sizes[name] % sizes[divisor]:
            raise UserError(f"{where}: {name} {sizes[name]} cannot be divided by {divisor} {sizes[divisor]}")

    # Kernels and matrices, without biases and norms, and the distractors (8 bytes each) of 500 masked frames.
    D, C, V, width = config.hidden_size, config.conv_dim, config.num_codevectors_per_group, config.codevector_dim
    convs = sum(a * b * k for a, b, k in zip([1, *C], C, config.conv_kernel, strict=False))
    positions = D * D // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layers = config.num_hidden_layers * (4 * D * D + 2 * D * config.intermediate_size)
    quantizer = V * width + C[-1] * V * config.num_codevector_groups
    projections = C[-1] * D + (D + width) * config.proj_codevector_dim
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * (convs + positions + layers + quantizer + projections + 1_000 * config.num_negatives) > memory:
        largest = max(sizes, key=sizes.get)
        wrong = f"{where}: {largest} is {str(sizes[largest])[:60]}"
        raise UserError(f"{wrong}: the model takes more than this machine's {memory / 1e9:,.0f} GB")


def build_config(args) -> Wav2Vec2Config:
    """The run's configuration: its source, the overrides and the flags of the objective; all end up in config.json."""
    config = load_config(args.model_name_or_path, args.config_name or "base")
    for pair in map(str.strip, args.config_overrides.split(",")) if args.config_overrides else ():
        key, separator, _ = pair.partition("=")
        if key in (*MASKING_FLAGS, "diversity_loss_weight"):
            raise UserError(f"--config_overrides {pair}: use the flag --{key}, which would overrule it")
        if not separator or key not in config.to_dict():
            raise UserError(f"--config_overrides {pair}: not a key of Wav2Vec2Config (write key=value,key=value)")
        try:
            config.update_from_string(pair)
        except (ValueError, TypeError) as error:
            raise UserError(f"--config_overrides {pair}: {first_line(error)}") from None
    where = f"--config_overrides {args.config_overrides}" if args.config_overrides else config.name_or_path
    _check_sizes(config, where)
    for name in MASKING_FLAGS:
        setattr(config, name, getattr(args, name))
    if args.diversity_loss_weight is not None:
        config.diversity_loss_weight = args.diversity_loss_weight
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(config, name)) <= most:  # NaN is refused too
            raise UserError(f"{where}: {name} is {value}: it has to be {least:g} to {most:g}")
    for name, (needed, reason) in NOT_COMPUTED.items():
        if (value := getattr(config, name)) != needed:
            advice = f"pretraining does not compute it ({reason}): set {name}={str(needed).lower()}"
            raise UserError(f"{where}: {name} is {value}: {advice}")
    return config


def check_same_architecture(config: Wav2Vec2Config, checkpoint: Path) -> None:
    """Raises `UserError` naming the first difference between a run's configuration and its checkpoint's."""
    # Through JSON, because conv_dim and its like are a tuple or a list.
    ours, theirs = (json.loads(c.to_json_string(use_diff=False)) for c in (config, load_config(str(checkpoint), None)))
    for key in ARCHITECTURE:
        if ours[key] != theirs[key]:
            wrong = f"checkpoint {checkpoint} is of another architecture: its {key} is {theirs[key]}"
            raise UserError(f"{wrong}, this run's is {ours[key]}; resume with the run's own configuration")


def make_model(model_class: type[PreTrainedModel], config: Wav2Vec2Config) -> PreTrainedModel:
    """A model of random weights. Raises UserError where `config` makes none."""
    try:
        return model_class(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        source, reason = config.name_or_path, first_line(error)
        raise UserError(f"{source}: no model can be built from its config.json ({reason}): mend it") from None


def load_with_head(
    model_class: type[PreTrainedModel], source: str | None, config: Wav2Vec2Config, head: tuple[str, ...]
) -> PreTrainedModel:
    """`model_class` with pretrained weights below and a new, random head, or all random where `source` is None.

    Args:
        head: what is new, even if the folder was fine-tuned before. Modules get their values here; a parameter that is
            missing is the caller's to fill.
    """
    if source is None:
        return make_model(model_class, config)
    model = load_weights(model_class, source, config, head)
    for module in (module for name, module in model.named_modules() if name in head):
        nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.zeros_(module.bias)
    return model


def load_weights(
    model_class: type[PreTrainedModel], source: str, config: Wav2Vec2Config, head: tuple[str, ...] | None = None
) -> PreTrainedModel:
    """Model with the weights in `source`. Raises UserError for a key that does not fit `config`, unless it begins as one
    of `head`. A model to pretrain has no head, and may take over some of the layers.
    """
    folder, verbosity = locate(source), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of keys becomes our error below
    transformers_logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = first_line(error)
        if not any(Path(folder).glob("*.safetensors")):
            pickle = min((p.name for p in Path(folder).glob("*") if p.suffix in PICKLES), default="pytorch_model.bin")
            reason += f"; only safetensors are loaded, because a pickle ({pickle}) can run programs: "
            reason += "docs/security.md has the lines that convert one"
        raise UserError(f"{source}: weights cannot be loaded ({reason})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)

    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]}
    left = set() if head is None else {key for key in report["unexpected_keys"] if key.startswith("wav2vec2.")}
    missing = sorted({*report["missing_keys"]} - {MASK_EMBEDDING})
    if head is None and missing and not any(key.startswith("wav2vec2.") for key in missing):
        problem = f"{source} lacks {missing[0]}: a fine-tuned or bare model has no quantizer and projections"
        raise UserError(f"{problem}; pretraining goes on from whole ForPreTraining weights, as facebook/wav2vec2-base")
    optional = () if head is None else (*head, MASK_EMBEDDING)
    problems = {"lacks": report["missing_keys"], "has another shape for": mismatched, "has no place for": left}
    for problem, keys in problems.items():
        if keys := sorted(key for key in keys if not key.startswith(optional)):
            what = f"{problem} {len(keys)} weights, such as {keys[0]}"
            raise UserError(f"{source} is of another architecture than the configuration: it {what}")
    return model


def load_feature_extractor(source: str, config: PretrainedConfig) -> Wav2Vec2FeatureExtractor:
    """The folder's own feature extractor, else the one that `config` implies: LARGE normalises the waveform."""
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(locate(source))
    except (OSError, ValueError, TypeError, AttributeError):
        norm = config.feat_extract_norm == "layer"
        return Wav2Vec2FeatureExtractor(sampling_rate=SAMPLING_RATE, do_normalize=norm, return_attention_mask=norm)
    if extractor.sampling_rate != SAMPLING_RATE:
        raise UserError(
            f"{source}: made for {extractor.sampling_rate} Hz; this program needs one for {SAMPLING_RATE} Hz"
        )
    return extractor
