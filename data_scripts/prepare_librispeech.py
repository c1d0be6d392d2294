"""Make manifests of LibriSpeech, after checking that every subset is whole.

    python data_scripts/prepare_librispeech.py /data/LibriSpeech --output_dir data/librispeech

The folder is the one that the archives of https://www.openslr.org/12 unpack to: SUBSET/SPEAKER/CHAPTER/*.flac with one
*.trans.txt a chapter. Each subset that is there becomes OUTPUT_DIR/SUBSET.csv (id, audio, duration, text, speaker), and
the three training subsets together train-960.csv. Utterances and hours are held against the published figures. What was
checked is noted in OUTPUT_DIR/librispeech.json, so that a second call finds all done without reading any audio.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from corpus_files import COLUMNS, Parser, exit_status, measure, write_manifest

from w2v2.errors import UserError

# Utterances, and hours to a tenth; those of dev and test are not checked: sources round or count them differently.
KNOWN = {
    "train-clean-100": (28_539, 100.6),
    "train-clean-360": (104_014, 363.6),
    "train-other-500": (148_688, 496.7),
    "dev-clean": (2_703, None),
    "dev-other": (2_864, None),
    "test-clean": (2_620, None),
    "test-other": (2_939, None),
}
HOURS_TOLERANCE = 0.005  # relative
COMBINED = {"train-960": ("train-clean-100", "train-clean-360", "train-other-500")}
FORMAT = 1  # raise it when the manifests of the same audio would change


def find_root(folder: Path) -> Path:
    """The folder that holds the subsets: the one given, or LibriSpeech/ in it; UserError where neither has any."""
    for root in (folder, folder / "LibriSpeech"):
        if any((root / name).is_dir() for name in KNOWN):
            return root
    raise UserError(
        f"{folder}: holds no subset of LibriSpeech ({', '.join(KNOWN)}); give the folder that the archives unpack to"
    )


def chapters(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_dir())


def fingerprint(folder: Path) -> str:
    """Changes when a file is added to, removed from or renamed in any chapter, at the cost of a stat a chapter."""
    stamps = "".join(f"{chapter.relative_to(folder)} {chapter.stat().st_mtime_ns}\n" for chapter in chapters(folder))
    return hashlib.sha256(stamps.encode()).hexdigest()


def read_transcripts(path: Path) -> dict[str, str]:
    """Utterance id → text from one chapter's `ID WORDS…` lines; {} where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; unpack the archive again") from None
    return {name: text.strip() for name, _, text in (line.partition(" ") for line in lines if line.strip())}


def scan_subset(folder: Path, prefix: str, num_workers: int) -> tuple[list[dict], list[str]]:
    """Rows of one subset's usable utterances, with audio paths under `prefix`, and all that is wrong with it in words."""
    found, silent = [], []
    for chapter in chapters(folder):
        speaker = chapter.parent.name
        texts = read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt")
        files = sorted(entry.name for entry in os.scandir(chapter) if entry.name.endswith(".flac"))
        silent += sorted(texts.keys() - {Path(file).stem for file in files})
        for file in files:
            path = f"{speaker}/{chapter.name}/{file}"
            name = Path(file).stem
            row = {"id": name, "audio": f"{prefix}/{path}", "text": texts.get(name, ""), "speaker": speaker}
            found.append((folder / path, row))
    print(f"{folder.name}: {len(found):,} files")
    durations, errors = measure([str(path) for path, _ in found], num_workers)
    rows = [{**row, "duration": d} for (_, row), d in zip(found, durations, strict=True) if d is not None]
    wordless = [row["id"] for row in rows if not row["text"]]
    problems = []
    expected, expected_hours = KNOWN[folder.name]
    if len(found) != expected:
        problems.append(f"{len(found):,} of {expected:,} utterances found")
    if errors:
        problems.append(f"{len(errors):,} unusable files, the first: {errors[0]}")
    if silent:
        problems.append(f"{len(silent):,} transcribed utterances without audio, the first: {silent[0]}")
    if wordless:
        problems.append(f"{len(wordless):,} utterances without transcript, the first: {wordless[0]}")
    hours = sum(row["duration"] for row in rows) / 3600
    if not problems and expected_hours and abs(hours / expected_hours - 1) > HOURS_TOLERANCE:
        problems.append(f"{hours:.1f} hours found where {expected_hours} are expected")
    return rows, problems


