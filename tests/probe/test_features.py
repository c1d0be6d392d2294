"""Features of a frozen model against the stock model, one utterance at a time."""

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config
from datasets import Dataset
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForPreTraining, Wav2Vec2ForSequenceClassification

from w2v2.errors import UserError
from w2v2.probe import features

LENGTHS = (9_000, 16_123, 700, 12_345, 300)  # the last is shorter than a latent frame
NO_MASK = dict(mask_time_prob=0.0, mask_feature_prob=0.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    random = np.random.default_rng(0)
    rows = []
    for i, length in enumerate(LENGTHS):
        soundfile.write(folder / f"{i}.wav", random.uniform(-0.3, 0.3, length + 800), 16_000)
        rows.append({"id": f"u{i}", "audio": str(folder / f"{i}.wav"), "start": 0.05, "num_samples": length})
    for name, large in (("base", False), ("large", True)):
        torch.manual_seed(0)
        Wav2Vec2ForPreTraining(tiny_config(large)).save_pretrained(folder / name)
        Wav2Vec2FeatureExtractor(do_normalize=large, return_attention_mask=large).save_pretrained(folder / name)
    torch.manual_seed(1)
    config = tiny_config(**NO_MASK, num_labels=3, classifier_proj_size=8, use_weighted_layer_sum=True)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder / "tuned")
    return folder, Dataset.from_list(rows)


def waveform(row, extractor):
    samples = soundfile.read(row["audio"], dtype="float32")[0][800 : 800 + row["num_samples"]]
    samples = np.pad(samples, (0, max(0, 400 - len(samples))))
    return extractor(samples, sampling_rate=16_000, return_tensors="pt").input_values


@pytest.mark.parametrize("name", ["base", "large"])
@pytest.mark.parametrize("batch_seconds", [60.0, 0.1])
def test_means_are_the_stock_models_on_each_utterance_alone(corpus, name, batch_seconds, monkeypatch):
    monkeypatch.setattr(features, "BATCH_SECONDS", batch_seconds)
    folder, table = corpus
    stock = Wav2Vec2ForPreTraining.from_pretrained(folder / name).wav2vec2.eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder / name)
    found = features.FrozenModel(str(folder / name)).means(table)
    assert found.shape == (5, 3, 32)
    for row, means in zip(table, found, strict=True):
        with torch.no_grad():
            layers = stock(waveform(row, extractor), output_hidden_states=True).hidden_states
        expected = torch.stack([layer[0].mean(0) for layer in layers]).numpy()
        np.testing.assert_allclose(means, expected, rtol=1e-3, atol=2e-5)


def test_embeddings_are_what_the_last_layer_is_given(corpus):
    folder, table = corpus
    model = features.FrozenModel(str(folder / "tuned"))
    assert model.has_head
    stock = Wav2Vec2ForSequenceClassification.from_pretrained(folder / "tuned").eval()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    found = model.embeddings(table)
    with torch.no_grad():
        for row, embedding in zip(table, found, strict=True):
            expected = stock(waveform(row, extractor)).logits[0]
            np.testing.assert_allclose(stock.classifier(torch.tensor(embedding)), expected, rtol=1e-3, atol=1e-5)


def test_frames_in_files_are_the_utterances_frames_in_order(corpus, tmp_path):
    folder, table = corpus
    model = features.FrozenModel(str(folder / "base"))
    layers, starts = features.save_frames(model, table, tmp_path / "frames")
    means = model.means(table)
    assert len(layers) == 3 and starts[-1] == len(layers[0])
    for row in range(len(table)):
        for number, layer in enumerate(layers):
            frames = layer[starts[row] : starts[row + 1]].astype(np.float32)
            np.testing.assert_allclose(frames.mean(0), means[row, number], atol=5e-3)


def test_random_weights_follow_the_seed_and_the_configuration(corpus):
    folder, table = corpus
    one, same, other = (features.FrozenModel(None, str(folder / "base"), seed=seed).means(table) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.allclose(one, other)
    assert not features.FrozenModel(None, str(folder / "base")).has_head


def test_unreadable_audio_is_named(corpus, tmp_path):
    folder, table = corpus
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    broken = Dataset.from_list([*table.to_list(), table[0] | {"audio": str(tmp_path / "broken.wav")}])
    with pytest.raises(UserError, match="broken.wav"):
        features.FrozenModel(str(folder / "base")).means(broken)
