import copy

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from transformers import HubertConfig, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining

from w2v2.errors import UserError
from w2v2.finetune.ctc_data import collate_ctc
from w2v2.model import backbone

LENGTHS = (16_000, 9_123, 4_000, 700)


def ctc_config(large=False, **changes):
    head = dict(vocab_size=8, pad_token_id=0, ctc_zero_infinity=True, ctc_loss_reduction="mean", final_dropout=0.0)
    return tiny_config(large, **(head | changes))


def utterances(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_values": torch.randn(n, generator=generator).numpy(), "labels": [3, 4]} for n in LENGTHS]


def models(large=False, **changes):
    torch.manual_seed(0)
    stock = Wav2Vec2ForCTC(ctc_config(large, **changes))
    return stock, backbone.hide_padding(copy.deepcopy(stock))


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(1)
    Wav2Vec2ForPreTraining(tiny_config()).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.mark.parametrize("large", [False, True])
def test_an_utterance_in_a_padded_batch_comes_out_as_alone_in_the_stock_model(large):
    stock, ours = (model.eval() for model in models(large))
    items = utterances()
    with torch.no_grad():
        together = ours(**collate_ctc(items)).logits
        for row, item in enumerate(items):
            alone = stock(torch.tensor(item["input_values"])[None]).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_the_gradient_of_a_padded_batch_is_the_mean_of_the_stock_gradients(large):
    stock, ours = (model.train() for model in models(large, mask_time_prob=0.0))
    items = utterances()
    ours(**collate_ctc(items)).loss.backward()
    for item in items:
        (stock(**collate_ctc([item])).loss / len(items)).backward()
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_keys_and_class_stay_stock():
    stock, ours = models()
    assert type(ours) is Wav2Vec2ForCTC
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_a_batch_shorter_than_a_mask_span_trains_unmasked():
    stock, ours = (model.train() for model in models(mask_time_length=10))
    batch = collate_ctc(utterances()[-1:])
    with pytest.raises(ValueError, match="mask_length"):
        stock(**batch)
    assert ours(**batch).loss.isfinite()


def test_a_short_batch_trains_where_nothing_is_masked_at_all():
    _, ours = models(mask_time_prob=0.0, mask_feature_prob=0.0)
    assert ours.train()(**collate_ctc(utterances()[-1:])).loss.isfinite()


def test_freezing_the_convs_holds_after_padding_is_hidden():
    _, ours = models()
    ours.freeze_feature_encoder()
    ours.train()(**collate_ctc(utterances()[:2])).loss.backward()
    assert all(p.grad is None for p in ours.wav2vec2.feature_extractor.parameters())
    assert ours.wav2vec2.feature_projection.projection.weight.grad is not None


def test_frames_are_the_stock_models():
    config = ctc_config()
    stock = Wav2Vec2ForCTC(config)
    for samples in range(400, 2_000, 37):
        assert backbone.num_frames(config, samples) == stock._get_feat_extract_output_lengths(samples)
    assert backbone.min_samples(config) == 400
    assert (backbone.num_frames(config, 400), backbone.num_frames(config, 399)) == (1, 0)


def test_pretrained_weights_are_taken_and_the_quantizer_left(pretrained):
    model = backbone.load_with_head(Wav2Vec2ForCTC, str(pretrained), ctc_config(), ("lm_head",))
    saved = load_file(pretrained / "model.safetensors")
    loaded = model.state_dict()
    assert set(loaded) - set(saved) == {"lm_head.weight", "lm_head.bias"}
    assert all(torch.equal(loaded[key], saved[key]) for key in loaded if key.startswith("wav2vec2."))


def test_a_model_that_masks_nothing_has_no_mask_embedding_and_that_is_no_error(pretrained, tmp_path):
    plain = ctc_config(mask_time_prob=0.0, mask_feature_prob=0.0)
    model = backbone.load_with_head(Wav2Vec2ForCTC, str(pretrained), plain, ("lm_head",))
    assert not hasattr(model.wav2vec2, "masked_spec_embed")
    model.save_pretrained(tmp_path / "plain")
    again = backbone.load_with_head(Wav2Vec2ForCTC, str(tmp_path / "plain"), ctc_config(), ("lm_head",))
    assert again.wav2vec2.masked_spec_embed.isfinite().all()


def test_the_head_is_new_even_from_a_fine_tuned_folder(tmp_path):
    torch.manual_seed(2)
    stock = Wav2Vec2ForCTC(ctc_config())
    stock.save_pretrained(tmp_path)
    model = backbone.load_with_head(Wav2Vec2ForCTC, str(tmp_path), ctc_config(), ("lm_head",))
    assert not torch.equal(model.lm_head.weight, stock.lm_head.weight)
    torch.testing.assert_close(model.wav2vec2.encoder.layer_norm.weight, stock.wav2vec2.encoder.layer_norm.weight)
    wider = ctc_config()
    wider.vocab_size = 11
    assert backbone.load_with_head(Wav2Vec2ForCTC, str(tmp_path), wider, ("lm_head",)).lm_head.out_features == 11


@pytest.mark.parametrize("change", ["lacks", "has another shape", "no place"])
def test_weights_that_do_not_fit_their_configuration_are_refused(pretrained, change):
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
    with pytest.raises(UserError, match=change):
        backbone.load_with_head(Wav2Vec2ForCTC, str(pretrained), ctc_config(), ("lm_head",))


def test_what_is_no_wav2vec2_is_refused_by_name(tmp_path):
    HubertConfig().save_pretrained(tmp_path / "hubert")
    (tmp_path / "nothing").mkdir()
    for folder, reason in (("hubert", "hubert model"), ("nothing", "no config.json"), ("absent", "no such folder")):
        with pytest.raises(UserError, match=f"--model_name_or_path .*{folder}.*{reason}"):
            backbone.load_config(str(tmp_path / folder), None)


def test_a_channel_mask_wider_than_the_model_is_refused(pretrained):
    with pytest.raises(UserError, match="--mask_feature_length 64 .* 32"):
        backbone.load_config(str(pretrained), None, mask_feature_prob=0.5, mask_feature_length=64)


def test_waveforms_are_normalised_as_the_folder_says_or_the_architecture_implies(tmp_path):
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    assert backbone.load_feature_extractor(str(tmp_path), tiny_config()).do_normalize
    assert not backbone.load_feature_extractor(str(tmp_path / "absent"), tiny_config()).do_normalize
    assert backbone.load_feature_extractor(str(tmp_path / "absent"), tiny_config(large=True)).do_normalize


def test_shipped_configurations_are_known_by_name():
    config = backbone.load_config(None, "large")
    assert config.hidden_size == 1024
    assert backbone.load_feature_extractor(config.name_or_path, config).do_normalize
