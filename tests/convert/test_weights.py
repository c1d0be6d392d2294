"""Checkpoints as fairseq and SpeechBrain lay them out, written here, come back as the stock model; and go to fairseq."""

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import refusal, run_here, tiny_config
from transformers import AutoFeatureExtractor, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2ForPreTraining

import convert_checkpoint
from w2v2.convert.fairseq import conv_layers, convert_fairseq, export_fairseq
from w2v2.convert.speechbrain import convert_speechbrain, convert_without_positions
from w2v2.errors import UserError

CONVS = "[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16,2,2)] + [(16,2,2)]"


def make_model(large=False, **changes):
    torch.manual_seed(1)
    model = Wav2Vec2ForPreTraining(tiny_config(large, **changes)).eval()
    for parameter in model.parameters():  # norms and biases would otherwise be ones and zeros, and a mix-up unseen
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def parameters_of(modules):
    """The parameters of modules by the names that another program gives to these modules."""
    parameters = ((name, *pair) for name, module in modules.items() for pair in module.named_parameters())
    return {f"{name}.{part}": value.detach() for name, part, value in parameters}


def fairseq_weights(model):
    """The weights under fairseq's names, going through its module tree rather than through a table of names."""
    inner, modules = model.wav2vec2, {}
    for i, block in enumerate(inner.feature_extractor.conv_layers):
        modules[f"feature_extractor.conv_layers.{i}.0"] = block.conv
        if hasattr(block, "layer_norm"):  # after conv (0) and dropout (1); a layer norm sits between two transposes
            is_group = isinstance(block.layer_norm, torch.nn.GroupNorm)
            modules[f"feature_extractor.conv_layers.{i}.2" + ("" if is_group else ".1")] = block.layer_norm
    for i, layer in enumerate(inner.encoder.layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            modules[f"encoder.layers.{i}.self_attn.{name}"] = getattr(layer.attention, name)
        modules[f"encoder.layers.{i}.self_attn_layer_norm"] = layer.layer_norm
        modules[f"encoder.layers.{i}.fc1"] = layer.feed_forward.intermediate_dense
        modules[f"encoder.layers.{i}.fc2"] = layer.feed_forward.output_dense
        modules[f"encoder.layers.{i}.final_layer_norm"] = layer.final_layer_norm
    modules["layer_norm"] = inner.feature_projection.layer_norm
    modules["post_extract_proj"] = inner.feature_projection.projection
    modules["encoder.layer_norm"] = inner.encoder.layer_norm
    modules["quantizer.weight_proj"] = model.quantizer.weight_proj
    modules |= {"project_q": model.project_q, "final_proj": model.project_hid}
    positions = inner.encoder.pos_conv_embed.conv
    return parameters_of(modules) | {
        "mask_emb": inner.masked_spec_embed.detach(),
        "quantizer.vars": model.quantizer.codevectors.detach(),
        "encoder.pos_conv.0.bias": positions.bias.detach(),
        "encoder.pos_conv.0.weight_g": positions.parametrizations.weight.original0.detach(),
        "encoder.pos_conv.0.weight_v": positions.parametrizations.weight.original1.detach(),
    }


def fairseq_options(large=False, **changes):
    options = dict(
        extractor_mode="layer_norm" if large else "default", layer_norm_first=large, conv_bias=large,
        conv_feature_layers=CONVS, encoder_layers=2, encoder_embed_dim=32, encoder_ffn_embed_dim=48,
        encoder_attention_heads=2, activation_fn="gelu", dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        encoder_layerdrop=0.05, dropout_input=0.1, dropout_features=0.1, quantize_targets=True, quantize_input=False,
        target_glu=False, final_dim=16, latent_vars=12, latent_groups=2, latent_dim=0, conv_pos=16, conv_pos_groups=2,
        mask_prob=0.65, mask_length=10, num_negatives=100, logit_temp=0.1,
    )  # fmt: skip
    return options | changes


def save_fairseq(path, weights, options, normalize=False, **more):
    cfg = {"model": {"_name": "wav2vec2", **options}, "task": {"_name": "audio_pretraining", "normalize": normalize},
           "criterion": {"_name": "wav2vec", "loss_weights": [0.2, 10.0]}}  # fmt: skip
    torch.save({"args": None, "cfg": cfg, "model": weights, "optimizer_history": [{"num_updates": 4}], **more}, path)
    return path


def outputs(model):
    waveforms = torch.randn(2, 6_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(waveforms)
    return found.projected_states, found.projected_quantized_states


def assert_equal(weights, others):
    assert sorted(weights) == sorted(others)
    for key, value in weights.items():
        assert torch.equal(value, others[key]) and value.dtype == others[key].dtype, key


def assert_same(model, other):
    for ours, theirs in zip(outputs(model), outputs(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_a_fairseq_checkpoint_loads_whole_in_stock_classes(tmp_path, large):
    model = make_model(large)
    path = save_fairseq(tmp_path / "checkpoint.pt", fairseq_weights(model), fairseq_options(large), normalize=large)
    assert run_here(convert_checkpoint.main, path, "--output_dir", tmp_path / "out") == 0
    loaded, report = Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same(model, loaded.eval())
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").do_normalize == large
    config = loaded.config
    assert (config.layerdrop, config.feat_proj_dropout, config.num_negatives) == (0.05, 0.1, 100)
    assert (config.diversity_loss_weight, config.contrastive_logits_temperature) == (0.2, 0.1)
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}


def test_older_fairseq_checkpoints_come_back(tmp_path):
    model, options = make_model(), argparse.Namespace(**fairseq_options(), normalize=True)
    for new_format in (True, False):
        path = tmp_path / f"{new_format}.pt"
        content = {"args": options, "model": fairseq_weights(model)}
        torch.save(content, path, _use_new_zipfile_serialization=new_format)
        converted, extractor = convert_fairseq(path)
        assert_same(model, converted)
        assert extractor.do_normalize
    half = {key: value.half() for key, value in fairseq_weights(model).items()}
    converted, _ = convert_fairseq(save_fairseq(tmp_path / "half.pt", half, fairseq_options()))
    assert {value.dtype for value in converted.state_dict().values()} == {torch.float32}


def test_unknown_classes_are_inert_and_calls_never_made(tmp_path, monkeypatch):
    module = types.ModuleType("fairseq_dictionary")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
    dictionary = module.Dictionary()
    dictionary.symbols = ["a"]

    class Attack:
        def __reduce__(self):
            return subprocess.call, (["touch", str(tmp_path / "executed")],)

    model = make_model()
    odd = {"task_state": dictionary, "extra_state": Attack()}
    path = save_fairseq(tmp_path / "odd.pt", fairseq_weights(model), fairseq_options(), **odd)
    monkeypatch.delitem(sys.modules, module.__name__)
    assert_same(model, convert_fairseq(path)[0])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "key, length, message",
    [
        ("quantizer.vars", 0, "Missing key.*quantizer.codevectors"),
        ("target_glu", 1, "no place for target_glu"),
        ("encoder.layers.2.fc1.bias", 48, "Unexpected key.*layers.2"),
        ("project_q.bias", 3, "size mismatch for project_q.bias"),
        ("w2v_encoder.proj.weight", 3, "fine-tuned model"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, key, length, message):
    weights = fairseq_weights(make_model()) | {key: torch.ones(length)}
    if not length:
        del weights[key]
    with pytest.raises(UserError, match=message):
        convert_fairseq(save_fairseq(tmp_path / "odd.pt", weights, fairseq_options()))


@pytest.mark.parametrize(
    "changes",
    [{"quantize_targets": False}, {"quantize_input": True}, {"target_glu": True}, {"pos_conv_depth": 5},
     {"layer_type": "conformer"}, {"activation_fn": "gelu_fast"}, {"extractor_mode": "other"},
     {"conv_feature_layers": "__import__('os').getcwd()"}, {"conv_feature_layers": "[(16, 10)]"}],
    ids=str,
)  # fmt: skip
def test_options_without_a_counterpart_are_named(tmp_path, changes):
    path = save_fairseq(tmp_path / "odd.pt", fairseq_weights(make_model()), fairseq_options(**changes))
    with pytest.raises(UserError, match=next(iter(changes))):
        convert_fairseq(path)


def test_the_conv_layers_are_read_as_python_would():
    for text in (CONVS, "[(512, 10, 5), (4,3,2),]*2 + [ (512, 3, 2)] * 4 + [(512,2,2)]", "[(4, 3, 2)]"):
        assert conv_layers(text, Path("x.pt")) == eval(text)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "a list"])
def test_a_file_that_is_no_checkpoint_is_the_users_slip(tmp_path, content):
    path = tmp_path / "odd.pt"
    torch.save([1, 2], path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="odd.pt"):
        convert_fairseq(path)


def save_folder(folder, model, normalize=False):
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=normalize).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_a_folder_goes_to_fairseq_and_back(tmp_path, large):
    model = make_model(large, layerdrop=0.05, num_negatives=100)
    folder, there = save_folder(tmp_path / "run", model, normalize=large), tmp_path / "there"
    assert run_here(convert_checkpoint.main, folder, "--to", "fairseq", "--output_dir", there) == 0
    checkpoint = torch.load(there / "checkpoint.pt", weights_only=True)  # plain dictionaries and tensors
    assert_equal(checkpoint["model"], fairseq_weights(model))
    expected = fairseq_options(large, latent_dim=16, dropout_input=0.0, dropout_features=0.0)
    found = checkpoint["cfg"]["model"] | {"conv_feature_layers": CONVS}
    assert {name: found.get(name, value) for name, value in expected.items()} == expected
    assert eval(checkpoint["cfg"]["model"]["conv_feature_layers"]) == eval(CONVS)

    assert run_here(convert_checkpoint.main, there / "checkpoint.pt", "--output_dir", tmp_path / "back") == 0
    assert_equal(Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "back").state_dict(), model.state_dict())
    same = [json.loads((path / "preprocessor_config.json").read_text()) for path in (folder, tmp_path / "back")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "changes, message",
    [({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"), ({"hidden_act": "gelu_new"}, "hidden_act is gelu_new"),
     ({"conv_dim": [16] * 6 + [32]}, "equally wide"), ({"mask_time_prob": 0.0}, "mask embedding")],
    ids=str,
)  # fmt: skip
def test_models_that_fairseq_cannot_compute_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        export_fairseq(save_folder(tmp_path, Wav2Vec2ForPreTraining(tiny_config(**changes))))


def test_only_whole_pretrained_folders_go_to_fairseq(tmp_path, capsys):
    Wav2Vec2ForCTC(tiny_config(vocab_size=5)).save_pretrained(tmp_path / "ctc")
    (tmp_path / "empty").mkdir()
    for name, reason in (("ctc", "no quantizer and projections"), ("empty", "no config.json")):
        flags = [tmp_path / name, "--to", "fairseq", "--output_dir", tmp_path / "out"]
        refusal(capsys, convert_checkpoint.main, *flags, named=[tmp_path / name, reason])
    refusal(capsys, convert_checkpoint.main, *flags, "--without_positions", named=["--without_positions"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old_names", [True, False], ids=["torch 1", "torch 2"])
def test_a_speechbrain_checkpoint_of_the_stock_model(tmp_path, old_names):
    """SpeechBrain's `Wav2Vec2Pretrain` holds the stock model as `self.model`; torch renamed weight norm."""
    model = make_model()
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")) if old_names else ():
        stem = "model.wav2vec2.encoder.pos_conv_embed.conv."
        weights[stem + old] = weights.pop(f"{stem}parametrizations.weight.{new}")
    model.config.save_pretrained(tmp_path / "architecture")
    torch.save(weights, tmp_path / "wav2vec2.ckpt")
    flags = [tmp_path, "--output_dir", tmp_path / "out", "--config_name", tmp_path / "architecture"]
    assert run_here(convert_checkpoint.main, *flags) == 0
    assert_same(model, Wav2Vec2ForPreTraining.from_pretrained(tmp_path / "out").eval())
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").do_normalize
    with pytest.raises(UserError, match="the architecture"):
        convert_speechbrain(tmp_path, "base")


def speechbrains_own(model):
    """File → weights of SpeechBrain's own architecture, going through its module tree."""
    inner, layers = model.wav2vec2, {}
    convs = {"norm": inner.feature_projection.layer_norm}
    for i, block in enumerate(inner.feature_extractor.conv_layers):
        convs[f"extractor.convblock_{i}.convs.conv_0.conv"] = block.conv
        convs[f"extractor.convblock_{i}.convs.norm_0.norm"] = block.layer_norm
    encoder = {"mask_emb": inner.masked_spec_embed.detach(), "positional_encoding.pe": torch.ones(1, 2500, 32)}
    for i, layer in enumerate(inner.encoder.layers):
        name, attention = f"latent_encoder.layers.{i}", layer.attention
        for part in ("weight", "bias"):
            packed = [getattr(getattr(attention, f"{which}_proj"), part).detach() for which in "qkv"]
            encoder[f"{name}.self_att.att.in_proj_{part}"] = torch.cat(packed)
        layers[f"{name}.self_att.att.out_proj"] = attention.out_proj
        layers |= {f"{name}.norm1.norm": layer.layer_norm, f"{name}.norm2.norm": layer.final_layer_norm}
        layers[f"{name}.pos_ffn.ffn.0"] = layer.feed_forward.intermediate_dense
        layers[f"{name}.pos_ffn.ffn.3"] = layer.feed_forward.output_dense
    layers["input_projector"] = inner.feature_projection.projection
    layers["latent_encoder.norm.norm"] = inner.encoder.layer_norm
    codes = {"quantiser.vars": model.quantizer.codevectors.detach(), "quantiser.max_ent": torch.ones(())}
    quantizer = {"quantiser.weight_proj": model.quantizer.weight_proj, "proj": model.project_q}
    return {
        "latent_extractor": parameters_of(convs),
        "latent_encoder": encoder | parameters_of(layers),
        "target_quantiser": codes | parameters_of(quantizer),
        "feat_proj": model.project_hid.state_dict(),
    }


def test_speechbrains_own_model_but_for_its_positions(tmp_path):
    model = make_model(large=True, conv_bias=False, layer_norm_eps=1e-6)
    positions = model.wav2vec2.encoder.pos_conv_embed.conv
    for parameter in (positions.parametrizations.weight.original0, positions.bias):
        parameter.data.zero_()
    for name, weights in speechbrains_own(model).items():
        torch.save(weights, tmp_path / f"{name}.ckpt")
    converted, extractor = convert_without_positions(tmp_path, 2, model.config.conv_stride)
    assert_same(model, converted)
    assert extractor.do_normalize
    norm = converted.wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight
    assert norm.original1.norm() > 0  # where the gradient of the zero norm comes from
    with pytest.raises(UserError, match="--conv_stride"):
        convert_without_positions(tmp_path, 2, [5] * 8)
    with pytest.raises(UserError, match="sinusoidal positions"):
        convert_speechbrain(tmp_path, "base")
    (tmp_path / "feat_proj.ckpt").unlink()
    with pytest.raises(UserError, match="feat_proj.ckpt"):
        convert_without_positions(tmp_path, 2, model.config.conv_stride)


def test_the_script_refuses_existing_and_absent_paths(tmp_path, capsys):
    (tmp_path / "odd.pt").touch()
    assert run_here(convert_checkpoint.main, tmp_path / "odd.pt", "--output_dir", tmp_path) == 2
    assert run_here(convert_checkpoint.main, tmp_path / "absent.pt", "--output_dir", tmp_path / "new") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "exists already" in errors[0] and "absent.pt" in errors[1]
