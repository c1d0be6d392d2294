"""Small trees of audio, laid out as the releases of Common Voice, Libri-Light and VoxPopuli are."""

import gzip
import json
from pathlib import Path

import numpy as np
import soundfile
from encoding import encode
from test_prepare import write_audio

CV_HEADER = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
)
# clip: speaker, seconds, lists. A dev and a test speaker have clips in validated and other as well.
CLIPS = {
    1: ("ann", 1.25, "validated train"),
    2: ("ann", 0.75, "validated"),
    3: ("ben", 1.0, "validated dev"),
    4: ("ben", 1.5, "validated"),
    5: ("cat", 0.5, "validated test"),
    6: ("cat", 1.0, "other"),
    7: ("dan", 2.0, "other"),
    8: ("eve", 1.0, "invalidated"),
}


def encode_clips(folder: Path) -> dict[float, bytes]:
    """MP3s at 48 kHz, as Common Voice has them, by their seconds."""
    noise = np.random.default_rng(0).standard_normal(96_000) * 0.1
    lengths = {seconds for _, seconds, _ in CLIPS.values()}
    paths = {s: encode(folder / f"{s}.mp3", noise[: round(s * 48_000)], 48_000, "libmp3lame") for s in lengths}
    return {seconds: Path(path).read_bytes() for seconds, path in paths.items()}


def write_language(folder: Path, clips: dict, spoken: dict) -> None:
    name = folder.name
    (folder / "clips").mkdir(parents=True)
    lists = {key: [] for key in ("validated", "other", "invalidated", "train", "dev", "test")}
    durations = ["clip\tduration[ms]"]
    for number, (speaker, seconds, where) in clips.items():
        clip = f"common_voice_{name}_{number}.mp3"
        (folder / "clips" / clip).write_bytes(spoken[seconds])
        durations.append(f"{clip}\t{round(seconds * 1000)}")
        cells = [speaker, clip, "f" * 64, f'" lone quote {number}', "", "2", "0", "", "", "", "", name, ""]
        for key in where.split():
            lists[key].append("\t".join(cells))
    for key, lines in lists.items():
        (folder / f"{key}.tsv").write_text("\n".join(["\t".join(CV_HEADER.split()), *lines]) + "\n", encoding="utf-8")
    (folder / "clip_durations.tsv").write_text("\n".join(durations) + "\n")


def write_release(folder: Path, spoken: dict[float, bytes]) -> Path:
    """A release of two languages, one of which has neither dev nor test clips."""
    write_language(folder / "sw", CLIPS, spoken)
    write_language(folder / "zh-CN", {1: ("fay", 1.0, "validated train"), 2: ("gus", 0.5, "other")}, spoken)
    return folder


RECORDINGS = {  # seconds, and stretches of speech
    "small/100/book_one/chapter_01": (40.0, [[0.5, 4.0], [4.5, 9.0], [12.0, 14.0], [15.0, 38.0]]),
    "small/100/book_one/chapter_02": (5.0, []),
    "small/207/book_two/chapter_01": (3.0, [[0.0, 3.004]]),
    "medium/300/book/chapter_01": (6.0, [[1.0, 2.0]]),
}
CUT = {
    "book_one/chapter_01": [(0.5, 8.5), (12.0, 2.0), (15.0, 11.5), (26.5, 11.5)],
    "book_two/chapter_01": [(0.0, 3.004)],
}


def write_libri_light(root: Path) -> dict[str, float]:
    """Two unlabelled subsets, and the limited supervision. Returns their hours."""
    for name, (seconds, activity) in RECORDINGS.items():
        write_audio(root / f"{name}.flac", seconds)
        meta = {"speaker": name.split("/")[1], "book_meta": {"id": "1"}, "snr": 5.4, "voice_activity": activity}
        (root / f"{name}.json").write_text(json.dumps(meta))
    for number, folder in enumerate([*(f"1h/{fold}" for fold in range(6)), "9h"]):
        for kind, speaker in (("clean", f"10{number}"), ("other", f"20{number}")):
            chapter = root / "librispeech_finetuning" / folder / kind / speaker / "7"
            write_audio(chapter / f"{speaker}-7-0000.flac", 0.25)
            (chapter / f"{speaker}-7.trans.txt").write_text(f"{speaker}-7-0000 A WORD\n")
    return {"small": 48 / 3600, "medium": 6 / 3600}


EVENTS = {  # segments of each recording, in seconds
    "20180117-0900-PLENARY-15_en": [(0.0, 1.0), (1.25, 2.0)],
    "20190116-0900-PLENARY-4_en": [(0.5, 2.5)],
    "20190116-0900-PLENARY-4_de": [(0.25, 1.0)],
    "20190205-AGRI-1_de": [(0.0, 1.5)],
}
TRANSCRIBED = {
    "train": "20190116-0900-PLENARY-4-en_20190116-09:10:04_0",
    "dev": "20180117-0900-PLENARY-15-en_20180117-09:32:04_17",
}


def write_voxpopuli(root: Path) -> Path:
    """Recordings in two languages, and transcribed English: dev lies in one of the unlabelled sessions."""
    lines = ["event_id\tsegment_no\tstart\tend"]
    for event, segments in EVENTS.items():
        path = root / "raw_audios" / event[-2:] / event[:4] / f"{event}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(0).standard_normal(48_000) * 0.1, 16_000, format="OGG")
        lines += [f"{event}\t{number}\t{start}\t{end}" for number, (start, end) in enumerate(segments)]
    (root / "unlabelled_data").mkdir()
    with gzip.open(root / "unlabelled_data" / "unlabelled_v2.tsv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    folder = root / "transcribed_data" / "en"
    for split in ("train", "dev", "test"):
        name = TRANSCRIBED.get(split, "20200101-0900-PLENARY-1-en_20200101-09:00:00_1")
        (folder / name[:4]).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name[:4] / f"{name}.ogg", np.full(16_000, 0.1), 16_000, format="OGG")
        header = "id raw_text normalized_text speaker_id split gender is_gold_transcript accent".replace(" ", "\t")
        row = f"{name}\tA Word.\ta word\t{split}-mep\t{split}\tmale\tTrue\tNone"
        (folder / f"asr_{split}.tsv").write_text(f"{header}\n{row}\n")
    return root


def cut_segments(root: Path) -> None:
    """The files that VoxPopuli's get_unlabelled_data.py cuts."""
    for event, segments in EVENTS.items():
        for number, (start, end) in enumerate(segments):
            path = root / "unlabelled_data" / event[-2:] / event[:4] / f"{event}_{number}.ogg"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.full(round((end - start) * 16_000), 0.1), 16_000, format="OGG")


def replace(old: str, new: str):
    """Put `new` in the place of `old` in a file."""
    return lambda path: path.write_text(path.read_text().replace(old, new))
