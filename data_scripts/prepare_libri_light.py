"""Make manifests of Libri-Light: its unlabelled recordings, cut where its own voice activity says, and its few labels.

    python data_scripts/prepare_libri_light.py /data/librilight --output_dir data/libri_light

The folder is what the archives of https://github.com/facebookresearch/libri-light unpack into, some or all of

    small/ medium/ large/ duplicate/    SPEAKER/BOOK/*.flac, a .json of the same name beside each
    librispeech_finetuning/             1h/{0..5}/{clean,other} and 9h/{clean,other}, SPEAKER/CHAPTER as in LibriSpeech

Each recording (minutes long, some an hour) is cut into utterances: stretches of `voice_activity`, joined in their order
while they fit into --most_seconds, as the release's cut_by_vad.py does. Pauses between them stay, for rows point into
the recording, so a pause longer than --most_pause ends an utterance; a longer stretch is cut into equal parts. small.csv
and so on hold id, audio, start, duration and speaker. --whole_files leaves the recordings uncut, and
data_scripts/segment.py cuts them by a voice activity detector instead.

The limited supervision becomes 10min-0.csv … 10min-5.csv, 1h.csv (all of these), 9h.csv and 10h.csv (1h and 9h), with
text. Hours are held against the release's figures; every recording needs its .json, every transcript its audio.
"""

import json
import sys
from collections.abc import Iterator
from math import ceil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from corpus_files import Parser
from corpus_parts import Part, find_root, write_parts
from prepare_librispeech import scan_chapters
from tqdm import tqdm

from w2v2.errors import number

KNOWN = {"small": 577, "medium": 5_193, "large": 51_934, "duplicate": None}  # hours of the recordings
HOURS_TOLERANCE = 0.01
LABELLED = "librispeech_finetuning"
FOLDERS = {f"10min-{fold}": f"1h/{fold}" for fold in range(6)} | {"9h": "9h"}
COMBINED = {"1h": [f"10min-{fold}" for fold in range(6)], "10h": [*FOLDERS]}
RECORDINGS = ("id", "audio", "duration", "speaker")
UTTERANCES = ("id", "audio", "start", "duration", "speaker")
SHORTEST = 0.02  # seconds of speech


def read_activity(recording: Path) -> list[tuple[float, float]] | None:
    """Starts and ends of speech, in seconds, by the .json of a recording; None where none can be read."""
    try:
        activity = json.loads(recording.with_suffix(".json").read_bytes())["voice_activity"]
        stretches = [(float(start), float(end)) for start, end in activity]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return sorted((start, end) for start, end in stretches if 0 <= start <= end - SHORTEST)


def join_stretches(stretches: list[tuple[float, float]], most_seconds: float, most_pause: float) -> np.ndarray:
    """Starts and ends of utterances, (n, 2): neighbours joined while they fit, what is longer in equal parts."""
    joined: list[tuple[float, float]] = []
    for start, end in stretches:
        if joined and start - joined[-1][1] <= most_pause and end - joined[-1][0] <= most_seconds:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    bounds = [np.linspace(start, end, 1 + max(1, ceil((end - start) / most_seconds))) for start, end in joined]
    return np.concatenate([np.empty((0, 2)), *(np.column_stack([points[:-1], points[1:]]) for points in bounds)])


def cut_recording(row: dict) -> Iterator[dict]:
    """A row for each utterance of a recording."""
    for place, (start, end) in enumerate(row["utterances"].round(3).tolist()):
        own = {"id": f"{row['id']}-{place:04d}", "audio": row["audio"], "speaker": row["speaker"]}
        yield own | {"start": start, "duration": round(end - start, 3)}


def scan_recordings(root: Path, name: str, args) -> Part:
    """A row for each recording of a subset, with its utterances, and what is wrong with the subset."""
    files = sorted((root / name).glob("*/*/*.flac"))
    part = Part(args.output_dir / f"{name}.csv", root, [], RECORDINGS, hours=KNOWN[name], tolerance=HOURS_TOLERANCE)
    for file in files:
        path = file.relative_to(root)
        row = {"id": path.relative_to(name).with_suffix("").as_posix(), "audio": path.as_posix()}
        part.rows.append(row | {"speaker": path.parts[1]})
    if args.whole_files:
        return part
    with ThreadPool(32) as pool:  # network storage answers many at once
        found = tqdm(pool.imap(read_activity, files, 16), "Reading voice activity", len(files), disable=None)
        unread, mute = [], 0
        for row, stretches in zip(part.rows, found, strict=True):
            if stretches is None:
                unread.append(f"{row['audio'].removesuffix('.flac')}.json")
                continue
            mute += not stretches
            row["utterances"] = join_stretches(stretches, args.most_seconds, args.most_pause)
            row["stop"] = max((end for _, end in stretches), default=0.0)
    part.rows = [row for row in part.rows if "utterances" in row]
    part.columns, part.cut = UTTERANCES, cut_recording
    part.add_fault(unread, "recordings whose .json is missing or damaged (--whole_files needs none)")
    silent = {path.with_suffix(".flac") for path in (root / name).glob("*/*/*.json")} - {*files}
    part.add_fault(sorted(path.relative_to(root).as_posix() for path in silent), "recordings missing, with a .json")
    if mute:
        print(
            f"{name}: {mute:,} of {len(files):,} recordings hold no speech, according to their .json", file=sys.stderr
        )
    return part


def find_parts(root: Path, args) -> Iterator[Part]:
    """A part for each subset that is there."""
    for name in KNOWN:
        if (root / name).is_dir():
            yield scan_recordings(root, name, args)
    for name, folder in FOLDERS.items() if (root / LABELLED).is_dir() else ():
        folders = [root / LABELLED / folder / kind for kind in ("clean", "other")]
        yield scan_chapters(Part(args.output_dir / f"{name}.csv", root / LABELLED, []), *folders)


def prepare(args) -> None:
    """The whole job. UserError names every subset that is not whole, after the whole ones were written."""
    root = find_root(args.folder, [*KNOWN, LABELLED], "librilight")
    written = write_parts(find_parts(root, args), args, COMBINED if (root / LABELLED).is_dir() else {})
    if args.whole_files and (recordings := [str(path) for path in written if path.stem in KNOWN]):
        print(f"cut these whole recordings with data_scripts/segment.py: {', '.join(recordings)}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder that the archives are unpacked into", "--output_dir")
    least, seconds = number(float, min=1), number(float, min=0)
    parser.add_argument("--most_seconds", type=least, default=20.0, help="longest utterance")
    parser.add_argument("--most_pause", type=seconds, default=1.0, help="longest pause within one, in seconds")
    parser.add_argument("--whole_files", action="store_true", help="a row for each recording, uncut")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
