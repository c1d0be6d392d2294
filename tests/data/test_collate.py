"""Crops become micro-batches: 16-bit samples as they stand, floats where a file needs them, and the same sound on the
device.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_batch, tiny_config
from transformers import Wav2Vec2FeatureExtractor

from w2v2.data.collate import pad, sound


def samples(*lengths, dtype=np.int16):
    rng = np.random.default_rng(0)
    return [rng.integers(-32_768, 32_768, n).astype(dtype) for n in lengths]


def test_sixteen_bits_stay_sixteen_bits():
    rows = samples(5, 3)
    padded = pad(rows)
    assert padded.dtype == torch.int16
    assert padded.tolist() == [rows[0].tolist(), rows[1].tolist() + [0, 0]]


def test_one_row_of_floats_makes_all_rows_floats():
    (pcm,) = samples(4)
    floats = np.array([0.25, -3.0], np.float32)
    padded = pad([pcm, floats])
    assert padded.dtype == torch.float32
    assert padded[0].tolist() == (pcm.astype(np.float64) / 32_768).tolist()
    assert padded[1].tolist() == [0.25, -3.0, 0.0, 0.0]


@pytest.mark.parametrize("normalize", [False, True])
def test_sound_is_what_the_feature_extractor_makes(normalize):
    config, lengths = tiny_config(), [16_400, 9_000]
    rows = [row // 8 + 100 for row in samples(*lengths)]
    batch = replace(make_batch(config, lengths), waveforms=pad(rows), normalize=normalize)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize)
    heard = sound(batch)
    assert heard.dtype == torch.float32
    for row, length in enumerate(lengths):
        expected = extractor(rows[row] / np.float32(32_768), sampling_rate=16_000).input_values[0]
        np.testing.assert_allclose(heard[row, :length], expected, rtol=1e-5, atol=1e-5)
        assert not heard[row, length:].any()
    as_floats = replace(batch, waveforms=batch.waveforms / 32_768.0)
    torch.testing.assert_close(sound(as_floats), heard)


def test_host_and_device_agree_about_a_batch():
    config = tiny_config(layerdrop=0.5)
    batch = make_batch(config, [16_400, 9_000, 9_000, 24_000])
    assert list(batch.lengths) == batch.frames.tolist()
    for index, rows in enumerate(batch.kept_rows):
        assert batch.kept[index, : len(rows)].tolist() == sorted(rows)
        ends = torch.tensor([batch.lengths[row] for row in rows or [0]]).cumsum(0)
        assert batch.bounds[index, 1 : 1 + len(ends)].tolist() == ends.tolist()
    assert sorted(map(len, batch.kept_rows)) != [4, 4]  # layerdrop did drop something
    assert batch.bounds[-1].tolist() == [0, *np.cumsum(batch.lengths)]
    frames = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
    assert torch.equal(frames.flatten()[batch.inside], torch.cat([torch.arange(n) for n in batch.lengths]))
    assert not batch.uniform and make_batch(config, [9_000] * 2).uniform
