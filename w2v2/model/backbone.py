"""A pretrained wav2vec 2.0 under a new head: load it, check it, and keep padding out of its sight.

Shapes: B utterances, S samples, T latent frames, C channels.
"""

import difflib
import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.masking import latent_lengths
from w2v2.errors import UserError
from w2v2.model.dimensions import check_dimensions
from w2v2.model.feature_encoder import flat_features, is_flat, stock_features

logger = logging.getLogger(__name__)

# Without it transformers may load, in place of a Hub repository's weights, those of a stranger's pull request to it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

MASK_EMBEDDING = "wav2vec2.masked_spec_embed"  # a model that masks nothing has none
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What a configuration can raise that is not what it should be, whoever wrote it.
CONFIG_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, StrictDataclassError)


def num_frames(config: Wav2Vec2Config, num_samples: int) -> int:
    """Latent frames of so many samples."""
    return int(latent_lengths(torch.tensor(num_samples), config.conv_kernel, config.conv_stride))


def min_samples(config: Wav2Vec2Config) -> int:
    """Samples of a single latent frame: less than that is no input."""
    samples = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def locate(name: str) -> str:
    """A folder as it is, a name in `configs/models` (with or without that prefix) as its folder, anything else as a Hub id."""
    for folder in (Path(name), MODELS / name, MODELS.parents[1] / name):
        if (folder / "config.json").is_file():
            return str(folder)
    return name


def load_config(model_name_or_path: str | None, config_name: str | None, **changes) -> Wav2Vec2Config:
    """Configuration of the pretrained model, or of the random one, with `changes`; it has to be a wav2vec 2.0's."""
    flag, source = ("model_name_or_path", model_name_or_path) if model_name_or_path else ("config_name", config_name)
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise UserError(f"--{flag} {source}: this folder holds no config.json: give the folder of a pretrained model")
    try:
        config = AutoConfig.from_pretrained(locate(source), trust_remote_code=False)
    except CONFIG_ERRORS as error:
        absent = "no such folder or Hub id, or its configuration cannot be read"
        # A strict dataclass says what is wrong in its second line; others advise there to run the folder's own code.
        reason = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else first_line(error)
        raise UserError(f"--{flag} {source}: {absent} ({reason[:300]})") from None
    _refuse_misspelt(source, locate(source))
    if not isinstance(config, Wav2Vec2Config):
        raise UserError(f"--{flag} {source}: this is a {config.model_type} model; a wav2vec2 one is needed")
    check_dimensions(config, f"--{flag} {source}")
    config.update(changes)
    if config.mask_feature_prob > 0 and config.mask_feature_length > config.hidden_size:
        raise UserError(
            f"--mask_feature_length {config.mask_feature_length} is more than the model's width, {config.hidden_size}: "
            "lower it, or set --mask_feature_prob 0"
        )
    return config


def _refuse_misspelt(source: str, folder: str) -> None:
    """Configurations accept any key in silence: one that is nearly a known key is a slip, others may be another program's."""
    path = Path(folder, "config.json")
    if not path.is_file():
        return
    known = Wav2Vec2Config().to_dict()
    for key in json.loads(path.read_text(encoding="utf-8")):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and near:
            raise UserError(f"{source}: config.json has the unknown key {key!r}: did you mean {near[0]}?")


def refuse_pickles(source: str) -> None:
    """Raises UserError for a folder whose weights are in a pickle alone: to load one is to run whatever stands in it."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
            raise UserError(
                f"{source}: its weights are in {pickles[0]}, a pickle, and pickles are not loaded, for they can run programs; "
                "docs/security.md has the lines that make a model.safetensors of it"
            )


def why_not_loaded(source: str, error: BaseException) -> str:
    """For a message: the error's first line, and what is usual where a Hub repository has no safetensors."""
    if os.path.isdir(source):
        return first_line(error)
    return (
        f"{first_line(error)}; only safetensors are loaded: if it holds nothing but a pytorch_model.bin, docs/security.md has the lines "
        "that convert it"
    )


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


