"""Pretraining on a sources file: what the plan says of it, exact resuming, and refusals."""

import json
import shutil

import pytest
import soundfile
from conftest import (
    NOISY,
    TRAINED,
    assert_same_run,
    error_line,
    read_curve,
    refusal,
    run_here,
    write_recipe,
    write_tones,
)
from ranks import run_ranks

import pretrain

SWAHILI = [1.4, 2.2, 1.8]


def write_sources(folder, weight=1):
    (folder / "mixed.yaml").write_text(
        f"- {{name: english, data: train.csv, language: en}}\n- {{name: swahili, data: sw, language: sw, weight: {weight}}}\n"
    )
    return folder / "mixed.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run over twenty clips of one language and three of another, these at 8 kHz, mixed by temperature."""
    folder = tmp_path_factory.mktemp("mixed")
    values = dict(batch_hours=0.0015, micro_batch_seconds=8.0, max_steps=8, eval_steps=8, save_steps=2)
    values |= dict(dataloader_num_workers=0, report_to=["none"], use_cpu=True)
    values |= dict(sampling_alpha_language=0.5, sampling_alpha_corpus=0.5)
    path = write_recipe(folder, NOISY, **values)
    for name in write_tones(folder / "sw", SWAHILI, first=30):
        samples, _ = soundfile.read(name)
        soundfile.write(name, samples[::2], 8_000)
    write_sources(folder)
    return path


def run(config, output_dir, *more, sources="mixed.yaml"):
    flags = ("--train_data", config.parent / sources, "--output_dir", output_dir)
    return run_here(pretrain.main, config, *flags, *more)


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run(config, output_dir) == 0
    return output_dir


def test_the_plan_says_hours_shares_and_repetitions(config, tmp_path, capsys):
    assert run(config, tmp_path / "run", "--dry_run", "--crop_seconds", 5, "--length_grid_seconds", 0) == 0
    plan, printed = json.loads((tmp_path / "run/plan.json").read_text()), capsys.readouterr().out
    english, swahili = plan["sources"]
    assert (english["name"], english["language"], english["utterances"]) == ("english", "en", len(TRAINED))
    for source, seconds in ((english, TRAINED), (swahili, SWAHILI)):
        assert source["hours"] == pytest.approx(sum(seconds) / 3600, rel=1e-3) and source["dropped"] == 0
        assert source["repetitions_per_epoch"] == source["draws_per_epoch"] / len(seconds)
        assert source["repetitions"] == pytest.approx(source["repetitions_per_epoch"] * plan["epochs"])
    # Shares are as the square root of the hours, up to whole utterances.
    heard = [source["hours"] * source["repetitions_per_epoch"] for source in (english, swahili)]
    assert [english["share"], swahili["share"]] == pytest.approx([hours / sum(heard) for hours in heard], rel=1e-3)
    ratio = (sum(SWAHILI) / sum(TRAINED)) ** 0.5
    assert swahili["share"] / english["share"] == pytest.approx(ratio, rel=0.5 / swahili["draws_per_epoch"] + 0.05)
    assert f"swahili (sw): {swahili['share']:.2%} of what is heard" in printed
    assert "looked at     20 files of english: nothing unusual" in printed
    assert "looked at     3 files of swahili: 3 resampled" in printed and "8,000 Hz" in printed
    assert plan["looked_at"]["train_data"]["swahili"]["resampled"] == 3
    assert not {"often_repeated", "validation_weights"} & {warning["code"] for warning in plan["warnings"]}


def test_what_is_repeated_very_often_is_said(config, tmp_path, capsys):
    sources = write_sources(tmp_path, weight=9)
    for name in ("train.csv", "sw"):
        (tmp_path / name).symlink_to(config.with_name(name))
    assert (
        run(config, tmp_path / "run", "--dry_run", "--max_steps", 3_000, "--validation_data", sources, sources=sources)
        == 0
    )
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "some sources are repeated very often: swahili (" in line]
    assert line.startswith("warning ") and "english" not in line
    assert "weights of --validation_data have no effect: every utterance is heard once" in printed
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["validation"]["utterances"] == 23 and len(plan["validation"]["sources"]) == 2