def up_to_date(record: dict | None, manifest: Path, asked: dict) -> bool:
    """Whether a subset was scanned as it is now and, if anything was written of it, its manifest still lies there."""
    if record is None or any(record.get(key) != value for key, value in asked.items()):
        return False
    return record["bytes"] == (manifest.stat().st_size if manifest.is_file() else 0)


def prepare_subset(folder: Path, output_dir: Path, record: dict | None, args) -> dict:
    """Scan one subset and write its manifest unless that is done; returns what librispeech.json is to say of it."""
    manifest = output_dir / f"{folder.name}.csv"
    prefix = os.path.relpath(folder.resolve(), output_dir.resolve())
    asked = {"format": FORMAT, "prefix": prefix, "fingerprint": fingerprint(folder)}
    if up_to_date(record, manifest, asked) and (record["bytes"] or not args.allow_incomplete):
        return record
    rows, problems = scan_subset(folder, prefix, args.num_workers)
    if rows and (args.allow_incomplete or not problems):
        write_manifest(manifest, rows)
    else:
        manifest.unlink(missing_ok=True)
    hours = round(sum(row["duration"] for row in rows) / 3600, 3)
    size = manifest.stat().st_size if manifest.is_file() else 0
    return {**asked, "bytes": size, "utterances": len(rows), "hours": hours, "problems": problems}


def combine(output_dir: Path, name: str, pieces: list[Path]):
    """Concatenate manifests under one header, unless that is done."""
    header = len((",".join(COLUMNS) + "\n").encode())
    whole = output_dir / f"{name}.csv"
    size = sum(piece.stat().st_size for piece in pieces) - header * (len(pieces) - 1)
    newest = max(piece.stat().st_mtime_ns for piece in pieces)
    if whole.is_file() and whole.stat().st_size == size and whole.stat().st_mtime_ns >= newest:
        return
    unfinished = whole.with_name(whole.name + ".tmp")
    with open(unfinished, "wb") as target:
        for place, piece in enumerate(pieces):
            with open(piece, "rb") as source:
                source.seek(header if place else 0)
                shutil.copyfileobj(source, target)
    os.replace(unfinished, whole)


def read_records(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}  # nothing was done, or nothing that can be relied on


def prepare(args):
    """The whole job; UserError that names every subset that is not whole, after the whole ones were written."""
    root = find_root(args.folder)
    names = args.subsets or [name for name in KNOWN if (root / name).is_dir()]
    missing = [name for name in names if not (root / name).is_dir()]
    if missing:
        raise UserError(f"--subsets {' '.join(missing)}: not in {root}; unpack there, or leave them out")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    records_path = args.output_dir / "librispeech.json"
    records = read_records(records_path)
    for name in names:
        records[name] = prepare_subset(root / name, args.output_dir, records.get(name), args)
        unfinished = records_path.with_name(records_path.name + ".tmp")
        unfinished.write_text(json.dumps(records, indent=1) + "\n")
        os.replace(unfinished, records_path)
        if records[name]["bytes"]:
            utterances, hours = records[name]["utterances"], records[name]["hours"]
            print(f"{args.output_dir / name}.csv: {utterances:,} utterances, {hours:.2f} hours")
    for name, parts in COMBINED.items():
        pieces = [args.output_dir / f"{part}.csv" for part in parts]
        if set(parts) <= set(names) and all(piece.is_file() for piece in pieces):
            combine(args.output_dir, name, pieces)
            print(f"{args.output_dir / name}.csv: the training subsets together")
    faults = [f"{name}: {', '.join(records[name]['problems'])}" for name in names if records[name]["problems"]]
    if faults and not (args.allow_incomplete and all(records[name]["bytes"] for name in names)):
        raise UserError(
            "; ".join(faults) + "; unpack the archives again, or pass --allow_incomplete to take what is there"
        )
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", type=Path, help="folder of the unpacked subsets (or the folder that holds LibriSpeech/)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the manifests")
    parser.add_argument(
        "--subsets", nargs="+", choices=list(KNOWN), metavar="SUBSET", help="only these (default: all there)"
    )
    parser.add_argument("--allow_incomplete", action="store_true", help="warn of subsets that are not whole, and go on")
    parser.add_argument("--num_workers", type=int, default=16, help="threads that read headers (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
