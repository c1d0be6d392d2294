"""Each warning where it is due, and none at its nearest neighbour."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset

from w2v2.arguments import PretrainArguments
from w2v2.data.utterances import Utterances
from w2v2.manifests.sources import Source
from w2v2.plan import data_checks, recipe_checks
from w2v2.plan import preflight as machine_checks
from w2v2.plan.preflight import Machine, Preflight, find_warnings
from w2v2.train.launch import WORLD_SIZES

SECOND = 16_000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """One second of noise, and one of silence."""
    folder = tmp_path_factory.mktemp("sounds")
    soundfile.write(folder / "noise.wav", 0.1 * np.random.default_rng(0).standard_normal(SECOND), SECOND)
    soundfile.write(folder / "silence.wav", np.zeros(SECOND), SECOND)
    return folder


def utterances(sounds, first=0, speakers="abcdefgh", silent=0, **columns):
    """As many as speakers, each of a second; `silent` of them are silence."""
    n = len(speakers)
    audio = [str(sounds / ("silence.wav" if i < silent else "noise.wav")) for i in range(n)]
    rows = {"id": [f"id{first + i}" for i in range(n)], "audio": audio, "start": [0.0] * n}
    rows |= {"num_samples": [SECOND] * n, "speaker": list(speakers)} | columns
    return Utterances(Dataset.from_dict(rows), np.array(rows["num_samples"], np.int32), {})


def preflight(sounds, size="BASE", plan=(), machine=(), training=(), validation=(), **flags):
    """A run of which nothing is to be said, but for what is changed here."""
    flags = dict(train_data=["a"], output_dir="run", crop_seconds=15.38) | flags
    width = {"small": 144, "BASE": 768, "LARGE": 1024}[size]
    resources = {"disk_gb": 5.0, "free_disk_gb": 5.0}
    values = dict(hours=960.0, batch_hours=1.6, utterances=91, dropped={}, updates_per_epoch=600.0, epochs=667.0)
    values |= dict(micro_batch_seconds=200.0, resources=resources) | dict(plan)
    heard = utterances(sounds, **dict(training))
    theirs = dict(first=100, speakers="xyz", audio=[f"/dev/{i}.wav" for i in range(3)]) | dict(validation)
    config = SimpleNamespace(hidden_size=width, do_stable_layer_norm=False)
    here = Machine("cpu", **(dict(cores=4) | dict(machine))) if "device" not in dict(machine) else Machine(**machine)
    return Preflight(values, PretrainArguments(**flags), config, here, heard, utterances(sounds, **theirs))


CUDA = dict(device="cuda", precision="bf16", cores=8, omp_threads=8)
WEIGHTS = dict(model_name_or_path="facebook/wav2vec2-base")
SOURCE = dict(name="sw", language="", repetitions=101, repetitions_per_epoch=5.0)
NOT_HELD = dict(size="small", learning_rate=1e-3, warmup_steps=60, max_steps=4_000)

# code → what triggers it, and the nearest that does not
CASES = [
    ("small_effective_batch", dict(plan=dict(batch_hours=1.59)), dict()),
    ("small_effective_batch", dict(plan=dict(batch_hours=0.79), **WEIGHTS), dict(plan=dict(batch_hours=0.81), **WEIGHTS)),
    ("small_effective_batch", dict(plan=dict(batch_hours=1.59), **NOT_HELD), dict(**NOT_HELD)),
    ("batch_exceeds_epoch", dict(plan=dict(updates_per_epoch=0.99)), dict(plan=dict(updates_per_epoch=1.0))),
    ("learning_rate_for_batch", dict(learning_rate=7.6e-4), dict(learning_rate=7.4e-4)),
    ("learning_rate_for_batch", dict(plan=dict(batch_hours=600 / 3600), learning_rate=2.5e-4),
                                dict(plan=dict(batch_hours=600 / 3600), learning_rate=2.3e-4)),
    ("learning_rate_for_batch", dict(size="LARGE", learning_rate=4.6e-4), dict(size="LARGE", learning_rate=4.4e-4)),
    ("learning_rate_for_batch", dict(NOT_HELD, learning_rate=2.3e-3), dict(NOT_HELD, learning_rate=2.2e-3)),
    ("learning_rate_for_batch", dict(NOT_HELD, plan=dict(batch_hours=0.0045), learning_rate=1.6e-3),
                                dict(NOT_HELD, plan=dict(batch_hours=0.0045), learning_rate=1.4e-3)),
    ("warmup_share", dict(warmup_steps=0.049), dict(warmup_steps=0.05)),
    ("warmup_share", dict(warmup_steps=0.151), dict(warmup_steps=0.15)),
    ("warmup_share", dict(warmup_steps=31_999, max_steps=10**6), dict(warmup_steps=32_000, max_steps=10**6)),
    ("warmup_share", dict(warmup_steps=0.75), dict(warmup_steps=0.75, **WEIGHTS)),
    ("warmup_share", dict(warmup_steps=0, max_steps=125), dict(warmup_steps=0, max_steps=118)),
    ("warmup_share", dict(NOT_HELD, warmup_steps=19), dict(NOT_HELD, warmup_steps=20)),
    ("warmup_share", dict(NOT_HELD, warmup_steps=801), dict(NOT_HELD, warmup_steps=800)),
    ("warmup_exceeds_run", dict(warmup_steps=100, max_steps=100), dict(warmup_steps=99, max_steps=100)),
    ("long_crops", dict(crop_seconds=20.1), dict(crop_seconds=20.0)),
    ("many_epochs", dict(plan=dict(epochs=1_001)), dict(plan=dict(epochs=1_000))),
    ("often_repeated", dict(plan=dict(sources=[SOURCE])), dict(plan=dict(sources=[SOURCE | dict(repetitions=100)]))),
    ("often_repeated", dict(plan=dict(sources=[SOURCE])),
                       dict(plan=dict(sources=[SOURCE | dict(repetitions_per_epoch=4.9)]))),
    ("many_dropped", dict(plan=dict(dropped={"too_short": 11})), dict(plan=dict(dropped={"too_short": 10}))),
    ("validation_in_training", dict(validation=dict(speakers="xyh")), dict()),
    ("validation_in_training", dict(validation=dict(speakers="xy", audio=["/dev/0.wav", "/a/b.wav"]),
                                    training=dict(speakers="ab", audio=["/a/a.wav", "/a/b.wav"])),
                               dict(validation=dict(speakers="xy", audio=["/dev/0.wav", "/b/b.wav"]),
                                    training=dict(speakers="ab", audio=["/a/a.wav", "/a/b.wav"]))),
    ("one_speaker_dominates", dict(training=dict(speakers="aaab")), dict(training=dict(speakers="aabb"))),
    ("one_speaker_dominates", dict(training=dict(speakers="aaab")), dict(training=dict(speakers=["", "", "", "b"]))),
    ("one_speaker_dominates", dict(training=dict(speakers="abc", num_samples=[9_000, 16_000, 6_999])),
                              dict(training=dict(speakers="abc", num_samples=[9_000, 16_000, 7_000]))),
    ("silence", dict(training=dict(silent=2)), dict(training=dict(silent=1))),
    ("fp16_without_need", dict(machine=CUDA | dict(precision="fp16")),
                          dict(machine=CUDA | dict(precision="fp16", has_bf16=False))),
    ("fp16_without_need", dict(machine=CUDA | dict(precision="fp16")), dict(machine=CUDA)),
    ("omp_threads", dict(machine=CUDA | dict(omp_threads=None)), dict(machine=CUDA)),
    ("omp_threads", dict(machine=dict(processes_here=2)), dict(machine=dict(processes_here=1))),
    ("omp_threads", dict(machine=dict(processes_here=2)), dict(machine=dict(processes_here=None))),
    ("omp_threads", dict(machine=dict(omp_threads=3, processes_here=2)), dict(machine=dict(omp_threads=2, processes_here=2))),
    ("slow_disk", dict(machine=CUDA, plan=dict(reading=549.0)), dict(machine=CUDA, plan=dict(reading=551.0))),
    ("slow_disk", dict(machine=CUDA, plan=dict(reading=549.0)), dict(plan=dict(reading=549.0))),
    ("slow_disk", dict(plan=dict(probe=dict(data_wait_fraction=0.11))), dict(plan=dict(probe=dict(data_wait_fraction=0.1)))),
    ("slow_disk", dict(machine=CUDA, plan=dict(reading=549.0)),
                  dict(machine=CUDA, plan=dict(reading=549.0, probe=dict(data_wait_fraction=0.0)))),
    ("disk_space", dict(plan=dict(resources=dict(disk_gb=5.1, free_disk_gb=5.0))), dict()),
]  # fmt: skip


@pytest.mark.parametrize(("code", "trigger", "neighbour"), CASES)
def test_a_warning_is_given_where_it_is_due(sounds, code, trigger, neighbour):
    """The neighbour has the same warnings but for this one."""
    found, others = (find_warnings(preflight(sounds, **changes)) for changes in (trigger, neighbour))
    (warning,) = [one for one in found if one["code"] == code]
    assert warning["message"] and (warning["remedy"] or "small model" in warning["message"])
    assert [one["code"] for one in others] == [one["code"] for one in found if one["code"] != code]


def test_nothing_is_said_where_nothing_is_unusual(sounds):
    assert not find_warnings(preflight(sounds)) and not find_warnings(preflight(sounds, machine=CUDA))
    assert not find_warnings(preflight(sounds, **NOT_HELD)) and not find_warnings(preflight(sounds, **WEIGHTS))


def test_every_other_check_has_a_case(sounds):
    """Those of validation that is not there, weighted, and of a size that is not found."""
    run = preflight(sounds)
    run.validation, run.size_is_found = None, False
    assert [warning["code"] for warning in find_warnings(run)] == ["no_validation", "micro_batch_auto"]
    run = preflight(sounds)
    run.validation.sources = [Source("a", ["a.csv"], weight=2)]
    assert [warning["code"] for warning in find_warnings(run)] == ["validation_weights"]
    run.validation.sources = [Source("a", ["a.csv"], weight=1)]
    assert not find_warnings(run)
    others = {"micro_batch_auto", "no_validation", "validation_weights"}
    sources = "".join(Path(module.__file__).read_text() for module in (recipe_checks, data_checks, machine_checks))
    assert {code for code, *_ in CASES} | others == {*re.findall(r'(?:yield|code =) "(\w+)"', sources)}


@pytest.mark.parametrize(
    ("batch_hours", "figures"),
    [
        (87.5, "hardly learns"),
        (300, "300 s gave it a word error rate of 12.2 % on test-clean and 31.5 %"),
        (4_000, "4800 s gave it a word error rate of 6.0 %"),
    ],
)
def test_a_small_batch_is_told_what_the_study_found(sounds, batch_hours, figures):
    (warning,) = find_warnings(preflight(sounds, plan=dict(batch_hours=batch_hours / 3600), learning_rate=1e-6))
    assert figures in warning["message"] and "2402.13723" in warning["message"]
    assert ("or give more updates" in warning["remedy"]) == (batch_hours >= 150)


def test_a_rate_below_the_study_is_judged_by_its_smallest_batch(sounds):
    tiny, small = (find_warnings(preflight(sounds, plan=dict(batch_hours=s / 3600))) for s in (10, 87.5))
    tiny, small = ({one["code"]: one["message"] for one in found}["learning_rate_for_batch"] for found in (tiny, small))
    assert (
        "batches of 10 s" in tiny and "the study's smallest batch, 87.5 s, had 7.3e-06" in tiny and "usual" not in tiny
    )
    assert "batches of 8" in small and "7.3e-06 is usual for BASE" in small


@pytest.mark.parametrize(
    ("epochs", "warmup_steps", "said"),
    [
        (4_000, 0.08, "lower --max_steps to 100000, or"),
        (4_000, 15_000, "lower --max_steps to 100000, or"),
        (4_000, 15_001, "lower --max_steps to 100000 with --warmup_steps 0.08 (a warm-up of 15,001 updates"),
        (1e9, 32_000, "lower --batch_hours, or"),  # a single update is too much
    ],
)
def test_a_shorter_run_keeps_its_warm_up(sounds, epochs, warmup_steps, said):
    run = preflight(sounds, plan=dict(epochs=epochs), max_steps=400_000, warmup_steps=warmup_steps)
    (found,) = [one for one in find_warnings(run) if one["code"] == "many_epochs"]
    assert said in found["remedy"] and "1,000 passes are the limit" in found["message"]


@pytest.mark.parametrize(
    ("environment", "cores", "here"),
    [
        ({}, 48, 1),
        (dict(WORLD_SIZE="16", LOCAL_WORLD_SIZE="8"), 48, 8),
        (dict(WORLD_SIZE="16"), 48, None),  # on how many machines is not known
        (dict(WORLD_SIZE="16", LOCAL_WORLD_SIZE="8"), 6, 1),  # a scheduler bound each process to cores of its own
    ],
)
def test_processes_that_share_cores_are_counted(monkeypatch, environment, cores, here):
    for name in (*WORLD_SIZES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 48)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    assert Machine.find(accelerator).processes_here == here
