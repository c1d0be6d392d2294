"""Cut recordings of any length into utterances of 2 to 20 seconds, where somebody speaks.

    python data_scripts/segment.py podcasts --output data/segments.csv
    python data_scripts/segment.py data/calls.csv --output_dir data/packed
    python pretrain.py --train_data data/segments.csv …

MANIFEST is a manifest, a tar or a folder, as pretrain.py takes them. Each utterance becomes a row that points into its recording: id
(that of the recording, and the start in samples), audio, start and duration (seconds), and channel, speaker, label and
language where the manifest has them. Text does not hold for a part and is dropped. --output_dir also writes the
utterances to WAV shards, as pack_audio.py does: choose it for long compressed files, whose crops are slow.

Silero VAD (pip install silero-vad) tells speech from the rest; a pause below --min_silence_seconds stays within an
utterance. A stretch longer than --max_seconds is cut in the least likely frame of speech that leaves no part shorter
than --min_seconds. What is left out is counted in hours, and files that cannot be read are listed in
OUTPUT.skipped.jsonl. The folder OUTPUT.segmenting keeps what is found: after an interruption, or when the manifest has
grown, the same command goes on from there, to the same rows. --overwrite starts anew.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pack_audio
import pyarrow as pa
import pyarrow.compute as pc
from corpus_files import Parser, list_skipped, map_finished, open_atomic, write_manifest
from slices import HELP, Slice, find_logs, parse_slice, read_records, refuse_unknown, remove_slices
from tqdm import tqdm

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.audio.inspection import identify_file
from w2v2.errors import UserError, number, refuse
from w2v2.manifests.columns import LETTERS
from w2v2.manifests.manifest import read_manifests

LOG = "utterances.jsonl"  # in a folder beside the output
FORMAT = 1  # raise it when the same recording and flags would give other utterances
FLAGS = ("min_seconds", "max_seconds", "threshold", "min_silence_seconds", "pad_seconds")
ROW = ("id", "audio", "start", "duration")
CARRIED = ("channel", "speaker", "label", "language")  # what holds for a part as well
HOUR = 3600 * SAMPLING_RATE  # samples


@dataclass(frozen=True)
class Recording:
    """A channel of a file (None: their mix), and the parts of it that are rows of the manifest."""

    audio: str
    channel: int | None
    extents: tuple[tuple[int, int], ...]  # start and length of each row, in samples at 16 kHz

    def __str__(self) -> str:
        return self.audio

    def find_key(self) -> str:
        """What the utterances depend on beside the flags: other bytes or other rows are another key."""
        return json.dumps([identify_file(self.audio), self.channel, self.extents])


def group_rows(table: pa.Table) -> list[Recording]:
    """Every channel of every file once, the longest first: one that is begun last would be waited for."""
    groups: dict[tuple, dict] = {}
    for row in iterate(table):
        groups.setdefault((row["audio"], row.get("channel")), {})[find_extent(row)] = None
    recordings = [Recording(*name, tuple(extents)) for name, extents in groups.items()]
    return sorted(recordings, key=lambda recording: -sum(length for _, length in recording.extents))


def iterate(table: pa.Table) -> Iterator[dict]:
    for batch in table.to_batches(max_chunksize=1 << 16):
        yield from batch.to_pylist()


def find_extent(row: dict) -> tuple[int, int]:
    return round(row["start"] * SAMPLING_RATE), row["num_samples"]


def find_utterances(recording: Recording, flags: dict) -> list[list | str]:
    from voice_activity import Settings, segment_recording  # the network

    return segment_recording(recording.audio, recording.channel, recording.extents, Settings(**flags))


def read_log(path: Path, part: Slice | None, flags: dict, overwrite: bool) -> dict[str, list]:
    """What earlier runs and all slices found, by a recording's key. UserError where their flags were others."""
    header = {"format": FORMAT, "silero_vad": version("silero-vad"), **flags}
    lines = [] if overwrite else read_records(find_logs(path))
    if any(line != header for line in lines if "key" not in line):
        raise UserError(f"{path} comes from other flags or another silero-vad: give --overwrite, or another output")
    own = part.find_log(path) if part else path
    kept = read_records([own] * own.exists()) if part else lines
    with open_atomic(own) as file:
        file.writelines(json.dumps(line) + "\n" for line in [header, *(line for line in kept if "key" in line)])
    if not part:
        remove_slices(path)
    return {line["key"]: line["rows"] for line in lines if "key" in line}


