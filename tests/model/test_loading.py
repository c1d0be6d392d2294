"""What a model is built of: configurations, weights and feature extractors of other folders, taken over or refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from transformers import HubertConfig, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining, Wav2Vec2Model

from w2v2.errors import UserError
from w2v2.model.loading import (
    build_config,
    load_config,
    load_feature_extractor,
    load_weights,
    load_with_head,
    make_model,
)
from w2v2.model.pretraining import PretrainingModel

HEAD = ("lm_head",)


def ctc_config(**changes):
    return tiny_config(vocab_size=8, **changes)


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(1)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.mark.parametrize("changes", [{}, dict(conv_bias=True, proj_codevector_dim=24), dict(large=True)], ids=str)
def test_fresh_weights_are_the_stock_models(changes):
    config, found = tiny_config(**changes), []
    for model_class in (PretrainingModel, Wav2Vec2ForPreTraining):
        torch.manual_seed(3)
        found.append(make_model(model_class, config).state_dict())
    ours, stock = found
    assert ours.keys() == stock.keys()
    assert [name for name in stock if not torch.equal(ours[name], stock[name])] == []


def test_pretrained_weights_are_taken_and_the_quantizer_left(pretrained):
    saved = load_file(pretrained / "model.safetensors")
    loaded = load_with_head(Wav2Vec2ForCTC, str(pretrained), ctc_config(), HEAD).state_dict()
    assert set(loaded) - set(saved) == {"lm_head.weight", "lm_head.bias"}
    assert all(torch.equal(loaded[key], saved[key]) for key in loaded if key.startswith("wav2vec2."))


@pytest.mark.parametrize("model_class", [Wav2Vec2Model, Wav2Vec2ForCTC])
def test_pretraining_needs_the_quantizer(tmp_path, model_class):
    """Which neither a fine-tuned folder has, here one that masked nothing, nor one without a head."""
    model_class(ctc_config(mask_time_prob=0.0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks project_hid.bias: .* has no quantizer .* facebook/wav2vec2-base"):
        load_weights(PretrainingModel, str(tmp_path), tiny_config())


# Keys of facebook/wav2vec2-base's config.json that no configuration of today knows.
OF_OLD = dict(
    feat_extract_dropout=0.0, freeze_feat_extract_train=True, gradient_checkpointing=True, num_feat_extract_layers=7,
    mask_channel_length=10, mask_channel_min_space=1, mask_channel_other=0.0, mask_channel_prob=0.0,
    mask_channel_selection="static", mask_time_min_space=1, mask_time_other=0.0, mask_time_selection="static",
    no_mask_channel_overlap=False, no_mask_time_overlap=False,
)  # fmt: skip


def test_a_published_configuration_is_taken(pretrained):
    path = pretrained / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OF_OLD))
    assert build(str(pretrained)).hidden_size == 32


def test_pretraining_may_begin_with_some_of_the_layers(pretrained):
    saved = load_file(pretrained / "model.safetensors")
    loaded = load_weights(PretrainingModel, str(pretrained), tiny_config(num_hidden_layers=1)).state_dict()
    assert all(torch.equal(loaded[key], saved[key]) for key in loaded) and len(loaded) < len(saved)


def test_a_model_that_masks_nothing_needs_no_mask_embedding(pretrained, tmp_path):
    plain = ctc_config(mask_time_prob=0.0, mask_feature_prob=0.0)
    model = load_with_head(Wav2Vec2ForCTC, str(pretrained), plain, HEAD)
    assert not hasattr(model.wav2vec2, "masked_spec_embed")
    model.save_pretrained(tmp_path / "plain")
    again = load_with_head(Wav2Vec2ForCTC, str(tmp_path / "plain"), ctc_config(), HEAD)
    assert again.wav2vec2.masked_spec_embed.isfinite().all()


def test_the_head_is_new_even_from_a_fine_tuned_folder(tmp_path):
    stock = Wav2Vec2ForCTC(ctc_config())
    stock.save_pretrained(tmp_path)
    model = load_with_head(Wav2Vec2ForCTC, str(tmp_path), ctc_config(), HEAD)
    assert not torch.equal(model.lm_head.weight, stock.lm_head.weight)
    torch.testing.assert_close(model.wav2vec2.encoder.layer_norm.weight, stock.wav2vec2.encoder.layer_norm.weight)
    wider = tiny_config(vocab_size=11)
    assert load_with_head(Wav2Vec2ForCTC, str(tmp_path), wider, HEAD).lm_head.out_features == 11


@pytest.mark.parametrize("change", ["lacks", "has another shape", "no place"])
def test_weights_that_do_not_fit_are_refused(pretrained, change):
    path = pretrained / "model.safetensors"
    weights = load_file(path)
    name = "wav2vec2.encoder.layers.1.final_layer_norm.weight"
    if change == "lacks":
        del weights[name]
    elif change == "has another shape":
        weights[name] = torch.zeros(3)
    else:
        weights[name.replace("layers.1", "layers.7")] = weights[name].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{change}.* such as wav2vec2.encoder.layers"):
        load_with_head(Wav2Vec2ForCTC, str(pretrained), ctc_config(), HEAD)


def test_what_is_no_wav2vec2_is_refused_by_name(tmp_path):
    HubertConfig().save_pretrained(tmp_path / "hubert")
    (tmp_path / "nothing").mkdir()
    for folder, reason in (("hubert", "hubert model"), ("nothing", "config.json"), ("absent", "no such folder")):
        with pytest.raises(UserError, match=f"--model_name_or_path .*{folder}.*{reason}"):
            load_config(str(tmp_path / folder), None)


def test_a_channel_mask_wider_than_the_model_is_refused(pretrained):
    with pytest.raises(UserError, match="--mask_feature_length 64 .* 32"):
        load_config(str(pretrained), None, mask_feature_prob=0.5, mask_feature_length=64)


def test_waveforms_are_normalised_as_folder_or_architecture_say(tmp_path):
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    assert load_feature_extractor(str(tmp_path), tiny_config()).do_normalize
    assert not load_feature_extractor(str(tmp_path / "absent"), tiny_config()).do_normalize
    assert load_feature_extractor(str(tmp_path / "absent"), tiny_config(large=True)).do_normalize
    shipped = load_config(None, "large")
    assert shipped.hidden_size == 1024 and load_feature_extractor(shipped.name_or_path, shipped).do_normalize


def build(source, overrides=None, **flags):
    flags = dict(mask_time_prob=0.65, mask_time_length=10, mask_time_min_masks=2, diversity_loss_weight=None) | flags
    return build_config(
        SimpleNamespace(model_name_or_path=source, config_name=None, config_overrides=overrides, **flags)
    )


@pytest.mark.parametrize("saved", [0.05, 0.65], ids=["handed-over", "old"])
def test_pretraining_masks_as_its_flags_say(tmp_path, saved):
    tiny_config(mask_time_prob=saved).save_pretrained(tmp_path)
    config = build(str(tmp_path), mask_time_length=5)
    assert (config.mask_time_prob, config.mask_time_length) == (0.65, 5)


@pytest.mark.parametrize(
    "override",
    [
        "add_adapter=true", "mask_feature_prob=0.1", "apply_spec_augment=false", "layerdrop=nan", "hidden_dropout=1.5",
        "feat_quantizer_dropout=-0.1", "contrastive_logits_temperature=0", "num_negatives=0", "num_negatives=1000000000",
        "num_codevectors_per_group=1000000000", "proj_codevector_dim=10000000000", "num_attention_heads=5",
    ],
)  # fmt: skip
def test_what_pretraining_does_not_compute_is_refused(tmp_path, override):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=override.partition("=")[0]):
        build(str(tmp_path), override)
