"""Reference curves: that they are whole and agree with each other, and what is said of a run beside them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from w2v2.plan.expectations import (
    FOLDER,
    MEASURE,
    REPEAT_EVERY,
    BandWatch,
    Reference,
    advise_stop,
    find_references,
    place_in_band,
    read_references,
)

BASE = dict(hidden_size=768, num_hidden_layers=12, num_codevector_groups=2, num_codevectors_per_group=320)
BASE |= dict(num_negatives=100, do_stable_layer_norm=False)
POINTS = np.array([(100, 0.1, 0.2, 0.3), (10_000, 0.3, 0.4, 0.5)])
REFERENCE = Reference("a model", "speech", 1.0, {MEASURE: POINTS})


def base(**changes):
    return SimpleNamespace(**(BASE | changes))


def flags(**changes):
    values = dict(batch_hours=1.6, mask_time_prob=0.65, mask_time_length=10, model_name_or_path=None)
    return SimpleNamespace(**values | changes)


def validation(hours, accuracy, guess=0.005):
    loss = 5 - 4 * accuracy
    return dict(step=int(hours), audio_hours=hours, eval_accuracy=accuracy, eval_contrastive_loss=loss) | {
        "eval_constant_guess_accuracy": guess
    }


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_reference_files_are_whole(path):
    file = json.loads(path.read_text(encoding="utf-8"))
    assert all(file[key] for key in ("name", "source", "citation", "data", "model", "band", "compare", "curves"))
    for curve in file["curves"]:
        for rows in map(np.array, curve["points"].values()):
            assert (np.diff(rows[:, 0]) > 0).all()
            assert (rows[:, 1] <= rows[:, 2]).all() and (rows[:, 2] <= rows[:, 3]).all()


def test_two_sources_agree_where_both_have_points():
    """NVIDIA's mean lies within the study's band for nearly the same batch, while the study's schedule has not ended."""
    curves = {reference.name: reference for _, reference in read_references() if reference.batch_hours > 1}
    nvidia, study = curves["NVIDIA's BASE"].points[MEASURE], curves["nanow2v2's BASE"]
    for hours, _, mean, _ in nvidia[:2]:
        low, high = study.band_at(hours)
        assert low < mean < high


@pytest.mark.parametrize(
    "changes, width, found",
    [
        ({}, 768, [1.3333, 1.2963]),
        (dict(batch_hours=1 / 6), 768, [0.1667]),
        (dict(batch_hours=0.01), 768, []),
        (dict(mask_time_length=5), 768, []),
        (dict(mask_time_prob=0.5), 768, []),
        (dict(model_name_or_path="weights"), 768, []),
        ({}, 1_024, []),
    ],
)
def test_only_like_models_and_batches_are_compared(changes, width, found):
    args = flags(**changes)
    batches = [reference.batch_hours for reference in find_references(base(hidden_size=width), args)]
    assert batches[: len(found)] == found and bool(batches) == bool(found)
    assert all(0.49 <= batch / args.batch_hours <= 2.01 for batch in batches)


@pytest.mark.parametrize(
    "accuracy, guess, verdict",
    [
        (0.19, 0.05, "below"),
        (0.21, 0.05, "inside"),
        (0.39, 0.05, "inside"),
        (0.41, 0.05, "above"),
        (0.3, 0.28, "guess"),
    ],
)
def test_verdict_follows_the_band(accuracy, guess, verdict):
    # Half-way between 100 and 10,000 h, in log hours, the band is 0.2 to 0.4.
    found, text = place_in_band([validation(1_000, accuracy, guess)], [REFERENCE])
    assert found == verdict and "since" not in text


def test_since_is_the_start_of_the_unbroken_verdict():
    hours_and_accuracies = [(200, 0.05), (300, 0.3), (500, 0.01), (1_000, 0.05), (2_000, 0.06)]
    placing = place_in_band([validation(*pair) for pair in hours_and_accuracies], [REFERENCE])
    assert placing == (
        "below",
        "accuracy 0.060 at 2,000 h is below the band of a model (speech) with batches of 60.0 min, 0.230 to 0.430, since 500 h",
    )


def test_hours_without_reference_are_unknown():
    verdict, text = place_in_band([validation(50, 0.2)], [REFERENCE])
    assert verdict == "unknown" and "begin at 100 h and end at 10,000 h" in text
    assert place_in_band([validation(50, 0.2)], []) is None
    assert place_in_band([dict(step=1, audio_hours=500.0, accuracy=0.3)], [REFERENCE]) is None  # training alone
    diverged = [validation(500, 0.3), dict(validation(600, 0.3), eval_accuracy=None)]
    assert place_in_band(diverged, [REFERENCE]) is None  # an older validation is not the newest
    assert place_in_band([diverged[1], validation(700, 0.3)], [REFERENCE])[0] == "inside"


def test_band_watch_speaks_at_changes_and_now_and_then(tmp_path, capsys):
    args = flags(output_dir=str(tmp_path))
    earlier = [validation(7_000 + n, 0.28) for n in range(3)] + [validation(90_000, 0.9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in earlier))
    watch = BandWatch(args, base(), Accelerator(cpu=True), first_step=7_002)
    assert len(watch.records) == 3  # not what came after the checkpoint
    for n in range(REPEAT_EVERY):
        watch.see(validation(7_100 + n, 0.28))
    watch.see(validation(7_200, 0.1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" the band")[0].split(" is ")[-1] for line in lines] == ["inside", "inside", "below"]
    assert ", since 7,000 h" in lines[0]


def test_gain_is_that_of_the_last_tenth():
    records = [validation(hours, 0.4) for hours in (82, 88)] + [validation(hours, 0.43) for hours in (92, 100)]
    args = flags()
    gain, doubling = advise_stop([dict(step=1, audio_hours=1.0, accuracy=0.02), *records], args, base())
    assert "the last tenth of 100 h changed the validation accuracy by +0.030 to 0.430" in gain
    assert "contrastive loss by -0.120 to 3.280" in gain
    assert "says nothing" in doubling


def test_without_validation_training_shows_the_gain():
    records = [dict(step=n, audio_hours=float(n), accuracy=n / 200, contrastive_loss=1.0) for n in range(1, 101)]
    gain, _ = advise_stop(records, flags(), base())
    assert "training accuracy by +0.050 to 0.478" in gain


@pytest.mark.parametrize(
    "hours, said",
    [
        (66_666.7, "from 66,667 to 133,333 h"),
        (300_000, "the study ends at 533,333 h; its last doubling, from 266,667 to 533,333 h"),
        (1_000, "says nothing of less than 2,083 h"),
    ],
)
def test_doubling_is_the_studys(hours, said):
    [line] = advise_stop([dict(step=1, audio_hours=hours)], flags(), base())
    assert said in line


def test_no_doubling_for_other_models():
    assert not advise_stop([dict(step=1, audio_hours=7e4)], flags(), base(hidden_size=144))
