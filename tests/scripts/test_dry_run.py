"""A dry run opens a sample of the files of every manifest, says what is wrong with them, and ends as a run would."""

import json

import numpy as np
import pytest
import soundfile
from conftest import refusal, run_here, tiny_config, write_csv, write_tones

import pretrain
from w2v2.train.log import read_metrics

RATE = 16_000
KINDS = {"missing", "unreadable", "ends_early", "silent", "clipped", "resampled", "stereo_mixed", "antiphase"}


def tone(seconds=2.0, rate=RATE):
    t = np.arange(round(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * 300 * t) * (1 + np.sin(2 * np.pi * 3 * t))


def write_kinds(folder):
    """One file of every kind, each two seconds by the manifest, beside four that are as they should be."""
    sides = np.stack([tone(), 0.9 * tone()], 1)
    sounds = {
        "silent": (np.zeros(2 * RATE), RATE),
        "clipped": (np.sign(tone()), RATE),
        "ends_early": (tone(1.0), RATE),
        "resampled": (tone(rate=8_000), 8_000),
        "stereo_mixed": (sides, RATE),
        "antiphase": (sides * [1, -1], RATE),
    }
    good = write_tones(folder, [2.0] * 4)
    for name, (samples, rate) in sounds.items():
        soundfile.write(folder / f"{name}.wav", samples, rate)
    (folder / "unreadable.wav").write_text("only words")
    paths = [*good, *(folder / f"{name}.wav" for name in (*sounds, "unreadable", "missing"))]
    return write_csv(folder / "some.csv", paths, [2.0] * len(paths))


@pytest.fixture
def flags(tmp_path):
    """Of a dry run over twelve good files."""
    paths = write_tones(tmp_path / "audio", [2.5] * 12)
    write_csv(tmp_path / "train.csv", paths, [2.5] * 12)
    tiny_config().save_pretrained(tmp_path / "model")
    values = dict(train_data=tmp_path / "train.csv", config_name=tmp_path / "model", output_dir=tmp_path / "run")
    values |= dict(batch_hours=0.002, micro_batch_seconds=8, max_steps=1, report_to="none")
    return [*(f"--{name}={value}" for name, value in values.items()), "--dry_run", "--use_cpu"]


def look(tmp_path):
    return json.loads((tmp_path / "run/plan.json").read_text())["looked_at"]


def test_good_files_are_nothing_unusual(flags, tmp_path, capsys):
    assert run_here(pretrain.main, *flags) == 0
    (counts,) = look(tmp_path)["train_data"].values()
    assert counts == {"files": 12} | dict.fromkeys(KINDS, 0)
    assert f"looked at     12 files of {tmp_path / 'train.csv'}: nothing unusual" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["train_data", "validation_data"])
def test_each_kind_is_counted_and_shown(flags, tmp_path, capsys, flag):
    manifest = write_kinds(tmp_path / "kinds")
    more = [f"--{flag}", str(manifest), "--max_skipped_fraction", "0.3"]
    assert run_here(pretrain.main, *flags, *more) == 0
    counts = look(tmp_path)[flag][str(manifest)]
    assert counts == {"files": 12} | dict.fromkeys(KINDS, 1) | {"stereo_mixed": 2}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"12 files of {manifest}" in line]
    for kind in KINDS:
        assert f"{counts[kind]} {kind.replace('_', ' ')} ({tmp_path}/kinds/{kind}.wav: " in line


@pytest.mark.parametrize("flag", ["train_data", "validation_data"])
def test_a_dry_run_ends_as_the_run_would(flags, tmp_path, capsys, flag):
    more = [f"--{flag}", str(write_kinds(tmp_path / "kinds"))]
    named = f"--{flag}: ", "3 of 12 files that were looked at cannot be used", "--max_skipped_fraction 0.01"
    refusal(capsys, pretrain.main, *flags, *more, named=named)
    assert look(tmp_path)[flag]  # the plan is written all the same
    refusal(capsys, pretrain.main, *(f for f in flags if f != "--dry_run"), *more, named=[f"--{flag}", "0.01"])


def test_the_run_that_follows_is_the_one_that_was_planned(flags, tmp_path):
    """Steps, batches and hours; every figure that a dry run can know is the run's."""
    steps, plans = 5, []
    write_tones(tmp_path / "audio", [2.49] * 12)  # no whole number of latent frames: there is padding
    write_csv(tmp_path / "train.csv", sorted((tmp_path / "audio").iterdir()), [2.49] * 12)
    more = [f for f in flags if f != "--dry_run"] + [
        f"--max_steps={steps}",
        "--logging_steps=1",
        "--length_grid_seconds=0",
    ]
    for dry_run in ("true", "false"):
        assert run_here(pretrain.main, *more, "--dry_run", dry_run) == 0
        plans.append(json.loads((tmp_path / "run/plan.json").read_text()))
    measured = {"looked_at", "reading", "resources"}
    assert [{k: v for k, v in plan.items() if k not in measured} for plan in plans][0].items() <= plans[1].items()
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert len(records) == steps == plans[0]["max_steps"]
    assert np.mean([r["batch_hours"] for r in records]) == pytest.approx(plans[0]["batch_hours"])
    assert records[-1]["audio_hours"] == pytest.approx(plans[0]["hours_to_hear"])
    assert records[-1]["audio_hours"] / plans[0]["hours"] == pytest.approx(plans[0]["epochs"])
    assert [r["padded_fraction"] for r in records] == pytest.approx([plans[0]["padded_fraction"]] * steps)
    assert plans[0]["padded_fraction"] > 0.003


def test_every_manifest_is_looked_at(flags, tmp_path):
    few = write_csv(tmp_path / "few.csv", write_tones(tmp_path / "few", [2.0], first=20), [2.0])
    many = tmp_path / "many.csv"
    rows = [f"{number},{tmp_path}/audio/tone{number % 12}.wav,{number / 1000},2" for number in range(500)]
    many.write_text("\n".join(["id,audio,start,duration", *rows]) + "\n")
    assert run_here(pretrain.main, *flags, "--train_data", few, many) == 0
    assert {name: counts["files"] for name, counts in look(tmp_path)["train_data"].items()} == {
        str(few): 1,
        str(many): 64,
    }
