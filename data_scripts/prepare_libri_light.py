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
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from corpus_files import COLUMNS, Parser
from corpus_parts import Part, find_root, write_parts
from prepare_librispeech import scan_chapters

from w2v2.data.audio import AudioError
from w2v2.data.segments import TOLERANCE
from w2v2.errors import number

KNOWN = {"small": 577, "medium": 5_193, "large": 51_934, "duplicate": None}  # hours of the recordings
HOURS_TOLERANCE = 0.01
LABELLED = "librispeech_finetuning"
FOLDERS = {f"10min-{fold}": f"1h/{fold}" for fold in range(6)} | {"9h": "9h"}
COMBINED = {"1h": [f"10min-{fold}" for fold in range(6)]} | {"10h": [*FOLDERS]}
UTTERANCES = ("id", "audio", "start", "duration", "speaker")
NEXT = "go on with data_scripts/segment.py, which cuts recordings into utterances"


def read_activity(path: Path) -> list[list[float]] | None:
    """Starts and ends of speech, in seconds, by a recording's .json; None where there is none that can be read."""
    try:
        stretches = [(float(start), float(end)) for start, end in json.loads(path.read_bytes())["voice_activity"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return sorted((start, end) for start, end in stretches if 0 <= start < end)


def join_stretches(stretches: list, most_seconds: float, most_pause: float) -> list[tuple[float, float]]:
    """Starts and ends of utterances: neighbours joined while they fit, what is longer in equal parts."""
    joined: list[tuple[float, float]] = []
    for start, end in stretches:
        if joined and start - joined[-1][1] <= most_pause and end - joined[-1][0] <= most_seconds:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    cut = []
    for start, end in joined:
        parts = max(1, -int(-(end - start) // most_seconds))
        cut += [(start + (end - start) * n / parts, start + (end - start) * (n + 1) / parts) for n in range(parts)]
    return cut


def cut_recording(row: dict, args) -> list[dict]:
    """The utterances of a recording. AudioError where its speech goes on after its end."""
    stretches = row.pop("activity")
    if stretches and stretches[-1][1] > row["duration"] + TOLERANCE:
        said = f"lasts {row['duration']:.2f} s, where its .json has speech until {stretches[-1][1]:.2f} s"
        raise AudioError(row["audio"], said)
    rows = []
    for number_, (start, end) in enumerate(join_stretches(stretches, args.most_seconds, args.most_pause)):
        own = {"id": f"{row['id']}-{number_:04d}", "start": round(start, 3), "duration": round(end - start, 3)}
        rows.append(row | own)
    return rows


def scan_recordings(root: Path, name: str, args) -> Part:
    """A row for each recording of a subset, with its voice activity, and what is wrong with the subset."""
    audio = [path.relative_to(root) for path in sorted((root / name).glob("*/*/*.flac"))]
    rows = [
        {"id": p.relative_to(name).with_suffix("").as_posix(), "audio": p.as_posix(), "speaker": p.parts[1]}
        for p in audio
    ]
    known = {"hours": KNOWN[name], "tolerance": HOURS_TOLERANCE}
    if args.whole_files:
        columns = [column for column in COLUMNS if column != "text"]
        return Part(args.output_dir / f"{name}.csv", root, rows, columns, **known)
    with ThreadPool(32) as pool:  # network storage answers many at once
        found = pool.map(read_activity, [(root / path).with_suffix(".json") for path in audio], 16)
    part = Part(args.output_dir / f"{name}.csv", root, [], UTTERANCES, **known, cut=partial(cut_recording, args=args))
    part.rows = [
        row | {"activity": activity} for row, activity in zip(rows, found, strict=True) if activity is not None
    ]
    unread = [
        path.with_suffix(".json").as_posix() for path, activity in zip(audio, found, strict=True) if activity is None
    ]
    part.add_fault(unread, "recordings whose .json is missing or damaged (--whole_files needs none)")
    silent = sorted({*(root / name).glob("*/*/*.json")} - {(root / path).with_suffix(".json") for path in audio})
    part.add_fault([path.relative_to(root).as_posix() for path in silent], "recordings without audio")
    mute = sum(not activity for activity in found if activity is not None)
    if mute:
        print(f"{name}: {mute:,} of {len(audio):,} recordings hold no speech by their .json", file=sys.stderr)
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
    is_labelled = (root / LABELLED).is_dir()
    combined = {
        args.output_dir / f"{name}.csv": [args.output_dir / f"{part}.csv" for part in parts]
        for name, parts in COMBINED.items()
    }
    written = write_parts(find_parts(root, args), args, combined if is_labelled else {})
    recordings = [str(path) for path in written if path.stem in KNOWN]
    if args.whole_files and recordings:
        print(f"{', '.join(recordings)}: whole recordings: {NEXT}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder that the archives are unpacked into", "--output_dir")
    seconds = number(float, above=0)
    parser.add_argument("--most_seconds", type=seconds, default=20.0, help="longest utterance")
    parser.add_argument(
        "--most_pause", type=number(float, min=0), default=1.0, help="longest pause within one, in seconds"
    )
    parser.add_argument("--whole_files", action="store_true", help="a row for each recording, uncut")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
