"""pretrain.py on shards: a run goes on exactly on other machines, and stops in one line where it cannot get its data."""

import shutil
import tarfile

import pytest
from conftest import NOISY, ONE_UPDATE, TRAINED, assert_same_run, refusal, run_here, write_recipe
from hub_stand_in import HubStandIn
from ranks import run_ranks

import pretrain
from w2v2.data import shard_cache
from w2v2.data.batching import Cursor
from w2v2.data.streaming import ShardOrder

NUM_SHARDS, WINDOW, SEED, STEPS, SAVED = 7, 2, 42, 9, 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Flags of a run on seven tars of three utterances (the last: two); an epoch is some three updates."""
    folder = tmp_path_factory.mktemp("streaming")
    values = dict(batch_hours=0.004, micro_batch_seconds=10.35, max_steps=STEPS, save_steps=SAVED, eval_steps=100)
    values |= dict(streaming=True, shuffle_window_shards=WINDOW, report_to=["none"], use_cpu=True)
    flags = write_recipe(folder, NOISY, dataloader_num_workers=1, **values)
    (folder / "shards").mkdir()
    for number in range(NUM_SHARDS):
        with tarfile.open(folder / f"shards/train-{number}.tar", "w") as tar:
            for utterance in range(number, len(TRAINED), NUM_SHARDS):
                tar.add(folder / f"audio/tone{utterance}.wav", f"tone{utterance}.wav")
    return flags


@pytest.fixture(scope="module")
def hub(recipe):
    with HubStandIn() as stand_in:
        stand_in.files = {path.name: path.read_bytes() for path in (recipe.parent / "shards").iterdir()}
        yield stand_in


def address(hub, numbers=f"0..{NUM_SHARDS - 1}") -> str:
    return f"{hub.url}/lab/speech/resolve/main/train-{{{numbers}}}.tar"


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    """An uninterrupted run on tars that are read in place."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert run_here(pretrain.main, recipe, "--output_dir", output_dir, "--train_data", recipe.parent / "shards") == 0
    assert not (output_dir / "cache/shards").exists() or not list((output_dir / "cache/shards").glob("shard-*"))
    return output_dir


@pytest.fixture
def begun(whole_run, tmp_path):
    """A run that stopped in the middle of an epoch, with nothing of its cache."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder, ignore=shutil.ignore_patterns("cache", f"checkpoint-{STEPS}", "checkpoint-8"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_goes_on_elsewhere_as_if_nothing_had_happened(recipe, hub, whole_run, begun, num_processes):
    """In the middle of a window, without its copies, from another place, on as many or more processes; stopped again
    and again where it is one.
    """
    flags = ["--output_dir", begun, "--train_data", address(hub), "--resume_from_checkpoint", "auto"]
    if num_processes == 2:
        run_ranks(begun.with_name("logs"), "pretrain.py", recipe, *flags)
    else:
        for more, status in [(("--max_hours", ONE_UPDATE), 75)] * 2 + [((), 0)]:
            shutil.rmtree(begun / "cache", ignore_errors=True)
            assert run_here(pretrain.main, recipe, *flags, *more) == status
    assert_same_run(begun, whole_run, exactly=num_processes == 1)
    assert list((begun / "cache/shards").glob("shard-*.tar"))


@pytest.mark.parametrize(
    ("numbers", "more", "named"),
    [
        ("0..5", (), ["ids_sha256"]),
        ("0..6", ("--shuffle_window_shards", 3), ["shuffle_window_shards 3 (was 2)"]),
    ],
)
def test_other_shards_or_windows_are_refused_on_resuming(recipe, hub, begun, capsys, numbers, more, named):
    flags = ["--output_dir", begun, "--train_data", address(hub, numbers), "--resume_from_checkpoint", "auto"]
    refusal(capsys, pretrain.main, recipe, *flags, *more, named=["batches would differ", *named])


@pytest.mark.parametrize("window", [0, 2], ids=["before the first update", "in a worker"])
def test_a_shard_that_stays_away_ends_the_run_in_one_line(recipe, hub, tmp_path, capsys, monkeypatch, window):
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0,))
    flags = ["--output_dir", tmp_path / "run", "--train_data", address(hub)]
    assert run_here(pretrain.main, recipe, *flags, "--dry_run", "true") == 0  # indexes the shards
    shutil.rmtree(tmp_path / "run/cache/shards")
    order = ShardOrder([3] * 6 + [2], WINDOW, SEED)
    numbers = [numbers for _, (_, numbers) in zip(range(3), order.windows(Cursor()), strict=False)][window]
    number = next(n for n in numbers if n)  # the first shard is looked into
    monkeypatch.setattr(hub, "failures", {f"train-{number}.tar": [None] + [503] * 99})  # it is still listed
    named = [f"shard {hub.url}", f"train-{number}.tar cannot be fetched after 2 tries", "503"]
    refusal(capsys, pretrain.main, recipe, *flags, named=named)


def test_flags_that_do_not_fit_are_refused(recipe, tmp_path, capsys):
    flags = ["--output_dir", tmp_path / "run", "--train_data"]
    (tmp_path / "sources.yaml").write_text("- data: a.csv\n")
    refusal(capsys, pretrain.main, recipe, *flags, tmp_path / "sources.yaml", named=["not a sources file"])
    more = ["--streaming", "false", "--shard_cache_gb", 3]
    refusal(capsys, pretrain.main, recipe, *flags, "a.csv", *more, named=["need --streaming"])
    refusal(
        capsys,
        pretrain.main,
        recipe,
        *flags,
        recipe.parent / "train.csv",
        named=["train.csv is not a shard", "manifests"],
    )
