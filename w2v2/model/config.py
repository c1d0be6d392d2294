"""The model's configuration: from a folder, the Hub or `configs/models`, with the run's changes, checked once.

Whatever a user or a stranger's `config.json` can get wrong raises a `UserError` of one line.
"""

import difflib
import json
import os
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, Wav2Vec2Config

from w2v2.errors import UserError

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
CONFIG_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError)
CONVS = ("conv_dim", "conv_kernel", "conv_stride")  # lists, of one number a conv
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups", "num_codevector_groups", "num_codevectors_per_group", "codevector_dim",
    "proj_codevector_dim",
)  # fmt: skip
DIVISORS = {
    "num_attention_heads": "hidden_size",
    "num_conv_pos_embedding_groups": "hidden_size",
    "num_codevector_groups": "codevector_dim",
}
# Weights fit only where all of these are equal.
ARCHITECTURE = (
    *CONVS, "conv_bias", "feat_extract_norm", "feat_extract_activation", "hidden_act", "do_stable_layer_norm", *SIZES
)  # fmt: skip
MASKING_FLAGS = ("mask_time_prob", "mask_time_length", "mask_time_min_masks")


def locate(name: str) -> str:
    """A folder itself, the folder of a name in `configs/models` (with or without that prefix), or else a Hub id."""
    for folder in (Path(name), MODELS / name, MODELS.parents[1] / name):
        if (folder / "config.json").is_file():
            return str(folder)
    return name


def load_config(model_name_or_path: str | None, config_name: str | None, **changes) -> Wav2Vec2Config:
    """Configuration of the pretrained model, or of the random one, with `changes`.

    Raises UserError where it cannot be read, is not a wav2vec 2.0's, or has sizes that make no model.
    """
    flag, source = ("model_name_or_path", model_name_or_path) if model_name_or_path else ("config_name", config_name)
    where = f"--{flag} {source}"
    try:
        config = AutoConfig.from_pretrained(locate(source), trust_remote_code=False)
    except CONFIG_ERRORS as error:
        # A strict dataclass says what is wrong in its second line. Others advise there to run the folder's own code.
        reason = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        absent = "no such folder or Hub id, or its configuration cannot be read"
        raise UserError(f"{where}: {absent} ({reason[:300]})") from None
    if not isinstance(config, Wav2Vec2Config):
        raise UserError(f"{where}: this is a {config.model_type} model; a wav2vec2 one is needed")
    _check_keys(Path(locate(source), "config.json"))
    _check_sizes(config, where)
    config.update(changes)
    if config.mask_feature_prob > 0 and config.mask_feature_length > config.hidden_size:
        raise UserError(
            f"--mask_feature_length {config.mask_feature_length} is more than the model's width, {config.hidden_size}: "
            "lower it, or set --mask_feature_prob 0"
        )
    return config


def _check_keys(path: Path) -> None:
    """Refuse a key that is nearly a known one: configurations accept any. Others may be another program's."""
    known = Wav2Vec2Config().to_dict()
    for key in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ():
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            raise UserError(f"{path}: unknown key {key!r}: did you mean {near[0]}?")


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

    # Kernels and matrices alone, without biases, norms and projections.
    D, channels = config.hidden_size, [1, *config.conv_dim]
    convs = sum(a * b * k for a, b, k in zip(channels, config.conv_dim, config.conv_kernel, strict=False))
    positions = D * D // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layers = config.num_hidden_layers * (4 * D * D + 2 * D * config.intermediate_size)
    codebook = config.num_codevectors_per_group * config.codevector_dim
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * (convs + positions + layers + codebook) > memory:
        largest = max(sizes, key=sizes.get)
        raise UserError(
            f"{where}: {largest} is {str(sizes[largest])[:60]}: "
            f"the weights take more than this machine's {memory / 1e9:,.0f} GB"
        )


def build_config(args) -> Wav2Vec2Config:
    """The run's configuration: its source, the overrides and the flags of the objective; all end up in config.json."""
    config = load_config(args.model_name_or_path, args.config_name or "base")
    if args.config_overrides:
        _override(config, args.config_overrides)
    for name in MASKING_FLAGS:
        setattr(config, name, getattr(args, name))
    if args.diversity_loss_weight is not None:
        config.diversity_loss_weight = args.diversity_loss_weight
    return config


def _override(config: Wav2Vec2Config, overrides: str) -> None:
    """Apply `key=value,…` in place. Raises UserError for an unknown key, a flag's key or a value of another kind."""
    for pair in map(str.strip, overrides.split(",")):
        key, separator, _ = pair.partition("=")
        if key in (*MASKING_FLAGS, "diversity_loss_weight"):
            raise UserError(f"--config_overrides {pair}: use the flag --{key}, which would overrule it")
        if not separator or key not in config.to_dict():
            raise UserError(f"--config_overrides {pair}: no key of Wav2Vec2Config (write key=value,key=value)")
        try:
            config.update_from_string(pair)
        except (ValueError, TypeError) as error:
            raise UserError(f"--config_overrides {pair}: {first_line(error)}") from None
    _check_sizes(config, f"--config_overrides {overrides}")


def check_same_architecture(config: Wav2Vec2Config, checkpoint: Path) -> None:
    """Raises `UserError` naming the first difference between a run's configuration and its checkpoint's."""
    # Through JSON, because conv_dim and its like are a tuple or a list.
    ours, theirs = (json.loads(c.to_json_string(use_diff=False)) for c in (config, load_config(str(checkpoint), None)))
    for key in ARCHITECTURE:
        if ours[key] != theirs[key]:
            raise UserError(
                f"checkpoint {checkpoint} is of another architecture: its {key} is {theirs[key]}, this run's is "
                f"{ours[key]}; resume with the run's own configuration"
            )


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
