"""The collapse watch on curves: healthy ones as docs/results.md has them, slow ones, and the ways in which runs are
known to fail.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_batch, tiny_config

from w2v2.arguments import PretrainArguments
from w2v2.model.pretraining import PretrainingModel, PretrainSums
from w2v2.train.collapse import Criteria, Limits, likely_causes
from w2v2.train.state import Totals

COLUMNS = ("step", "accuracy", "codebook_perplexity_hard", "distractors_left", "contrastive_loss")
# configs/pretrain/small.yaml, validation: docs/results.md; what lies before update 500 is the plateau and the
# sharpening of the codes.
SYNTHESIZED = [
    (1, 0.021, 126, 99.9, 4.62), (100, 0.022, 120, 99.5, 4.61), (200, 0.10, 9, 80, 4.3), (500, 0.252, 16.7, 90, 3.787),
    (1_000, 0.278, 22.2, 93, 3.635), (1_500, 0.276, 26.6, 95, 3.490), (2_000, 0.262, 33.2, 96, 3.427),
    (2_500, 0.278, 40.0, 97, 3.326), (3_000, 0.280, 46.8, 97.5, 3.251), (4_000, 0.281, 51.5, 97.8, 3.209),
]  # fmt: skip
REAL = [
    (1, 0.021, 126, 99.9, 4.62), (100, 0.022, 120, 99.5, 4.61), (250, 0.35, 5, 60, 3.6), (500, 0.395, 9.2, 75, 3.507),
    (1_000, 0.283, 16.6, 90, 3.566), (1_500, 0.243, 26.7, 94, 3.551), (2_000, 0.277, 29.7, 95, 3.451),
    (2_500, 0.225, 36.0, 96, 3.507), (3_000, 0.253, 36.5, 96, 3.427), (4_000, 0.253, 39.9, 96, 3.386),
]  # fmt: skip
# The codes of BASE dip in the first hundreds of updates; its accuracy leaves the plateau long before the warm-up of
# 32,000 ends.
BASE = [
    (1, 0.02, 500, 100, 4.62), (300, 0.02, 3, 70, 4.55), (900, 0.03, 3.5, 75, 4.5), (1_500, 0.06, 30, 95, 4.4),
    (10_000, 0.25, 150, 99, 3.6), (100_000, 0.5, 350, 100, 2.6), (400_000, 0.62, 420, 100, 2.1),
]  # fmt: skip
LATE_BASE = [
    (1, 0.02, 600, 100, 4.62), (32_500, 0.022, 600, 100, 4.61), (33_500, 0.2, 200, 99, 4.0), (400_000, 0.5, 400, 100, 2.5)
]  # fmt: skip
LATE_SMALL = [(1, 0.02, 126, 99.9, 4.62), (650, 0.022, 120, 99.8, 4.6), (800, 0.2, 12, 85, 4.2), (4_000, 0.28, 50, 98, 3.2)]  # fmt: skip


def from_points(points, every, noise=0.005, until=None):
    """Records of a curve through `points`, logged at every so many updates; the loss varies by `noise` from batch to
    batch.
    """
    steps = np.arange(every, (until or points[-1][0]) + 1, every)
    columns = [np.interp(steps, [p[0] for p in points], [p[c] for p in points]) for c in range(1, len(COLUMNS))]
    columns[-1] = columns[-1] * (1 + noise * np.random.default_rng(0).standard_normal(len(steps)))
    return [dict(zip(COLUMNS, map(float, row), strict=True)) for row in zip(steps, *columns, strict=True)]


def small(**changes):
    values = dict(window_steps=500, num_groups=2, num_distractors=100, codes_after=1_150, learning_after=500)
    return Limits(**(values | changes))


def base(**changes):
    return small(**(dict(window_steps=2_000, codes_after=0, learning_after=32_000) | changes))


def findings(records, limits):
    """(step, finding) of all records that the watch had something to say about."""
    watch = Criteria(limits)
    return [(record["step"], finding) for record in records if (finding := watch.add(record))]


@pytest.mark.parametrize(
    ("points", "every", "limits"),
    [
        (SYNTHESIZED, 50, small()),
        (SYNTHESIZED, 10, small(codes_after=0)),
        (REAL, 50, small()),
        (REAL, 1, small(codes_after=0)),
        (BASE, 100, base()),
        (BASE, 10, base()),
        (LATE_BASE, 100, base()),
        (LATE_SMALL, 50, small()),
    ],
    ids="synthesized synthesized-10 real real-1 base base-10 late-base late-small".split(),
)
def test_a_run_that_learns_sooner_or_later_is_left_alone(points, every, limits):
    assert findings(from_points(points, every), limits) == []


def joined(before, step, after, every, **more):
    """The first records of one curve, then, from `step` on, the others'."""
    return [r for r in from_points(before, every) if r["step"] < step] + [
        r for r in from_points(after, every, **more) if r["step"] >= step
    ]


