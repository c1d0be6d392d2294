"""`benchmarks/make_reference.py`: its band holds further seeds, and the program finds and reads what it writes."""

import json
import sys

import numpy as np
import pytest
import yaml
from make_reference import find_band, main

from w2v2.errors import UserError
from w2v2.plan import expectations

MODEL = dict.fromkeys(expectations.MODEL_KEYS, 2)
FLAGS = dict(
    batch_hours=0.0045,
    learning_rate=1e-3,
    mask_time_prob=0.65,
    mask_time_length=5,
    model_name_or_path=None,
    max_steps=400,
    seed=1,
)


def records(seed, num=40, noise=0.01):
    random = np.random.default_rng(seed)
    hours = np.arange(1, num + 1) * 0.5 * (1 + 0.001 * random.standard_normal())
    values = {f"eval_{name}": 1.0 for name in ("diversity_loss", "codebook_perplexity", "codebook_perplexity_hard")}
    return [
        dict(step=n, audio_hours=h, eval_accuracy=0.1 * np.log1p(h) + noise * random.standard_normal())
        | {"eval_contrastive_loss": 4.0}
        | values
        for n, h in enumerate(hours, start=1)
    ]


def write_run(folder, seed, **changes):
    folder.mkdir()
    (folder / "pretrain_config.yaml").write_text(yaml.safe_dump(FLAGS | dict(seed=seed) | changes))
    (folder / "config.json").write_text(json.dumps(MODEL))
    lines = [json.dumps({name: float(value) for name, value in record.items()}) for record in records(seed)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["make_reference.py", *args])
    main()


def test_band_holds_most_further_seeds():
    points = np.array(find_band([records(seed) for seed in range(4)])["eval_accuracy"])
    inside = []
    for seed in range(100, 140):
        curve = records(seed)
        low, high = (np.interp([r["audio_hours"] for r in curve], points[:, 0], points[:, column]) for column in (1, 3))
        accuracy = np.array([record["eval_accuracy"] for record in curve])
        inside += [*((low <= accuracy) & (accuracy <= high))]
    assert 0.85 < np.mean(inside) < 0.99
    assert points[:, 2] == pytest.approx(0.1 * np.log1p(points[:, 0]), abs=0.03)


def test_validations_without_finite_measures_are_left_out(capsys):
    runs = [records(seed, noise=0.0) for seed in range(3)]
    damaged = [[*run] for run in runs]
    damaged[1][19] = damaged[1][19] | {"eval_accuracy": None}
    damaged[2][9] = damaged[2][9] | {"eval_contrastive_loss": float("nan")}
    assert np.allclose(find_band(damaged)["eval_accuracy"], find_band(runs)["eval_accuracy"], atol=2e-3)
    assert capsys.readouterr().out.startswith("2 validations are left out")
    with pytest.raises(UserError, match="no finite validations"):
        find_band([runs[0], [record | {"eval_accuracy": None} for record in runs[1]]])


def test_written_file_is_a_reference(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / f"run{seed}", seed) for seed in (1, 2, 3)]
    monkeypatch.setattr(expectations, "FOLDER", tmp_path)
    expectations.read_references.cache_clear()
    run_main(monkeypatch, *runs, "--name", "ours", "--data", "noise", "--output", str(tmp_path / "small.json"))
    args, config = (type("Values", (), values) for values in (FLAGS, MODEL))
    [reference] = expectations.find_references(config, args)
    expectations.read_references.cache_clear()
    assert (reference.name, len(reference.points)) == ("ours", 5)
    low, high = reference.band_at(10)
    assert low < 0.1 * np.log1p(10) < high
    assert len((tmp_path / "small.json").read_text().splitlines()) < 5 * 45 + 30  # a row a line


@pytest.mark.parametrize(
    "seeds, changes, said",
    [
        ((1,), {}, "1 run given"),
        ((1, 1), {}, "the same --seed"),
        ((1, 2), dict(max_steps=200), "run1: max_steps is 200, that of .*run0 400"),
    ],
)
def test_runs_that_are_no_seeds_are_refused(tmp_path, monkeypatch, seeds, changes, said):
    runs = [write_run(tmp_path / f"run{n}", seed, **(changes if n else {})) for n, seed in enumerate(seeds)]
    with pytest.raises(UserError, match=said):
        run_main(monkeypatch, *runs, "--name", "a", "--data", "b", "--output", str(tmp_path / "out.json"))
