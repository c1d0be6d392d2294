"""Make manifests of LibriSpeech, after checking that every subset is whole.

    python data_scripts/prepare_librispeech.py /data/LibriSpeech --output_dir data/librispeech

The folder is the one that the archives of https://www.openslr.org/12 unpack to: SUBSET/SPEAKER/CHAPTER/*.flac with one
*.trans.txt a chapter. Each subset that is there becomes OUTPUT_DIR/SUBSET.csv (id, audio, duration, text, speaker), and
the three training subsets together train-960.csv. Utterances and hours are held against the published figures.
"""

import os
import sys
from pathlib import Path

from corpus_files import Parser, exit_status, measure, write_manifest

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


def find_root(folder: Path) -> Path:
    """The folder that holds the subsets: the one given, or LibriSpeech/ in it; UserError where neither has any."""
    for root in (folder, folder / "LibriSpeech"):
        if any((root / name).is_dir() for name in KNOWN):
            return root
    raise UserError(
        f"{folder}: holds no subset of LibriSpeech ({', '.join(KNOWN)}); give the folder that the archives unpack to"
    )


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
    """Rows of one subset's usable utterances, with audio paths under `prefix`, and a line for each fault."""
    rows, silent = [], []
    for chapter in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        speaker = chapter.parent.name
        texts = read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt")
        names = sorted(path.stem for path in chapter.glob("*.flac"))
        silent += sorted(texts.keys() - set(names))
        for name in names:
            audio = f"{prefix}/{speaker}/{chapter.name}/{name}.flac"
            rows.append({"id": name, "audio": audio, "text": texts.get(name, ""), "speaker": speaker})
    print(f"{folder.name}: {len(rows):,} files")
    paths = [str(folder / row["audio"].removeprefix(f"{prefix}/")) for row in rows]
    durations, errors = measure(paths, num_workers)
    usable = [{**row, "duration": d} for row, d in zip(rows, durations, strict=True) if d is not None]
    wordless = [row["id"] for row in usable if not row["text"]]
    problems = []
    expected, expected_hours = KNOWN[folder.name]
    if len(rows) != expected:
        problems.append(f"{len(rows):,} of {expected:,} utterances found")
    if errors:
        problems.append(f"{len(errors):,} unusable files, the first: {errors[0]}")
    if silent:
        problems.append(f"{len(silent):,} transcribed utterances without audio, the first: {silent[0]}")
    if wordless:
        problems.append(f"{len(wordless):,} utterances without transcript, the first: {wordless[0]}")
    hours = sum(row["duration"] for row in usable) / 3600
    if not problems and expected_hours and abs(hours / expected_hours - 1) > HOURS_TOLERANCE:
        problems.append(f"{hours:.1f} hours found where {expected_hours} are expected")
    return usable, problems


def write_subset(path: Path, rows: list[dict]) -> None:
    write_manifest(path, rows)
    print(f"{path}: {len(rows):,} utterances, {sum(row['duration'] for row in rows) / 3600:.2f} hours")


def prepare(args) -> None:
    """The whole job. UserError names every subset that is not whole, after the whole ones were written."""
    root = find_root(args.folder)
    names = args.subsets or [name for name in KNOWN if (root / name).is_dir()]
    if missing := [name for name in names if not (root / name).is_dir()]:
        raise UserError(f"--subsets {' '.join(missing)}: not in {root}; unpack there, or leave them out")
    written, faults = {}, []
    for name in names:
        prefix = os.path.relpath((root / name).resolve(), args.output_dir.resolve())
        rows, problems = scan_subset(root / name, prefix, args.num_workers)
        if rows and (args.allow_incomplete or not problems):
            write_subset(args.output_dir / f"{name}.csv", rows)
            written[name] = rows
        else:
            (args.output_dir / f"{name}.csv").unlink(missing_ok=True)
        faults += [f"{name}: {', '.join(problems)}"] * bool(problems)
    for name, parts in COMBINED.items():
        if set(parts) <= set(written):
            write_subset(args.output_dir / f"{name}.csv", [row for part in parts for row in written[part]])
    if faults and not (args.allow_incomplete and len(written) == len(names)):
        raise UserError(
            f"{'; '.join(faults)}; unpack the archives again, or pass --allow_incomplete to take what is there"
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