def find_all(recordings: Sequence[Recording], log: Path, args) -> dict[tuple, tuple[np.ndarray, int] | str]:
    """(audio, channel, start, length) of each row → its utterances (n, 2) and too short samples, or a reason."""
    flags = {name: getattr(args, name) for name in FLAGS}
    known, missing, found = read_log(log, args.slice, flags, args.overwrite), [], {}
    log = args.slice.find_log(log) if args.slice else log

    def keep(recording: Recording, rows: list[list | str]) -> None:
        for extent, row in zip(recording.extents, rows, strict=True):
            compact = row if isinstance(row, str) else (np.array(row[0], np.int64).reshape(-1, 2), row[1])
            found[(recording.audio, recording.channel, *extent)] = compact

    for recording in recordings:
        if rows := known.pop(recording.find_key(), None):
            keep(recording, rows)
        else:
            missing.append(recording)
    with tqdm(total=len(missing), desc="Segmenting", unit="file", disable=None) as bar, open(log, "a") as file:
        hours = 0
        for recording, rows in map_finished(partial(find_utterances, flags=flags), missing, args.num_workers):
            keep(recording, rows)
            if not any(isinstance(row, str) for row in rows):  # it may be mended until the next run
                file.write(json.dumps({"key": recording.find_key(), "rows": rows}) + "\n")
                file.flush()
            hours += sum(length for _, length in recording.extents) / HOUR
            bar.set_postfix_str(f"{hours:.2f} h", refresh=False)
            bar.update()
    return found


def build_rows(table: pa.Table, found: dict, folder: Path) -> Iterator[dict]:
    """A row of the new manifest for each utterance, in the order of the recordings and of time."""

    @lru_cache
    def relate(parent: str) -> str:
        return os.path.relpath(os.path.realpath(parent), folder.resolve())

    most_channels = 1 + (pc.max(table["channel"]).as_py() or 0) if "channel" in table.column_names else 0
    for row in iterate(table):
        key = row["audio"], row.get("channel"), *find_extent(row)
        if isinstance(found[key], str):
            continue
        path = os.path.normpath(os.path.join(relate(os.path.dirname(row["audio"])), os.path.basename(row["audio"])))
        shared = {"audio": f"./{path}" if path[0].isspace() else path}  # readers of CSV drop a space after a comma
        shared |= {name: row[name] for name in CARRIED if name in row}
        if most_channels <= len(LETTERS) and row.get("channel") is not None:  # else numbers wherever there is one
            shared["channel"] = LETTERS[row["channel"]]
        for start, stop in found[key][0].tolist():
            times = {"start": start / SAMPLING_RATE, "duration": (stop - start) / SAMPLING_RATE}
            yield {"id": f"{row['id']}:{start}", **times, **shared}


def tell_left_out(table: pa.Table, found: dict, unmeasured: list[dict], args) -> None:
    """List the rows that cannot be read, and print how many hours are kept and left out, and why."""
    kept = short = heard = lost = 0
    skipped = list(unmeasured)
    for row in iterate(table):
        result = found[(row["audio"], row.get("channel"), *find_extent(row))]
        if isinstance(result, str):
            lost += row["num_samples"]
            skipped.append({"id": row["id"], "audio": row["audio"], "reason": result})
        else:
            heard += row["num_samples"]
            kept += int(np.diff(result[0]).sum())
            short += result[1]
    list_skipped(args.output.with_suffix(".skipped.jsonl"), skipped)
    if not kept:
        raise UserError(
            f"{', '.join(args.manifests)}: no speech of {args.min_seconds:g} s or more in {heard / HOUR:.4f} hours, and "
            f"{len(skipped)} rows cannot be read: lower --threshold or --min_seconds, or give other audio"
        )
    total, unheard = len(table) + len(unmeasured), heard - kept - short
    unknown = f", and {len(unmeasured):,} rows of unknown length" if unmeasured else ""
    print(
        f"{(heard + lost) / HOUR:.4f} hours in {total:,} rows: {kept / HOUR:.4f} kept; left out: {unheard / HOUR:.4f} without "
        f"speech, {short / HOUR:.4f} of speech shorter than {args.min_seconds:g} s, {lost / HOUR:.4f} unreadable{unknown}"
    )
    if "text" in table.column_names:
        print("the column text is dropped: it does not hold for a part of a recording")