FLAT = [(1, 0.02, 500, 100, 4.615), (400_000, 0.02, 500, 100, 4.615)]
ONE_CODE = [(1, 0.0, 2.0, 0.0, 0.0), (400_000, 0.0, 2.0, 0.0, 0.0)]
FEW_CODES = [(1, 0.5, 3.5, 40, 2.0), (400_000, 0.5, 3.5, 40, 1.0)]
A_CODE_AN_UTTERANCE = [(1, 0.3, 80, 4, 0.5), (400_000, 0.3, 80, 4, 0.3)]
SPREAD = [(1, 0.022, 126, 100, 4.6), (400_000, 0.024, 126, 100, 4.4)]


@pytest.mark.parametrize(
    ("records", "limits", "since", "sure_at", "criteria"),
    [
        (joined(SYNTHESIZED, 2_000, ONE_CODE, 50), small(), 2_000, 2_500, {"codes", "distractors", "loss"}),
        (joined(BASE, 50_000, ONE_CODE, 100), base(), 50_000, 52_000, {"codes", "distractors", "loss"}),
        (joined(BASE, 50_000, FLAT, 100, noise=1e-5), base(), 50_000, 52_000, {"accuracy", "loss"}),
        (joined(BASE, 50_000, FLAT, 100, noise=5e-3), base(), 50_000, 52_000, {"accuracy"}),
        (joined(REAL, 2_000, FEW_CODES, 50), small(), 2_000, 2_500, {"codes"}),
        (joined(REAL, 2_000, A_CODE_AN_UTTERANCE, 50), small(), 2_000, 2_500, {"distractors"}),
        (from_points(FEW_CODES, 50, until=4_000), small(), 50, 1_650, {"codes"}),  # counted once diversity has half its weight
        (from_points(SPREAD, 50, until=4_000), small(), 50, 1_000, {"accuracy"}),  # after a window in which to begin
        (from_points(FLAT, 100, 1e-5, until=50_000), base(), 100, 34_000, {"accuracy", "loss"}),  # after warm-up
    ],
    ids="one-code one-code-base diverged diverged-noisy few-codes a-code-an-utterance from-the-start never-learns flat".split(),
)  # fmt: skip
def test_a_collapse_is_warned_of_and_sure_a_window_long(records, limits, since, sure_at, criteria):
    (warned_at, warning), (found_at, sure) = findings(records, limits)
    assert (warning.is_sure, sure.is_sure) == (False, True)
    assert warned_at == sure_at - limits.window_steps / 2 and found_at == sure_at
    assert sure.criteria == criteria and sure.since == since
    assert f"since update {since:,}" in sure.text and "\n" not in sure.text


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_the_collapse_after_a_recovery_is_a_new_one(share):
    until = 2_000 + share * 500
    curve = joined(REAL, 2_000, FEW_CODES, 10)
    healthy = {r["step"]: r for r in from_points(REAL, 10)}
    records = [healthy[r["step"]] if until <= r["step"] < 3_000 else r for r in curve if r["step"] <= 4_000]
    found = [(step, finding.is_sure) for step, finding in findings(records, small())]
    assert found == [(2_250, False)] * (share > 0.5) + [(3_250, False), (3_500, True)]


def test_chance_follows_the_distractors_that_are_left():
    """An accuracy of .05 is five times chance among 100 distractors and none at all among 20."""
    for left, expected in ((100, 0), (20, 2)):
        points = [(1, 0.05, 60, left, 4.0), (4_000, 0.05, 60, left, 3.0)]
        assert len(findings(from_points(points, 50), small())) == expected