def test_a_run_resumed_three_times_in_an_epoch_is_the_same(config, whole_run, tmp_path):
    state = json.loads((whole_run / "checkpoint-8/training_state/state.json").read_text())
    draws = state["identity"]["draws"]
    assert draws["swahili"] > len(SWAHILI) and state["epoch_draws"] == sum(draws.values())
    last = [record for record in read_curve(whole_run) if "loss" in record][-1]
    assert last["epoch"] == pytest.approx(state["epoch"] + state["position"] / sum(draws.values()))
    resumed = tmp_path / "resumed"
    shutil.copytree(whole_run, resumed)
    card = (whole_run / "README.md").read_text()
    assert (
        "| Sources, and their shares of what was heard | english (en): 0.01 h, " in card and "languages are as" in card
    )
    sixth = json.loads((whole_run / "checkpoint-6/training_state/state.json").read_text())
    assert sixth["epoch"] == 0 < sixth["position"]
    for step in (2, 4, 6):
        for folder in resumed.glob("checkpoint-*"):
            if int(folder.name.split("-")[1]) > step:
                shutil.rmtree(folder)
        assert run(config, resumed, "--resume_from_checkpoint", "auto") == 0
        assert_same_run(resumed, whole_run)


def test_two_processes_hear_the_same_mixture(config, whole_run, tmp_path):
    """Dropout and Gumbel noise follow the cut, so what is heard and masked is compared, not the losses."""
    flags = ("--output_dir", tmp_path / "two", "--train_data", config.with_name("mixed.yaml"))
    run_ranks(tmp_path / "logs", "pretrain.py", config, *flags)
    heard = ("step", "epoch", "audio_hours", "masked_frames", "cropped_fraction")
    ours, theirs = ([[r.get(name) for name in heard] for r in read_curve(run)] for run in (tmp_path / "two", whole_run))
    assert ours == theirs


def test_other_shares_are_refused_or_accepted(config, whole_run, tmp_path, capsys):
    resumed = tmp_path / "resumed"
    shutil.copytree(whole_run, resumed)
    more = ("--resume_from_checkpoint", "auto", "--max_steps", 9)
    for changed in (("--sampling_alpha_language", 1.0), ("--sampling_alpha_language", 0.0)):
        assert run(config, resumed, *more, *changed) == 2
        line = error_line(capsys.readouterr().err)
        assert "other shares of the sources (weight, --sampling_alpha_corpus, --sampling_alpha_language)" in line
        assert "an epoch's draws english 2" in line and ", swahili 3 (was " in line or "swahili 1" in line
    assert run(config, resumed, *more, *changed, "--accept_changed_batches") == 0
    # Without sources the ids are others.
    assert (
        run(config, resumed, *more, "--sampling_alpha_language=1", "--sampling_alpha_corpus=1", sources="train.csv")
        == 2
    )


def test_slips_of_shares_are_one_line(config, tmp_path, capsys):
    flags = (config, "--output_dir", tmp_path / "run", "--train_data")
    named = ("--sampling_alpha_language and --sampling_alpha_corpus need sources",)
    refusal(capsys, pretrain.main, *flags, config.with_name("train.csv"), named=named)
    refusal(capsys, pretrain.main, *flags, config.with_name("mixed.yaml"), "a.csv", named=("has to stand alone",))
    (tmp_path / "a.yaml").write_text(f"- data: {config.with_name('train.csv')}\n")
    refusal(capsys, pretrain.main, *flags, tmp_path / "a.yaml", named=("no source of", "names its language"))
    (tmp_path / "b.yaml").write_text("- data: absent.csv\n")
    refusal(
        capsys, pretrain.main, *flags, tmp_path / "b.yaml", named=(f"manifest {tmp_path}/absent.csv does not exist",)
    )