def segment(args) -> None:
    """The whole job. UserError for a user's slip, and where no speech is found."""
    refuse(
        (args.slice and args.overwrite, "--overwrite with --slice would delete what other slices found: leave it out, and remove the output yourself"),
        (not args.output and not args.output_dir, "give --output FILE.csv, or --output_dir FOLDER for WAV shards"),
        (args.max_seconds < 2 * args.min_seconds + 0.04,
         f"--max_seconds {args.max_seconds:g} is below twice --min_seconds plus 0.04, so longer speech could not be cut: raise it"),
    )  # fmt: skip
    args.output = args.output or args.output_dir.with_name(f"{args.output_dir.name}.csv")
    is_source = args.output.resolve() in [Path(name).expanduser().resolve() for name in args.manifests]
    refuse(
        (args.output.suffix.lower() != ".csv", f"--output {args.output}: the manifest is a CSV: end its name in .csv"),
        (is_source, f"--output {args.output} is one of the manifests: name another file"),
    )
    if args.output_dir:
        pack_audio.check_flags(args)
    try:
        version("silero-vad")
    except PackageNotFoundError:
        raise UserError("the package silero-vad is missing: pip install silero-vad") from None
    folder = args.output.with_suffix(".segmenting")
    options = {"data_root": args.data_root, "cache_dir": folder, "further": ["language"]}
    table, unmeasured, _ = read_manifests(args.manifests, **options, fill=not args.slice)
    if args.slice:
        refuse_unknown(table["num_samples"])
        found = find_all(args.slice.take(group_rows(table)), folder / LOG, args)
        print(f"slice {args.slice.index} of {args.slice.count}: {len(found):,} of {len(table):,} rows segmented")
        return
    found = find_all(group_rows(table), folder / LOG, args)
    tell_left_out(table, found, unmeasured, args)
    columns = *ROW, *(name for name in CARRIED if name in table.column_names)
    write_manifest(args.output, build_rows(table, found, args.output.parent), columns)
    if args.output_dir:
        argv = [args.output, "--output_dir", args.output_dir, *["--overwrite"] * args.overwrite]
        argv += ["--num_workers", max(1, args.num_workers)]
        if pack_audio.main(list(map(str, argv))):
            sys.exit(2)  # it said why


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "manifests", nargs="+", metavar="MANIFEST", help="manifests, tars or folders, as for pretrain.py"
    )
    parser.add_argument("--output", type=Path, help="the manifest to write, a .csv (None: OUTPUT_DIR.csv)")
    parser.add_argument("--output_dir", type=Path, help="folder for WAV shards, where they are wanted")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    seconds, positive = number(float, min=0, max=60), number(float, above=0, max=3600)
    parser.add_argument("--min_seconds", type=positive, default=2.0, help="shorter speech is left out")
    parser.add_argument("--max_seconds", type=positive, default=20.0, help="longer speech is cut")
    parser.add_argument(
        "--threshold",
        type=number(float, above=0, below=1),
        default=0.5,
        help="probability of speech (default: Silero's own)",
    )
    parser.add_argument("--min_silence_seconds", type=seconds, default=0.5, help="shorter pauses end no utterance")
    parser.add_argument("--pad_seconds", type=seconds, default=0.1, help="kept before and after speech")
    parser.add_argument("--num_workers", type=number(int, min=0, max=1000), default=os.cpu_count(), help="processes")
    parser.add_argument("--slice", type=parse_slice, metavar="I/N", help=HELP)
    parser.add_argument("--overwrite", action="store_true", help="forget what earlier runs found and packed")
    return parser.run(segment, argv)


if __name__ == "__main__":
    sys.exit(main())
