"""Weights of other programs → the stock `Wav2Vec2ForPreTraining`, quantizer and projections included.

A weight is only ever renamed: a key without a place, a place without a key, another shape, or an option that the stock
model has no counterpart of is refused, naming the first. Nothing that a file holds is executed: pickles are read by
torch's weights-only unpickler, in which classes that it does not know become inert stand-ins.
"""

import argparse
import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.model.loading import first_line
from w2v2.model.pretraining import FINETUNING_MASKS

CONV, LAYER = "wav2vec2.feature_extractor.conv_layers.{}.", "wav2vec2.encoder.layers.{}."  # of the stock model
Names = Sequence[tuple[str, str]]  # an old and a new key; `{}` stands for what both have in common, in order


def _ignore(self: object, *args: object, **kwargs: object) -> None:
    """How an inert stand-in is made: it takes anything and does nothing."""


def read_weights(path: Path) -> Mapping[str, Any]:
    """The dictionary that `torch.save` wrote; none of it is executed. Raises UserError where it is none."""
    known = [argparse.Namespace]  # fairseq's older checkpoints keep their options in one
    try:
        # 1. Which classes does it name that torch does not know? Each gets an inert stand-in.
        with torch.serialization.safe_globals(known), contextlib.suppress(ValueError, RuntimeError):
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):  # not in files of before torch 1.6
                module, _, kind = name.rpartition(".")
                known.append(type(kind, (), {"__module__": module, "__init__": _ignore, "__setstate__": _ignore}))
        # 2. Tensors, plain values and stand-ins are read; a call of anything else is refused by torch.
        with torch.serialization.safe_globals(known):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file shows itself in many ways
        raise UserError(f"{path}: cannot be read as weights ({first_line(error)}); give a whole checkpoint") from None


def rename(weights: Mapping[str, torch.Tensor], names: Names, path: Path) -> dict[str, torch.Tensor]:
    """The weights in 32 bits under their new keys. Raises UserError for a key that is not among `names`."""
    rules = [(re.compile(re.escape(old).replace(r"\{\}", "(.+)")), new) for old, new in names]
    renamed = {}
    for key, tensor in weights.items():
        match, new = next(((match, new) for rule, new in rules if (match := rule.fullmatch(key))), (None, None))
        if match is None:
            raise UserError(f"{path}: no place for {key} in the converted model")
        renamed[new.format(*match.groups())] = tensor.float()
    return renamed


def fill_stock(config: Wav2Vec2Config, weights: Mapping[str, torch.Tensor], path: Path) -> Wav2Vec2ForPreTraining:
    """The stock model with exactly these weights. Raises UserError for one that is missing, left over or misshapen."""
    config.update(FINETUNING_MASKS)
    model = Wav2Vec2ForPreTraining(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the architecture: {str(error).splitlines()[1].strip()[:200]}") from None
    return model.eval()


def feature_extractor(config: Wav2Vec2Config, normalize: bool) -> Wav2Vec2FeatureExtractor:
    """As the library's own models have it: only layer-normed convs are given an attention mask."""
    masked = config.feat_extract_norm == "layer"
    return Wav2Vec2FeatureExtractor(sampling_rate=SAMPLING_RATE, do_normalize=normalize, return_attention_mask=masked)
