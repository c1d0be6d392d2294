"""Make manifests of VoxCeleb1 for speaker identification, by its official split.

    python data_scripts/prepare_voxceleb.py /data/voxceleb1/wav --split iden_split.txt --output_dir data/voxceleb1

The folder holds SPEAKER/VIDEO/UTTERANCE.wav (both archives, dev and test, unpacked into one). `iden_split.txt` comes
with the corpus: a line is `1 id10003/na8-QEFmj44/00003.wav`, where 1 trains, 2 validates and 3 tests. It becomes
train.csv, dev.csv and test.csv (id, audio, duration, speaker): 138,361, 6,904 and 8,251 utterances of 1,251 speakers.
Verification needs no manifest: `verify_speakers.py --trials veri_test.txt`.
"""

import os
import sys
from pathlib import Path

from corpus_files import Parser, exit_status, measure, write_manifest

from w2v2.errors import UserError

COLUMNS = ("id", "audio", "duration", "speaker")
SETS = {"1": ("train", 138_361), "2": ("dev", 6_904), "3": ("test", 8_251)}


def read_split(path: Path) -> list[tuple[str, str]]:
    """(set, path of the utterance) of every line; UserError that names the line for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--split {path}: cannot be read ({getattr(error, 'strerror', None) or 'no UTF-8 text'})"
        ) from None
    entries = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[0] not in SETS or fields[1].count("/") != 2:
            raise UserError(
                f"{path}, line {number}: {line[:80]!r} is no `1 SPEAKER/VIDEO/UTTERANCE.wav`: give VoxCeleb1's own list"
            )
        entries.append((SETS[fields[0]][0], fields[1]))
    if not entries:
        raise UserError(f"--split {path}: is empty: give VoxCeleb1's iden_split.txt")
    return entries


def prepare(args) -> None:
    entries = read_split(args.split)
    missing = [name for _, name in entries if not (args.folder / name).is_file()]
    if missing and (len(missing) == len(entries) or not args.allow_incomplete):
        raise UserError(
            f"{args.folder}: {len(missing):,} of {len(entries):,} utterances of {args.split.name} are not there, such as "
            f"{missing[0]}: unpack both archives, or pass --allow_incomplete"
        )
    absent = set(missing)
    entries = [entry for entry in entries if entry[1] not in absent]
    durations, errors = measure([str(args.folder / name) for _, name in entries], args.num_workers)
    if errors and not args.allow_incomplete:
        raise UserError(
            f"{args.folder}: {len(errors):,} unusable files, such as {errors[0]}; unpack again, or pass --allow_incomplete"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    prefix = os.path.relpath(args.folder.resolve(), args.output_dir.resolve())
    for part, expected in SETS.values():
        rows = [
            dict(id=name.removesuffix(".wav"), audio=f"{prefix}/{name}", duration=seconds, speaker=name.split("/")[0])
            for (its, name), seconds in zip(entries, durations, strict=True)
            if its == part and seconds is not None
        ]
        write_manifest(args.output_dir / f"{part}.csv", rows, COLUMNS)
        hours = sum(row["duration"] for row in rows) / 3600
        speakers = len({row["speaker"] for row in rows})
        print(f"{args.output_dir / part}.csv: {len(rows):,} utterances, {hours:.2f} hours, {speakers:,} speakers")
        if len(rows) != expected:
            print(f"warning: {part}: {len(rows):,} utterances, where the split has {expected:,}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of SPEAKER/VIDEO/UTTERANCE.wav")
    parser.add_argument("--split", type=Path, required=True, help="iden_split.txt")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the manifests")
    parser.add_argument("--allow_incomplete", action="store_true", help="warn of what is missing, and go on")
    parser.add_argument("--num_workers", type=int, default=16, help="threads that read headers (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
