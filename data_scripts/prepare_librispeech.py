"""Make manifests of LibriSpeech, after checking that every subset is whole.

    python data_scripts/prepare_librispeech.py /data/LibriSpeech --output_dir data/librispeech

The folder is the one that the archives of https://www.openslr.org/12 unpack to: SUBSET/SPEAKER/CHAPTER/*.flac with one
*.trans.txt a chapter. Each subset that is there becomes OUTPUT_DIR/SUBSET.csv (id, audio, duration, text, speaker), and
the three training subsets together train-960.csv. Utterances and hours are held against the published figures.
"""

import sys
from pathlib import Path

from corpus_files import Parser, measure, write_manifest

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
    raise UserError(f"{folder}: holds no subset of LibriSpeech: give the folder that the archives unpack to")


def read_transcripts(path: Path) -> dict[str, str]:
    """Utterance id → text from one chapter's `ID WORDS…` lines; {} where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; unpack the archive again") from None
    return {name: text.strip() for name, _, text in (line.partition(" ") for line in lines if line.strip())}


def scan_subset(folder: Path) -> tuple[list[dict], list[str]]:
    """A row for each file of one subset, and the ids of transcribed utterances without a file."""
    rows, silent = [], []
    for chapter in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        speaker = chapter.parent.name
        texts = read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt")
        names = sorted(path.stem for path in chapter.glob("*.flac"))
        silent += sorted(texts.keys() - set(names))
        for name in names:
            audio = f"{speaker}/{chapter.name}/{name}.flac"
            rows.append({"id": name, "audio": audio, "text": texts.get(name, ""), "speaker": speaker})
    return rows, silent


def find_faults(name: str, rows: list[dict], silent: list[str], errors: list) -> str:
    """What makes a subset incomplete, in words; empty where it is whole. `rows` are the usable ones."""
    expected, expected_hours = KNOWN[name]
    wordless, faults = [row["id"] for row in rows if not row["text"]], []
    if (found := len(rows) + len(errors)) != expected:
        faults.append(f"{found:,} of {expected:,} utterances found")
    causes = {"unusable files": errors, "transcribed utterances without audio": silent}
    causes["utterances without transcript"] = wordless
    faults += [f"{len(cases):,} {what}, the first: {cases[0]}" for what, cases in causes.items() if cases]
    hours = sum(row["duration"] for row in rows) / 3600
    if not faults and expected_hours and abs(hours / expected_hours - 1) > HOURS_TOLERANCE:
        faults.append(f"{hours:.1f} hours found where {expected_hours} are expected")
    return ", ".join(faults)


def prepare(args) -> None:
    """The whole job. UserError names every subset that is not whole, after the whole ones were written."""
    root = find_root(args.folder)
    written, faults = {}, []
    for name in args.subsets or [name for name in KNOWN if (root / name).is_dir()]:
        path = args.output_dir / f"{name}.csv"
        rows, silent = scan_subset(root / name)
        rows, errors = measure(rows, root / name, path, args.num_workers)
        if fault := find_faults(name, rows, silent, errors):
            faults.append(f"{name}: {fault}")
        if rows and (args.allow_incomplete or not fault):
            write_manifest(path, rows)
            written[name] = rows
        else:
            path.unlink(missing_ok=True)
    for name, parts in COMBINED.items():
        if set(parts) <= set(written):
            write_manifest(args.output_dir / f"{name}.csv", [row for part in parts for row in written[part]])
    if faults and not args.allow_incomplete:
        raise UserError(f"{'; '.join(faults)}: unpack again, or pass --allow_incomplete to take what is there")
    for fault in faults:
        print(f"warning: {fault}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of the unpacked subsets, or the one that holds LibriSpeech/", "--output_dir")
    parser.add_argument("--subsets", nargs="+", choices=list(KNOWN), metavar="SUBSET", help="(default: all there)")
    parser.add_argument("--allow_incomplete", action="store_true", help="warn of subsets that are not whole, and go on")
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
