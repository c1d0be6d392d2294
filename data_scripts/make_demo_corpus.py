"""Make a small corpus of synthesized speech: something to pretrain and fine-tune on within minutes, without a download.

The espeak-ng library inside the PyPI package `espeakng-loader` speaks sentences of a small grammar in many voices.
Train, dev and test share no voice, no timbre and no sentence. The library carries flutter and noise states from one
utterance to the next, so every voice is spoken in order in a process of its own, with the noise seeded: the corpus
depends on its arguments alone. 45 minutes of speech (50 MB) take half a minute on two cores.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from corpus_files import Parser, open_atomic, write_manifest
from demo_speech import ACCENTS, SAMPLING_RATE, TIMBRES, Espeak, Voice, record, sentences
from tqdm import tqdm

from w2v2.errors import SEEDS, UserError, number

FORMAT = 1  # raise it when the same arguments would give another corpus
MIN_SECONDS, MAX_SECONDS = 1.5, 8.0
SPLITS = ("train", "dev", "test")
SHARES = {"dev": 0.1, "test": 0.15}
MIN_TEST_MINUTES = 5.0


def plan_voices(num_voices: int, minutes: float, seed: int) -> list[Voice]:
    """Deal timbres to the splits, then draw each split's voices; UserError where there is too little to deal."""
    rng = random.Random(f"plan {seed}")
    budget = {"dev": SHARES["dev"] * minutes, "test": max(SHARES["test"] * minutes, min(MIN_TEST_MINUTES, minutes / 3))}
    budget["train"] = minutes - sum(budget.values())
    count = {split: max(1, round(share * num_voices)) for split, share in SHARES.items()}
    count["train"] = num_voices - sum(count.values())
    timbres = rng.sample(TIMBRES, len(TIMBRES))
    num_dev, num_test = (round(SHARES[split] * len(timbres)) for split in ("dev", "test"))
    hands = {"dev": timbres[:num_dev], "test": timbres[-num_test:], "train": timbres[num_dev:-num_test]}
    voices = []
    for split in SPLITS:
        accents = rng.sample(ACCENTS, len(ACCENTS))
        for i in range(count[split]):
            lap, place = divmod(i, len(hands[split]))
            accent = accents[(lap + place) % len(accents)]  # a new accent in each lap over the timbres
            speaker, name = f"voice-{len(voices):03d}", f"{accent}+{hands[split][place]}"
            rate, pitch, pitch_range = rng.randint(130, 200), rng.randint(30, 70), rng.randint(25, 80)
            seconds = 60 * budget[split] / count[split]
            voices.append(Voice(speaker, split, name, rate, pitch, pitch_range, seconds, seed=f"{seed} {speaker}"))
    return voices


def speak_voice(voice: Voice, output_dir: Path, library_path: str, data_path: str) -> list[dict]:
    """Write one voice's files and return their rows; to be run in a fresh process, in which nothing was said yet."""
    espeak = Espeak(library_path, data_path)
    espeak.use(voice)
    rng = np.random.default_rng(list(voice.seed.encode()))
    folder = output_dir / "audio" / voice.speaker
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows, seconds = [], 0.0
    for sentence in sentences(voice.split, random.Random(voice.seed)):
        audio = record(espeak.say(sentence), espeak.sampling_rate, rng)
        duration = len(audio) / SAMPLING_RATE
        if not MIN_SECONDS <= duration <= MAX_SECONDS:
            continue
        name = f"{voice.speaker}-{len(rows):04d}"
        path = folder / f"{name}.flac"
        soundfile.write(path, audio, SAMPLING_RATE, subtype="PCM_16")
        path = path.relative_to(output_dir).as_posix()
        rows.append(dict(id=name, audio=path, duration=duration, text=sentence, speaker=voice.speaker))
        seconds += duration
        if seconds >= voice.seconds:
            return rows


