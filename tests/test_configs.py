"""Every configuration that is shipped can be used as it is, and a YAML holds only what differs from the defaults."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.classifier import ClassificationArguments
from w2v2.finetune.labels import LabelArguments
from w2v2.finetune.text import CTCArguments
from w2v2.model.loading import build_config, load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SCRIPTS = {"pretrain": [PretrainArguments], "finetune": [CTCArguments, FineTuningArguments],
           "classify": [LabelArguments, ClassificationArguments]}  # fmt: skip
REQUIRED = {
    "pretrain": {"train_data": "a.csv", "output_dir": "run"},
    "finetune": {"train_data": "a.csv", "validation_data": "b.csv", "output_dir": "run"},
}


def shipped(*patterns):
    """One parameter a file; a folder without any is an error."""
    paths = []
    for pattern in patterns:
        found = sorted(CONFIGS.glob(pattern))
        assert found, f"configs/{pattern}: nothing found"
        paths += found
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(CONFIGS)) for path in paths])


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(path):
    """The run of a shipped YAML; what a user has to add is added."""
    folder, values = path.parent.name, read(path)
    script = "classify" if "python finetune_classification.py" in path.read_text(encoding="utf-8") else folder
    missing = ({} if "folds" in values else REQUIRED[folder]) | (
        {} if values.keys() & {"model_name_or_path", "config_name"} else {"config_name": "base"}
    )
    flags = [f"--{name}={value}" for name, value in missing.items() if name not in values]
    if folder == "finetune":  # else bf16 of a GPU's configuration is refused where there is none
        flags += ["--use_cpu"] * ("use_cpu" not in values)
    instances = parse_command_line(SCRIPTS[script], [str(path), *flags])
    return {f.name: (f, getattr(instance, f.name)) for instance in instances for f in fields(instance)}


@shipped("pretrain/*.yaml", "finetune/*.yaml")
def test_a_yaml_parses_and_holds_only_what_differs(path):
    resolved = parse(path)
    assert resolved["max_steps"][1] > 0
    for name in read(path):
        f, value = resolved[name]
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        assert value != default, f"{name} is the default: leave it out"
    if path.parent.name == "pretrain":
        required = [f"--{name}={value}" for name, value in REQUIRED["pretrain"].items()]
        required += ["--model_name_or_path=base"] * ("model_name_or_path" in read(path))  # the Hub's is not at hand
        config = build_config(parse_command_line([PretrainArguments], [str(path), *required])[0])
        assert config.mask_time_prob == resolved["mask_time_prob"][1]
    elif source := resolved["config_name"][1]:
        assert isinstance(load_config(None, source), Wav2Vec2Config)


# Labels: peak learning rate, updates, updates with a frozen encoder, channel and time masks, layerdrop (fairseq's
# base_*.yaml).
RECIPES = {
    "10min": (5e-5, 13_000, 10_000, 0.25, 0.65, 0.1),
    "1h": (5e-5, 13_000, 10_000, 0.25, 0.65, 0.1),
    "10h": (5e-5, 20_000, 10_000, 0.5, 0.65, 0.05),
    "100h": (3e-5, 80_000, 0, 0.5, 0.65, 0.1),
    "960h": (1e-4, 320_000, 0, 0.1, 0.5, 0.1),
}


@pytest.mark.parametrize("labels", RECIPES)
def test_the_presets_for_librispeech_are_the_recipe(labels):
    resolved = parse(CONFIGS / "finetune" / f"librispeech_{labels}.yaml")
    names = ("learning_rate", "max_steps", "freeze_encoder_steps", "mask_feature_prob", "mask_time_prob", "layerdrop")
    assert tuple(resolved[name][1] for name in names) == RECIPES[labels]
    common = dict(batch_seconds=1600, adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-8, weight_decay=0.0,
                  lr_scheduler_type="tri_stage", warmup_steps=0.1, hold_fraction=0.4, final_lr_scale=0.05,
                  freeze_feature_encoder=True, mask_time_length=10, mask_feature_length=64, activation_dropout=0.1,
                  hidden_dropout=0.0, attention_dropout=0.0, final_dropout=0.0, ctc_zero_infinity=True)  # fmt: skip
    assert {name: resolved[name][1] for name in common} == common
    hours = {"10min": 1 / 6, "1h": 1.0, "10h": 10.0}.get(labels)
    assert resolved["train_hours"][1] == (hours and pytest.approx(hours, abs=1e-3))
    assert {f"librispeech_{name}" for name in RECIPES} == {p.stem for p in (CONFIGS / "finetune").glob("librispeech_*")}


@shipped("models/*/config.json")
def test_every_model_holds_only_keys_of_wav2vec2_and_loads(path):
    """LARGE's layer-norm convs go with normalised waveforms, BASE's group norm with waveforms as they are."""
    values = json.loads(path.read_text(encoding="utf-8"))
    assert not values.keys() - Wav2Vec2Config().to_dict().keys() - {"architectures"}
    config = Wav2Vec2Config.from_pretrained(path.parent)
    assert values["model_type"] == "wav2vec2"
    assert {name: config.to_dict()[name] for name in values} == values
    assert config.codevector_dim % config.num_codevector_groups == 0
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.hidden_size % config.num_conv_pos_embedding_groups == 0
    if (path.parent / "preprocessor_config.json").exists():
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(path.parent)
        assert (extractor.sampling_rate, extractor.do_normalize) == (16_000, config.feat_extract_norm == "layer")
    else:
        assert config.feat_extract_norm == "group"


@shipped("accelerate/*.yaml")
def test_every_accelerate_configuration_loads(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.mixed_precision in ("no", "bf16", "fp16")
    assert config.use_cpu == path.name.startswith("cpu")