def test_a_context_that_ignores_the_audio_is_found_out():
    """It is far above chance, because a few codes are common: it earns what always guessing the commonest does."""
    config = tiny_config(num_codevectors_per_group=16, num_negatives=100)
    model = PretrainingModel(config).train()
    with torch.no_grad():
        model.quantizer.weight_proj.weight.mul_(0.3)
        model.quantizer.weight_proj.bias.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    model.quantizer.requires_grad_(False)
    projection = model.wav2vec2.feature_projection.projection.requires_grad_(False)
    projection.weight.zero_()  # the context is told nothing of the audio
    optimizer, records = torch.optim.Adam(model.parameters(), lr=0.01), []
    for step in range(1, 61):
        sums = model(make_batch(config, [20_000] * 4, epoch=step), 0.5)
        optimizer.zero_grad()
        (sums.loss / sums.num_masked).backward()
        optimizer.step()
        records.append(Totals(PretrainSums(*(x.detach() for x in sums))).metrics() | {"step": step})
    limits = small(window_steps=40, learning_after=10)
    assert np.mean([r["accuracy"] * (1 + r["distractors_left"]) for r in records]) > 4
    (_, warning), (sure_at, sure) = findings(records, limits)
    assert sure_at == 50 and sure.criteria == {"accuracy"} and "a constant guess earns" in warning.text
    for record in records:  # as earlier versions logged them
        del record["constant_guess_accuracy"]
    assert findings(records, limits) == []


def test_rare_records_have_to_be_four():
    (_, warning), (sure_at, _) = findings(from_points(FEW_CODES, 1_000, until=9_000), base())
    assert not warning.is_sure and sure_at == 4_000


def test_records_without_figures_count_neither_way():
    records = joined(REAL, 2_000, FEW_CODES, 10)
    expected = findings(records, small())
    for record in records[::7]:
        record["contrastive_loss"] = float("nan")
    found = findings(records, small())
    assert [finding.criteria for _, finding in found] == [finding.criteria for _, finding in expected] != []
    assert Criteria(small()).add({"step": 1, "eval_accuracy": 0.0}) is None


def test_it_is_suspicious_between_good_records_and_certainty():
    watch, seen = Criteria(small()), {}
    for record in joined(REAL, 2_000, FEW_CODES, 50):
        watch.add(record)
        seen[record["step"]] = watch.is_suspicious
    assert not any(is_suspicious for step, is_suspicious in seen.items() if 200 < step < 2_000)
    assert all(seen[step] for step in range(2_000, 2_500, 50)) and not seen[2_500]
    never_good = Criteria(small())
    for record in from_points(SPREAD, 50, until=900):
        never_good.add(record)
        assert not never_good.is_suspicious


def arguments(**changes):
    return PretrainArguments(train_data=["a.csv"], output_dir="run", **changes)


def configuration(hidden_size=768, **changes):
    values = dict(diversity_loss_weight=0.1, num_codevector_groups=2, num_codevectors_per_group=320, num_negatives=100)
    return SimpleNamespace(**(values | dict(hidden_size=hidden_size, do_stable_layer_norm=False) | changes))


@pytest.mark.parametrize(
    ("flags", "window", "learning_after"),
    [
        (dict(), 2_000, 32_000),  # BASE
        (dict(max_steps=3_000, warmup_steps=200), 500, 500),  # small.yaml
        (dict(max_steps=1_000, warmup_steps=60), 500, 500),  # the demo: at its end at the earliest
        (dict(max_steps=10_000, warmup_steps=0.08), 1_000, 1_000),
        (dict(collapse_window_steps=40, warmup_steps=50), 40, 50),
    ],
)
def test_the_window_is_a_tenth_of_the_run_within_bounds(flags, window, learning_after):
    limits = Limits.of(arguments(**flags), configuration())
    assert (limits.window_steps, limits.learning_after, limits.codes_after) == (window, learning_after, 0)


def test_codes_are_counted_once_half_the_diversity_is_there():
    flags = dict(diversity_delay_steps=150, diversity_warmup_steps=2_000)
    assert Limits.of(arguments(**flags), configuration()).codes_after == 1_150
    assert Limits.of(arguments(**flags), configuration(diversity_loss_weight=0.0)).codes_after == 0