def speak_all(voices: list[Voice], output_dir: Path, num_workers: int) -> list[list[dict]]:
    """Rows of every voice; each in a process of its own, `num_workers` at a time."""
    try:
        import espeakng_loader
    except ImportError:
        raise UserError("the package espeakng-loader is missing: pip install espeakng-loader") from None

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "numpy", "soundfile", "soxr"])
    pool = ProcessPoolExecutor(max(1, num_workers), context, max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as short, pool:
        data_path = espeakng_loader.get_data_path()
        if len(os.fsencode(data_path)) > 120:  # the library cuts its data path off at about 160 bytes
            os.symlink(data_path, os.path.join(short, "espeak-ng-data"))
            data_path = os.path.join(short, "espeak-ng-data")
        paths = espeakng_loader.get_library_path(), data_path
        futures = [pool.submit(speak_voice, voice, output_dir, *paths) for voice in voices]
        return [future.result() for future in tqdm(futures, desc="Speaking", unit="voice", disable=None)]


def labelled_subset(voices_rows: list[list[dict]], minutes: float) -> list[dict]:
    """The first utterances of every voice in turn until they hold `minutes`: all voices, about evenly."""
    rows, seconds = [], 0.0
    for turn in range(max(map(len, voices_rows))):
        for voice_rows in voices_rows:
            if turn < len(voice_rows) and seconds < 60 * minutes:
                rows.append(voice_rows[turn])
                seconds += rows[-1]["duration"]
    return sorted(rows, key=lambda row: row["id"])


def summarize(rows: list[dict]) -> dict:
    durations, words = [row["duration"] for row in rows], [row["text"].split() for row in rows]
    return {
        "utterances": len(rows),
        "voices": len({row["speaker"] for row in rows}),
        "minutes": round(sum(durations) / 60, 2),
        "shortest_seconds": round(min(durations), 2),
        "longest_seconds": round(max(durations), 2),
        "words_per_utterance": round(sum(map(len, words)) / len(words), 1),
        "different_words": len({word for own in words for word in own}),
    }


def is_made(output_dir: Path, arguments: dict) -> bool:
    """Whether the folder holds a whole corpus with these arguments. UserError where another corpus is in the way."""
    if not (output_dir / "corpus.json").exists():
        return False
    found = json.loads((output_dir / "corpus.json").read_text())
    if found["arguments"] != arguments:
        made = f"made with {found['arguments']}, not {arguments}"
        raise UserError(f"{output_dir} holds another corpus ({made}): name another output_dir, or delete that one")
    whole = all((output_dir / f"{name}.csv").is_file() for name in found["manifests"])
    return whole and sum(1 for _ in output_dir.glob("audio/*/*.flac")) == found["files"]


def make_corpus(args) -> None:
    """Make the corpus, unless it is there. corpus.json, written last, is the sign that it is whole."""
    output_dir = args.output_dir
    if args.labelled_minutes is None:
        args.labelled_minutes = min(20.0, args.minutes / 2)
    names = ("minutes", "labelled_minutes", "num_voices", "seed")
    arguments = {"format": FORMAT} | {name: getattr(args, name) for name in names}
    if is_made(output_dir, arguments):
        return print(f"{output_dir} holds this corpus already: nothing to do")
    voices = plan_voices(args.num_voices, args.minutes, args.seed)
    train_minutes = sum(voice.seconds for voice in voices if voice.split == "train") / 60
    if not 0 < args.labelled_minutes <= train_minutes:
        found = f"--labelled_minutes {args.labelled_minutes}: train holds {train_minutes:.1f} minutes"
        raise UserError(f"{found}: give at most that")
    output_dir.mkdir(parents=True, exist_ok=True)
    voices_rows = speak_all(voices, output_dir, args.num_workers)
    by_split = {s: [rows for v, rows in zip(voices, voices_rows, strict=True) if v.split == s] for s in SPLITS}
    manifests = {split: [row for rows in by_split[split] for row in rows] for split in SPLITS}
    manifests["train_labelled"] = labelled_subset(by_split["train"], args.labelled_minutes)
    for name, rows in manifests.items():
        write_manifest(output_dir / f"{name}.csv", rows)
    result = {
        "arguments": arguments,
        "files": sum(map(len, voices_rows)),
        "manifests": {name: summarize(rows) for name, rows in manifests.items()},
        "voices": [dataclasses.asdict(voice) for voice in voices],
    }
    with open_atomic(output_dir / "corpus.json") as file:
        file.write(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("output_dir", type=Path, help="folder for the manifests and for audio/<speaker>/<id>.flac")
    parser.add_argument("--minutes", type=number(float, above=0, max=600), default=45.0, help="speech in all")
    parser.add_argument(
        "--labelled_minutes", type=number(float, above=0), help="in train_labelled.csv; None: 20, at most half"
    )
    parser.add_argument("--num_voices", type=number(int, min=3, max=240), default=60, help="synthetic speakers")
    parser.add_argument("--seed", type=number(int, **SEEDS), default=0, help="another seed, another corpus")
    parser.add_argument("--num_workers", type=number(int, min=1, max=1000), default=os.cpu_count(), help="processes")
    return parser.run(make_corpus, argv)


if __name__ == "__main__":
    sys.exit(main())
