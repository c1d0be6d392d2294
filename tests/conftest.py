"""Small models and micro-batches that many tests share."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before triton is imported: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from transformers import Wav2Vec2Config

from w2v2.data.batching import Crops, Cursor, MicroBatchPlan
from w2v2.data.collate import Framing, PretrainBatch, build_batch
from w2v2.model import cpu
from w2v2.train.log import read_metrics

_DROPOUTS = "hidden_dropout activation_dropout attention_dropout feat_proj_dropout feat_quantizer_dropout layerdrop"
NO_DROPOUT = dict.fromkeys(_DROPOUTS.split(), 0.0)
NOISY = dict(hidden_dropout=0.1, attention_dropout=0.1, feat_quantizer_dropout=0.1, layerdrop=0.3)
ONE_UPDATE = 1e-9  # as --max_hours: a run stops, saved, after its next update
TIMINGS = ("audio_seconds_per_second", "data_wait_fraction")


def tiny_config(large: bool = False, **changes) -> Wav2Vec2Config:
    """BASE's or LARGE's architecture in miniature: all seven convs, two layers."""
    family = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True) if large else {}
    encoder = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    convs = dict(conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    codebook = dict(num_codevectors_per_group=12, codevector_dim=16, proj_codevector_dim=16)
    objective = dict(num_negatives=20, mask_time_prob=0.65)
    return Wav2Vec2Config(**(encoder | convs | codebook | objective | NO_DROPOUT | family | changes))


def make_batch(config, lengths, seed=0, epoch=0, first=0, weight=1.0, piece=0, dtype=torch.float32) -> PretrainBatch:
    """A micro-batch of noise; utterance i has the same samples, mask and distractors in whichever batch it stands."""
    utterances = np.arange(first, first + len(lengths))
    noise = [np.random.default_rng([seed, int(i)]).standard_normal(n) for i, n in zip(utterances, lengths, strict=True)]
    crops = Crops(utterances, np.full_like(utterances, epoch), np.zeros_like(utterances), np.asarray(lengths))
    plan = MicroBatchPlan(crops, 0, piece, 1, sum(lengths), weight == 0.0, Cursor())
    waveforms = [torch.from_numpy(x * 0.3).to(dtype).numpy() for x in noise]
    batch = build_batch(plan, crops, waveforms, Framing(config, normalize=False), seed, weight)
    return replace(batch, original_samples=sum(lengths))


# Files that take longest begin first, so that none keeps one worker busy when the others are done.
LONGEST = "quickstart commands learning devices stop security pretrain sharding finetune_classification".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def large_model_kernels(monkeypatch):
    """What products of a large model's size run through, for small ones too."""
    monkeypatch.setattr(cpu, "SMALLEST_WEIGHT", 0)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def write_tones(folder: Path, seconds, first=0) -> list[Path]:
    """One WAV file of bursts of tones and noise for each length; the same files whenever it is called."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, length in enumerate(seconds, start=first):
        t = np.arange(round(length * 16_000)) / 16_000
        bursts = 0.3 * np.sin(2 * np.pi * (200 + 60 * number) * t) * (np.sin(2 * np.pi * 3 * t) > 0)
        paths.append(folder / f"tone{number}.wav")
        soundfile.write(paths[-1], bursts + 0.05 * np.random.default_rng(number).standard_normal(len(t)), 16_000)
    return paths


def write_csv(path: Path, audio, seconds=None) -> Path:
    """A manifest of these files, with durations where they are given."""
    rows = zip(["audio", *audio], *([["duration", *seconds]] if seconds else []), strict=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


# Seconds of the utterances of `write_recipe`: twenty to train on, four to validate on.
_SECONDS = np.random.default_rng(0).uniform(1.0, 3.0, 24).round(2).tolist()
TRAINED, VALIDATED = _SECONDS[:20], _SECONDS[20:]


def write_recipe(folder: Path, noise: dict[str, float], **flags) -> Path:
    """A corpus of tones, a tiny model with this noise, and the flags of a run of pretrain.py over them, as a YAML file."""
    paths = write_tones(folder / "audio", [*TRAINED, *VALIDATED])
    tiny_config(**noise).save_pretrained(folder / "model")
    train = write_csv(folder / "train.csv", paths[: len(TRAINED)], TRAINED)
    validation = write_csv(folder / "dev.csv", paths[len(TRAINED) :], VALIDATED)
    values = dict(train_data=[str(train)], validation_data=[str(validation)], config_name=str(folder / "model"))
    values |= dict(min_seconds=0.5, warmup_steps=4, learning_rate=0.001)
    values |= dict(logging_steps=1, save_steps=4, save_total_limit=0)
    (folder / "config.yaml").write_text(yaml.safe_dump(values | flags))
    return folder / "config.yaml"


def unpainted(figure, path: Path) -> Path:
    """In the place of `save_figure`: painting takes as long as a tiny run, and processes of their own paint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def run_here(main, *argv) -> int:
    """Exit status of an entry point run in this process; Accelerate's singletons are forgotten first."""
    from w2v2.cli import run_script

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    before, sys.argv = sys.argv, ["pretrain.py", *map(str, argv)]
    try:
        with mock.patch("w2v2.evaluate.plots.save_figure", unpainted):
            run_script(main)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def error_line(text: str) -> str:
    """The one line on standard error by which a script refuses a user's slip."""
    lines = [line for line in text.split("\n") if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def refusal(capsys, main, *argv, named=()) -> str:
    """The one line, with everything `named`, by which an entry point run in this process ends with status 2."""
    capsys.readouterr()
    status, line = run_here(main, *argv), error_line(capsys.readouterr().err)
    assert status == 2 and all(str(name) in line for name in named), line
    return line


def read_curve(output_dir: Path) -> list[dict]:
    """The records of a run, without what depends on the machine's speed or on the number of processes."""
    records = read_metrics(output_dir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in (*TIMINGS, "num_processes")} for r in records]


def assert_same_run(found: Path, expected: Path, exactly: bool = True) -> None:
    """Weights and curve of two finished runs, and the moments of their last checkpoint; to the bit, or up to rounding."""
    last = max(expected.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])).name
    for name in ("model.safetensors", f"{last}/training_state/optimizer.safetensors"):
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if exactly else torch.allclose(ours[key], value, 1e-3, 1e-5), key
    ours, theirs = read_curve(found), read_curve(expected)
    assert [(r["step"], set(r)) for r in ours] == [(r["step"], set(r)) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in other.keys() - (set() if exactly else {"eval_padded_fraction"}):
            assert mine[name] == (other[name] if exactly else pytest.approx(other[name], rel=1e-3, abs=1e-5)), name