def load_with_head(
    model_class: type[PreTrainedModel], model_name_or_path: str | None, config: Wav2Vec2Config, head: tuple[str, ...]
) -> PreTrainedModel:
    """`model_class` with pretrained weights below and a new, random head (what is named in `head`), or all random.

    Modules of the head get new values here; a single parameter in `head` may be missing, and is the caller's to fill.

    The quantizer and projections of pretraining are left behind. Any other key that is missing, left over or of another
    shape means a folder that does not fit its own configuration, and raises UserError.
    """
    if model_name_or_path is None:
        with building(config.name_or_path):
            return model_class(config)
    source = locate(model_name_or_path)
    refuse_pickles(source)
    with _quiet():
        try:
            model, report = model_class.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(
                f"--model_name_or_path {model_name_or_path}: cannot be loaded: {why_not_loaded(source, error)}"
            ) from None
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]]
    for problem, keys in (("lacks", report["missing_keys"]), ("has another shape for", mismatched)):
        keys = sorted(key for key in keys if not key.startswith(head) and key != MASK_EMBEDDING)
        if keys:
            raise UserError(
                f"--model_name_or_path {model_name_or_path}: {problem} {len(keys)} weights, such as {keys[0]}"
            )
    left = sorted(key for key in report["unexpected_keys"] if key.startswith("wav2vec2.") and key != MASK_EMBEDDING)
    if left:
        raise UserError(f"--model_name_or_path {model_name_or_path}: holds {len(left)} weights that its config.json "
                        f"has no place for, such as {left[0]}")  # fmt: skip
    for module in (module for name, module in model.named_modules() if name in head):  # new even if fine-tuned before
        nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.zeros_(module.bias)
    return model


@contextmanager
def building(source: str):
    """Raises UserError where a configuration of the right sizes still makes no model: an activation, norm or dropout that does not exist."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{source}: its configuration makes no model ({first_line(error)}): mend its config.json"
        ) from None


@contextmanager
def _quiet():
    """No report of the keys that are expected to differ, which `load_with_head` looks at itself, and no bar."""
    level, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class LoneRowsFeatureEncoder(Wav2Vec2FeatureEncoder):
    """The stock convs and their parameters, but each row comes out as if it were alone in the batch.

    BASE's first conv is group-normed over time, so in the stock encoder padding changes every frame: word error rates would move
    with the batch size, and training would differ from inference.
    """

    num_samples: torch.Tensor | None = None  # (B,) of the batch at hand; None: no padding

    def __init__(self, config: Wav2Vec2Config):
        super().__init__(config)
        self._features = flat_features if is_flat(config) else stock_features
        self._kernels, self._strides = config.conv_kernel, config.conv_stride

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        B, S = input_values.shape
        whole = torch.full((B,), S, device=input_values.device)
        num_frames = int(latent_lengths(whole[:1].cpu(), self._kernels, self._strides))
        features = self._features(input_values, whole if self.num_samples is None else self.num_samples, self)
        return features[:, :num_frames].transpose(1, 2)  # (B, C, T)


def hide_padding(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model's output for an utterance independent of its neighbours in the batch, in training and evaluation.

    Weights, keys and class stay stock. Besides the convs, a batch too short for one mask span goes unmasked, where the stock
    model raises.
    """
    base = model.wav2vec2
    encoder = LoneRowsFeatureEncoder(model.config)
    encoder.load_state_dict(base.feature_extractor.state_dict())
    base.feature_extractor = encoder.to(base.device, base.dtype)
    base.register_forward_pre_hook(_before_forward, with_kwargs=True)
    return model


def _before_forward(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    input_values = args[0] if args else kwargs["input_values"]
    attention_mask = kwargs.get("attention_mask")
    base.feature_extractor.num_samples = None if attention_mask is None else attention_mask.sum(-1)
    num_frames = int(base._get_feat_extract_output_lengths(input_values.shape[1]))
    if base.training and base.config.mask_time_prob > 0 and num_frames < base.config.mask_time_length:
        shape = (len(input_values), num_frames)
        kwargs["mask_time_indices"] = torch.zeros(shape, dtype=torch.bool, device=input_values.device)
    return args, kwargs
