"""Folders of ours in other tools: each loads them as its users would, and computes what the stock model computes.

transformers is always there. Tests of other tools are skipped where the tool is not installed (docs/interoperate.md).
"""

import dataclasses
import importlib
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import run_here, tiny_config, write_csv, write_tones
from test_finetune_ctc import command, write_manifest
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    AutoModelForPreTraining,
    AutoProcessor,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

import finetune_ctc
import pretrain
from w2v2.convert.fairseq import convert_fairseq
from w2v2.convert.speechbrain import convert_speechbrain, convert_without_positions
from w2v2.model.pretraining import build_model

SECONDS = [2.5, 3.0, 2.2]
SPEECHBRAIN = "speechbrain.integrations.huggingface.wav2vec2"


@pytest.fixture(scope="module", params=[False, True], ids=["base", "large"])
def pretrained(request, tmp_path_factory):
    """What pretrain.py leaves after an update of a tiny model of either family."""
    folder = tmp_path_factory.mktemp("pretrained")
    tiny_config(request.param).save_pretrained(folder / "architecture")
    Wav2Vec2FeatureExtractor(do_normalize=request.param).save_pretrained(folder / "architecture")
    manifest = write_csv(folder / "train.csv", write_tones(folder / "audio", SECONDS), SECONDS)
    flags = ["--train_data", manifest, "--output_dir", folder / "run", "--config_name", folder / "architecture",
             "--batch_hours", 0.001, "--max_steps", 1, "--warmup_steps", 1, "--report_to", "none", "--use_cpu",
             "--dataloader_num_workers", 0]  # fmt: skip
    assert run_here(pretrain.main, *flags) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def recogniser(pretrained, tmp_path_factory):
    """What finetune_ctc.py makes of it."""
    folder = tmp_path_factory.mktemp("recogniser")
    write_manifest(folder / "train.csv", ["One two.", "two", "three one", "two three"], seed=0)
    write_manifest(folder / "dev.csv", ["two one", "three"], seed=1)
    finetune_ctc.main(command(folder, "--model_name_or_path", str(pretrained), model=None))
    return folder / "run"


WAVEFORM = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32) + 0.05
VALUES = torch.from_numpy(WAVEFORM)[None]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def stock_output(folder):
    """What the stock model makes of the waveform, behind the folder's own feature extractor."""
    extractor, model = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    return model(**extractor(WAVEFORM, sampling_rate=16_000, return_tensors="pt"), output_hidden_states=True)