RECORD = dict(step=50_000, batch_hours=1.6, gumbel_temperature=1.9, codebook_perplexity_hard=500.0)
FEW, NOTHING = frozenset({"codes"}), frozenset({"accuracy", "loss"})
SMALL = dict(hidden_size=144, num_codevectors_per_group=16, num_negatives=100)


def causes(criteria, flags=None, config=None, record=None, since=40_000):
    args = arguments(**(flags or {}))
    return likely_causes(frozenset(criteria), since, RECORD | (record or {}), args, configuration(**(config or {})))


@pytest.mark.parametrize("criteria", [FEW, NOTHING, FEW | NOTHING])
def test_the_papers_recipes_are_to_blame_for_nothing(criteria):
    assert causes(criteria) == []
    for norms_first, mult, steps in ((False, 0.1, 250_000), (True, 1.0, 400_000)):  # LARGE: LibriSpeech, LibriVox
        large = dict(learning_rate=3e-4, feature_grad_mult=mult, min_gumbel_temperature=0.1, max_steps=steps)
        config = dict(hidden_size=1024, do_stable_layer_norm=norms_first)
        assert causes(criteria, large | dict(warmup_steps=0.08), config, dict(gumbel_temperature=0.1)) == []


@pytest.mark.parametrize(
    ("criteria", "cause", "changes"),
    [
        (FEW, "effective batch of 0.08 h (--batch_hours 0.08)", dict(flags=dict(batch_hours=0.08, learning_rate=1e-4))),
        (FEW, "effective batch of 0.9 h (--batch_hours 1.6)", dict(record=dict(batch_hours=0.9))),
        (FEW, "--learning_rate 0.005, where 0.0005 is usual", dict(flags=dict(learning_rate=5e-3))),
        (NOTHING, "--learning_rate 1e-06, where 0.0005 is usual", dict(flags=dict(learning_rate=1e-6))),
        (NOTHING, "warm-up of 1,000 updates", dict(flags=dict(warmup_steps=1_000))),
        (FEW, "--feature_grad_mult 1, where 0.1", dict(flags=dict(feature_grad_mult=1.0))),
        (NOTHING, "--feature_grad_mult 0:", dict(flags=dict(feature_grad_mult=0.0))),
        (FEW, "--diversity_loss_weight 0,", dict(config=dict(diversity_loss_weight=0.0))),
        (FEW, "--diversity_loss_weight 0.001,", dict(config=dict(diversity_loss_weight=0.001))),
        (NOTHING, "--diversity_loss_weight 10, where 0.1", dict(config=dict(diversity_loss_weight=10.0))),
        (FEW, "with 25% of its weight (--diversity_delay_steps 30000", dict(flags=dict(diversity_delay_steps=30_000, diversity_warmup_steps=40_000))),
        (FEW, "Gumbel temperature of 0.05 (--min_gumbel_temperature), where 0.5", dict(record=dict(gumbel_temperature=0.05))),
    ],
)  # fmt: skip
def test_one_unusual_setting_is_the_one_cause_that_is_named(criteria, cause, changes):
    named = causes(criteria, **changes)
    assert len(named) == 1 and cause in named[0]


def test_the_learning_rate_that_is_usual_follows_the_batch():
    (batch, rate) = causes(FEW, dict(batch_hours=0.1))  # six minutes at BASE's 5e-4
    assert "0.1 h" in batch and "where 0.00011 is usual" in rate


def test_a_small_model_has_causes_of_its_own():
    flags = dict(batch_hours=0.0045, learning_rate=1e-3, warmup_steps=60, max_steps=4_000)
    plateau = dict(batch_hours=0.0045, codebook_perplexity_hard=126.0, gumbel_temperature=2.0)
    early, warm = causes(NOTHING, flags, SMALL, plateau, since=1)
    assert "--diversity_delay_steps" in early and "--max_gumbel_temperature" in warm
    delayed = flags | dict(diversity_delay_steps=150, diversity_warmup_steps=2_000)
    assert causes(NOTHING, delayed, SMALL, plateau | dict(gumbel_temperature=0.5), since=1) == []
