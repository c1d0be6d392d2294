"""Probes find what was planted, choose by validation alone, and never look at the test."""

import numpy as np
import pytest

from w2v2.finetune.labels import Split, group_splits
from w2v2.finetune.text import build_vocabulary, encode
from w2v2.probe import linear
from w2v2.probe.linear import CharacterProbe, FrameSet

SPLIT = Split("test", list(range(120)), list(range(120, 180)), list(range(180, 240)))


def planted(seed=0, n=240):
    """Features of three layers: noise, the label clearly, the label faintly; one dimension of another scale."""
    random = np.random.default_rng(seed)
    targets = random.choice(["a", "b", "c"], n)
    means = np.array([{"a": -1.0, "b": 0.0, "c": 1.0}[t] for t in targets])
    features = random.normal(size=(n, 3, 6))
    features[:, 1, 0] += 6 * means
    features[:, 2, 0] += 1 * means
    features[:, :, 5] *= 1e4
    return features.astype(np.float32), targets


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_the_layer_in_which_the_label_was_planted_is_found(kind):
    features, targets = planted()
    layers = linear.probe_layers(kind, features, targets, [SPLIT], "uar")
    assert linear.best_layer(layers)["layer"] == 1
    assert layers[1]["uar"] > (0.9 if kind == "logistic" else 0.6)  # a line of three classes masks the middle one
    assert layers[0]["uar"] < 0.5 and layers[0]["uar"] < layers[2]["uar"] + 0.1


def test_the_tests_labels_change_nothing_but_its_scores():
    features, targets = planted()
    wrong = targets.copy()
    wrong[180:] = np.random.default_rng(1).permutation(wrong[180:])
    found = [linear.probe_layers("logistic", features, t, [SPLIT], "uar") for t in (targets, wrong)]
    for key in ("validation", "strengths"):
        assert [layer[key] for layer in found[0]] == [layer[key] for layer in found[1]]
    assert linear.best_layer(found[0])["layer"] == linear.best_layer(found[1])["layer"]
    assert found[1][1]["uar"] < 0.6 < found[0][1]["uar"]


def test_folds_are_pooled_and_spread():
    features, targets = planted(n=120)
    groups = [f"s{i % 4}" for i in range(120)]
    layers = linear.probe_layers("logistic", features, targets, group_splits(groups, "speaker"), "uar")
    assert len(layers[1]["strengths"]) == 4 and layers[1]["std"]["accuracy"] >= 0
    assert layers[1]["accuracy"] == pytest.approx(layers[1]["mean"]["accuracy"], abs=1e-9)  # folds of one size


def test_the_best_layer_is_chosen_by_validation():
    layers = [dict(layer=i, validation=v, uar=u) for i, (v, u) in enumerate([(0.2, 0.9), (0.5, 0.1), (0.5, 0.3)])]
    assert linear.best_layer(layers)["layer"] == 1
    assert linear.best_layer(layers, lower_is_better=True)["layer"] == 0


def test_hours_heard_come_from_the_metrics_of_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "audio_hours": 0.5}\n{"step": 2, "audio_hours": 1.25}\n')
    assert [linear.heard_hours(str(path)) for path in (tmp_path, tmp_path / "none")] == [1.25, None]


def test_a_fifth_of_each_label_is_held_out_whatever_the_order():
    ids = [f"u{i}" for i in range(100)]
    targets = ["x"] * 50 + ["y"] * 45 + ["z"] * 5
    train, held = linear.hold_out(ids, targets, range(100))
    assert sorted(train + held) == list(range(100))
    assert {label: sum(targets[row] == label for row in held) for label in "xyz"} == {"x": 10, "y": 9, "z": 1}
    backwards = [ids[row] for row in linear.hold_out(ids, targets, range(99, -1, -1))[1]]
    assert backwards == [ids[row] for row in held]


TEXTS = ["AB", "BA", "A B", "ABBA", "B", "A", "BAB", "AAB"] * 6
VOCABULARY = build_vocabulary(TEXTS)


def spelled_frames(noise):
    """Frames that spell the texts (three of each character's direction, then a blank), and frames of noise."""
    random = np.random.default_rng(0)
    directions = 5 * np.eye(len(VOCABULARY), 12)
    pieces, starts = [], [0]
    for text in TEXTS:
        ids = [i for label in encode(text, VOCABULARY) for i in (label, label, label, 0)]
        pieces.append(directions[ids] + random.normal(0, noise, (len(ids), 12)))
        starts.append(starts[-1] + len(ids))
    frames = np.concatenate(pieces)
    layers = [random.normal(size=frames.shape), 100 * frames + 30]
    return [layer.astype(np.float16) for layer in layers], np.array(starts)


def test_a_ctc_head_reads_characters_but_not_noise():
    layers, starts = spelled_frames(0.5)
    rows = list(range(len(TEXTS)))
    split = Split("test", rows[:32], rows[32:40], rows[40:])
    results = CharacterProbe(TEXTS, VOCABULARY, num_updates=150, seed=0).probe_layers(layers, starts, split)
    assert results[1]["cer"] < 0.1 < 0.4 < results[0]["cer"]
    assert results[1]["validation"] < 0.1
    assert linear.best_layer(results, lower_is_better=True)["layer"] == 1


def test_frames_are_standardised_by_the_training_utterances():
    layers, starts = spelled_frames(0.5)
    data = FrameSet(layers[1], starts, range(20))
    frames = layers[1][: starts[20]].astype(np.float64)
    np.testing.assert_allclose(data.scaler.mean_, frames.mean(0), rtol=1e-4)
    np.testing.assert_allclose(data.scaler.scale_, frames.std(0), rtol=1e-4)
    batch, lengths = data.batch([3, 4])
    assert lengths.tolist() == [starts[4] - starts[3], starts[5] - starts[4]]
    assert batch.shape == (2, int(lengths.max()), 12) and not batch[1, lengths[1] :].any()