def assert_close(found, expected, within=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


def test_auto_classes_load_the_folder_whole_and_agree(pretrained):
    frames = stock_output(pretrained).last_hidden_state
    model, report = AutoModelForPreTraining.from_pretrained(pretrained, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    flags = SimpleNamespace(model_name_or_path=str(pretrained), feature_grad_mult=1.0, feature_penalty_weight=0.0,
                            gradient_checkpointing=False, positional_conv="auto", torch_compile=False,
                            fused_kernels=False, freeze_feature_encoder=False)  # fmt: skip
    ours = build_model(flags, model.config).eval()
    inputs = AutoFeatureExtractor.from_pretrained(pretrained)(WAVEFORM, sampling_rate=16_000, return_tensors="pt")
    assert_close(model.eval().wav2vec2(**inputs).last_hidden_state, frames, within=0)
    assert_close(ours.wav2vec2(**inputs).last_hidden_state, frames)


def test_the_pipeline_recognises_as_the_model_does(recogniser):
    said = pipeline("automatic-speech-recognition", model=str(recogniser), device="cpu")(WAVEFORM.copy())["text"]
    processor, model = AutoProcessor.from_pretrained(recogniser), AutoModelForCTC.from_pretrained(recogniser).eval()
    logits = model(**processor(WAVEFORM, sampling_rate=16_000, return_tensors="pt")).logits
    assert said == processor.batch_decode(logits.argmax(-1))[0]


def test_the_documented_onnx_models_compute_the_same(pretrained, recogniser, tmp_path, monkeypatch):
    """docs/onnx.md, block by block: recogniser, its text, encoder, and a recogniser with an attention mask."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    page = (Path(__file__).resolve().parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    export, run, encode, export_masked = map(textwrap.dedent, re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    (tmp_path / "runs").mkdir()
    for name, folder in (("mine", pretrained), ("mine_ctc", recogniser)):
        (tmp_path / "runs" / name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    soundfile.write("speech.wav", WAVEFORM, 16_000, "FLOAT")
    model, processor = AutoModelForCTC.from_pretrained(recogniser).eval(), AutoProcessor.from_pretrained(recogniser)
    scope = {}

    exec(export + run, scope)
    expected = model(**processor(WAVEFORM, sampling_rate=16_000, return_tensors="pt")).logits
    assert_close(torch.from_numpy(scope["logits"]), expected)
    assert scope["text"] == processor.batch_decode(expected.argmax(-1))[0]
    for shape in ((1, 400), (1, 8_001), (3, 20_000)):
        values = torch.randn(shape)
        logits = scope["session"].run(["logits"], {"input_values": values.numpy()})[0]
        assert_close(torch.from_numpy(logits), model(values).logits)

    exec(encode, scope)
    session = scope["onnxruntime"].InferenceSession("mine.onnx", providers=["CPUExecutionProvider"])
    frames = session.run(["last_hidden_state"], {"input_values": VALUES.numpy()})[0]
    assert_close(torch.from_numpy(frames), AutoModel.from_pretrained(pretrained).eval()(VALUES).last_hidden_state)

    exec(export_masked, scope | {"model": model})
    session = scope["onnxruntime"].InferenceSession("mine_ctc.onnx", providers=["CPUExecutionProvider"])
    values, mask = torch.randn(3, 20_000), (torch.arange(20_000) < torch.tensor([[20_000], [9_000], [400]])).long()
    logits = session.run(["logits"], {"input_values": values.numpy(), "attention_mask": mask.numpy()})[0]
    assert_close(torch.from_numpy(logits), model(values, attention_mask=mask).logits)


def test_torchaudio_imports_it(pretrained, recogniser):
    utils = pytest.importorskip("torchaudio.models.wav2vec2.utils", exc_type=(ImportError, OSError))
    stock = AutoModel.from_pretrained(pretrained).eval()
    layers, _ = utils.import_huggingface_model(stock).eval().extract_features(VALUES)
    expected = stock(VALUES, output_hidden_states=True)
    for theirs, ours in zip(layers[:-1], expected.hidden_states[1:-1], strict=True):
        assert_close(theirs, ours)
    last = stock.encoder.layer_norm if stock.config.do_stable_layer_norm else torch.nn.Identity()
    assert_close(last(layers[-1]), expected.last_hidden_state)
    tuned = AutoModelForCTC.from_pretrained(recogniser).eval()
    logits, _ = utils.import_huggingface_model(tuned).eval()(VALUES)
    assert_close(logits, tuned(VALUES).logits)


@pytest.mark.parametrize("all_layers", [False, True])
def test_speechbrains_wrapper_gives_the_same_frames(pretrained, tmp_path, all_layers):
    """Its epsilon of normalisation is 1e-5, the feature extractor's 1e-7: fed the same, the frames are the same."""
    module = pytest.importorskip(SPEECHBRAIN)
    wrapper = module.Wav2Vec2(str(pretrained), str(tmp_path), freeze=True, output_all_hiddens=all_layers).eval()
    stock = AutoModel.from_pretrained(pretrained).eval()
    assert wrapper.normalize_wav == AutoFeatureExtractor.from_pretrained(pretrained).do_normalize
    fed = torch.nn.functional.layer_norm(VALUES, VALUES.shape[1:]) if wrapper.normalize_wav else VALUES
    found = wrapper(VALUES)
    for expected, within in ((stock(fed, output_hidden_states=True), 1e-5), (stock_output(pretrained), 5e-3)):
        expected = torch.stack(expected.hidden_states) if all_layers else expected.last_hidden_state
        assert_close(found, expected, within)


def test_a_checkpoint_that_speechbrain_pretrained_comes_back(pretrained, tmp_path):
    module = pytest.importorskip(SPEECHBRAIN)
    trained = module.Wav2Vec2Pretrain(source=str(pretrained), save_path=str(tmp_path / "cache"))
    trained.model.quantizer.codevectors.data += 1.0
    torch.save(trained.state_dict(), tmp_path / "wav2vec2.ckpt")  # as its checkpointer does
    converted, _ = convert_speechbrain(tmp_path, str(pretrained))
    expected = trained.model.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.state_dict().items())


def test_speechbrains_own_encoder_but_for_its_positions(tmp_path):
    pytest.importorskip(SPEECHBRAIN)
    own, transformer = (
        importlib.import_module(f"speechbrain.lobes.models.{name}") for name in ("wav2vec", "transformer.Transformer")
    )
    convs = own.W2VLatentExtractor([16] * 7, [11, 3, 3, 3, 3, 3, 3], [5, 2, 2, 2, 2, 3, 3])
    layers = transformer.TransformerEncoder(
        2, 2, 48, d_model=32, dropout=0.1, activation=torch.nn.GELU, normalize_before=True, layerdrop_prob=0.05
    )
    encoder = own.EncoderWrapper(16, 32, layers)
    quantizer, projection = own.W2VTargetQuantiser(16, 16, num_vars=12), torch.nn.Linear(32, 16)
    modules = dict(latent_extractor=convs, latent_encoder=encoder, target_quantiser=quantizer, feat_proj=projection)
    for name, module in modules.items():
        for parameter in module.eval().parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        torch.save(module.state_dict(), tmp_path / f"{name}.ckpt")
    encoder.positional_encoding.pe.zero_()
    ours, extractor = convert_without_positions(tmp_path, 2, [5, 2, 2, 2, 2, 3, 3])
    found = ours(**extractor(WAVEFORM, sampling_rate=16_000, return_tensors="pt"))
    latents = convs(VALUES)
    assert_close(found.projected_states, projection(encoder(latents)["embeddings"]), within=1e-4)
    assert_close(found.projected_quantized_states, quantizer(latents)[0], within=1e-4)


def test_s3prls_upstream_gives_the_same_hidden_states(pretrained):
    expert = pytest.importorskip("s3prl.upstream.hf_wav2vec2.expert")
    upstream = expert.UpstreamExpert(str(pretrained)).eval()
    assert upstream.extracter.do_normalize == AutoFeatureExtractor.from_pretrained(pretrained).do_normalize
    found = upstream([torch.from_numpy(WAVEFORM)])["hidden_states"]
    for ours, theirs in zip(stock_output(pretrained).hidden_states, found, strict=True):
        assert_close(theirs, ours)


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_a_checkpoint_of_fairseqs_own_model_computes_the_same(tmp_path, large):
    """s3prl keeps a copy of fairseq's model: its weights, options and forward pass are not of our making."""
    fairseq = pytest.importorskip("s3prl.upstream.wav2vec2.wav2vec2_model")
    options = fairseq.Wav2Vec2Config(
        extractor_mode="layer_norm" if large else "default", layer_norm_first=large, conv_bias=large,
        conv_feature_layers="[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16,2,2)] * 2", encoder_layers=2, encoder_embed_dim=32,
        encoder_ffn_embed_dim=48, encoder_attention_heads=2, final_dim=16, latent_vars=12, latent_groups=2, conv_pos=16,
        conv_pos_groups=2, quantize_targets=True,
    )  # fmt: skip
    theirs = fairseq.Wav2Vec2Model(options).eval()
    for parameter in theirs.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    cfg = {"model": dataclasses.asdict(options), "task": {"normalize": large}}
    torch.save({"cfg": cfg, "model": theirs.state_dict()}, tmp_path / "checkpoint.pt")
    ours, extractor = convert_fairseq(tmp_path / "checkpoint.pt")
    assert extractor.do_normalize == large
    found = ours(VALUES)
    context = theirs(VALUES, mask=False, features_only=True)["x"]
    latents = theirs.layer_norm(theirs.feature_extractor(VALUES).transpose(1, 2))
    assert_close(found.projected_states, theirs.final_proj(context))
    assert_close(found.projected_quantized_states, theirs.project_q(theirs.quantizer(latents)["x"]))
