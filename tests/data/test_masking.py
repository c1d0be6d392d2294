"""Masks and distractors as properties over 1,000 random shapes, and against the stock model's own functions."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2Model
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from w2v2.data.hashing import derive
from w2v2.data.masking import distractors, kept_rows, latent_lengths, mask_spans

NUM_SHAPES = 1_000


def keys_of(num_rows, seed=0):
    return derive(seed, 0, torch.arange(num_rows))


@cache
def random_masks():
    """(keys, frames, prob, length, min_spans, mask) of all kinds, rows of no frame at all and of less than a span among
    them.
    """
    rng, shapes = np.random.default_rng(0), []
    for shape in range(NUM_SHAPES):
        longest = int(rng.choice([3, 30, 120, 400]))
        frames = torch.from_numpy(rng.integers(0, longest + 1, int(rng.integers(1, 9))))
        prob, length = float(rng.choice([0.05, 0.3, 0.65, 0.9])), int(rng.choice([1, 2, 4, 10, 15]))
        arguments = keys_of(len(frames), seed=shape), frames, prob, length, int(rng.integers(0, 4))
        shapes.append((*arguments, mask_spans(*arguments)))
    return shapes


def runs(mask):
    """Lengths of the stretches of masked frames, of all rows."""
    line = np.pad(mask.numpy().astype(int), ((0, 0), (1, 1))).ravel()
    edges = np.flatnonzero(np.diff(line))
    return edges[1::2] - edges[::2]


def chi_square_bound(cells):
    return (cells - 1) + 5 * (2 * (cells - 1)) ** 0.5


# -- latent lengths


def test_latent_lengths_are_those_of_the_stock_convs():
    model = Wav2Vec2Model(Wav2Vec2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                         conv_dim=[2] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=1))  # fmt: skip
    config = model.config
    for num_samples in (400, 719, 720, 1039, 1040, 5119, 16_000):
        expected = model.feature_extractor(torch.zeros(1, num_samples)).shape[-1]
        assert latent_lengths(torch.tensor(num_samples), config.conv_kernel, config.conv_stride) == expected
    assert not latent_lengths(torch.arange(400), config.conv_kernel, config.conv_stride).any()
    many = torch.arange(400, 40_000, 7)
    expected = model._get_feat_extract_output_lengths(many)
    assert torch.equal(latent_lengths(many, config.conv_kernel, config.conv_stride), expected)


# -- masks


def test_masks_are_as_many_spans_inside_their_row_as_asked():
    for _, frames, prob, length, min_spans, mask in random_masks():
        assert mask.shape == (len(frames), frames.max()) and mask.dtype == torch.bool
        assert not mask[torch.arange(mask.shape[1]) >= frames[:, None]].any(), "masked beyond a row's end"
        assert (runs(mask) >= length).all(), "a stretch shorter than a span"
        for num_masked, t in zip(mask.sum(1).tolist(), frames.tolist(), strict=True):
            room = min(t // length, max(t - length + 1, 0))
            fewest = min(max(int(prob * t / length), min_spans), room)
            most = min(max(int(prob * t / length) + 1, min_spans), room)
            assert (length + fewest - 1 if fewest else 0) <= num_masked <= most * length


def test_a_mask_depends_on_its_own_row_alone():
    """Not on the rows beside it, the padding, or the order of the batch."""
    for keys, frames, prob, length, min_spans, together in random_masks():
        some = torch.randperm(len(frames))[: int(torch.randint(1, len(frames) + 1, ()))]
        apart = mask_spans(keys[some], frames[some], prob, length, min_spans)
        assert torch.equal(together[some, : apart.shape[1]], apart)


def test_49_percent_of_the_frames_of_long_rows_are_masked():
    for t, num_rows in [(780, 400), (3_000, 100)]:
        mask = mask_spans(keys_of(num_rows, seed=3), torch.full((num_rows,), t), prob=0.65, length=10)
        assert abs(float(mask.float().mean()) - 0.49) < 0.01


@pytest.mark.parametrize("t, prob, length, min_spans", [(30, 0.65, 10, 2), (49, 0.65, 10, 2), (200, 0.65, 10, 2),
                                                        (300, 0.3, 4, 0), (25, 0.05, 10, 1)])  # fmt: skip
def test_masked_fraction_is_that_of_transformers(t, prob, length, min_spans):
    """Mean over rows, each rounded by itself: equal within five standard errors."""
    np.random.seed(0)
    stock = [_compute_mask_indices((1, t), prob, length, min_masks=min_spans)[0] for _ in range(1_500)]
    stock = np.stack(stock).mean(1)
    ours = mask_spans(keys_of(4_000, seed=5), torch.full((4_000,), t), prob, length, min_spans).double().mean(1).numpy()
    error = (stock.var() / len(stock) + ours.var() / len(ours)) ** 0.5
    assert abs(stock.mean() - ours.mean()) < max(5 * error, 1e-12)


def test_every_start_of_a_span_is_equally_likely():
    """One span of 20 in 25 frames: six starts, and the last frames are reached as often as the first."""
    mask = mask_spans(keys_of(6_000), torch.full((6_000,), 25), prob=0.65, length=20)
    counts = torch.bincount(mask.int().argmax(1), minlength=6).double()
    assert len(counts) == 6 and float(((counts - 1_000) ** 2 / 1_000).sum()) < chi_square_bound(6)


def test_the_number_of_spans_is_rounded_at_random():
    """0.5 · 25 / 5 = 2.5 spans: two and three equally often; three starts of five frames cannot hide in ten."""
    mask = mask_spans(keys_of(8_000), torch.full((8_000,), 250), prob=0.05, length=5, min_spans=0)
    three = (mask.sum(1) > 10).double().mean()
    assert 0.44 < float(three) <= 0.5 + 5 * (0.25 / 8_000) ** 0.5


# -- distractors


def test_distractors_are_other_masked_frames_of_the_row():
    rng = np.random.default_rng(1)
    for shape in range(NUM_SHAPES):
        counts = torch.from_numpy(rng.integers(2, 60, int(rng.integers(1, 7))))
        K = int(rng.integers(1, 30))
        drawn = distractors(keys_of(len(counts), seed=shape), counts, int(counts.max()), K)
        assert drawn.shape == (len(counts), counts.max(), K)
        frame = torch.arange(int(counts.max()))[:, None]
        own = frame < counts[:, None, None]  # slots that hold a masked frame
        assert drawn.min() >= 0 and (drawn < counts[:, None, None]).all(), "outside the row's masked frames"
        assert ((drawn != frame) | ~own).all(), "the positive itself"


def test_distractors_depend_on_their_own_row_alone():
    rng = np.random.default_rng(2)
    for shape in range(NUM_SHAPES):
        counts = torch.from_numpy(rng.integers(2, 40, int(rng.integers(2, 6))))
        keys = keys_of(len(counts), seed=shape)
        together = distractors(keys, counts, int(counts.max()) + 3, 7)
        row = int(rng.integers(len(counts)))
        alone = distractors(keys[row : row + 1], counts[row : row + 1], int(counts[row]), 7)[0]
        assert torch.equal(together[row, : counts[row]], alone)


@pytest.mark.parametrize("count", [2, 3, 11])
def test_distractors_are_uniform_over_the_other_frames(count):
    num_rows, K = 300, 50
    drawn = distractors(keys_of(num_rows, seed=11), torch.full((num_rows,), count), count, K)
    for frame in range(count):
        counts = torch.bincount(drawn[:, frame].flatten(), minlength=count).double()
        others = torch.cat([counts[:frame], counts[frame + 1 :]])
        expected = num_rows * K / (count - 1)
        assert counts[frame] == 0
        assert float(((others - expected) ** 2 / expected).sum()) <= chi_square_bound(count - 1)


@pytest.mark.parametrize("counts", [[1], [0], [1, 0], [1, 5], [0, 2]])
def test_a_row_without_other_frames_can_be_gathered(counts):
    drawn = distractors(keys_of(len(counts)), torch.tensor(counts), max(counts), 4)
    assert drawn.shape[1] == max(counts)
    if drawn.numel():
        assert drawn.min() >= 0 and drawn.max() < max(counts)
        assert counts[0] != 1 or (drawn[0, 0] == 0).all()


# -- layerdrop


def test_layerdrop_depends_on_utterance_and_layer():
    keys = keys_of(4_000)
    kept = kept_rows(keys, 3, 0.3)
    assert kept.shape == (3, 4_000)
    assert torch.equal(kept[:, 7:9], kept_rows(keys[7:9], 3, 0.3))
    assert torch.equal(kept[:2], kept_rows(keys, 2, 0.3))
    bound = 5 * (0.21 / 4_000) ** 0.5
    assert (kept.double().mean(1) - 0.7).abs().max() < bound
    assert abs(float((kept[0] & kept[1]).double().mean()) - 0.49) < bound
    assert kept_rows(keys, 3, 0.0).all() and not kept_rows(keys, 3, 1.0).any()
