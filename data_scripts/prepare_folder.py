"""Turn any folder of audio files into a manifest (CSV) for pretraining or fine-tuning.

    python data_scripts/prepare_folder.py recordings --output data/train.csv --valid_fraction 0.02

Every audio file below the folder becomes a row `id,audio,duration`: its path without the extension, its path relative
to the manifest, its seconds. `--speaker_from_parent` adds `speaker`, `--text` adds `text`. Files that cannot be used
are listed in OUTPUT.skipped.jsonl and left out. `--valid_fraction` also makes OUTPUT_dev.csv.
"""

import hashlib
import sys
from collections import Counter
from pathlib import Path

from corpus_files import Parser, measure_usable, write_manifest

from w2v2.audio.crops import AudioError
from w2v2.errors import UserError, number
from w2v2.manifests.folders import find_audio, say_passed_over


def read_transcript(path: Path) -> str:
    """Text of a file, white space squeezed; empty where there is no such file, or no UTF-8 text."""
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def build_rows(args) -> tuple[list[dict], list[AudioError]]:
    """A row for each audio file, and a reason for each file without the transcript that it needs."""
    found, passed_over = find_audio(args.folder)
    files = sorted(map(Path, found))
    say_passed_over(args.folder, passed_over)
    if not files:
        raise UserError(f"{args.folder}: no audio file in this folder: check the path")
    stems = [file.with_suffix("").as_posix().strip() for file in files]
    count = Counter(stems)
    rows, wordless, level = [], [], args.speaker_from_parent
    for file, stem in zip(files, stems, strict=True):
        row = {"id": stem if count[stem] == 1 else file.as_posix(), "audio": file.as_posix()}
        if level >= len(file.parts):
            raise UserError(f"--speaker_from_parent {level}: {file} has no such folder above it: give a smaller number")
        if level:
            row["speaker"] = file.parent.parts[-level]
        if args.text:
            row["text"] = read_transcript((args.folder / file).with_suffix(".txt"))
        if args.text and not row["text"]:
            wordless.append(AudioError(str(args.folder / file), f"has no text in UTF-8 in {file.stem}.txt beside it"))
        else:
            rows.append(row)
    return rows, wordless


def split_off(rows: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Train and dev rows: about `fraction` of the seconds for dev, whole speakers where there are any.

    The order in which speakers (or files) go to dev is a hash of their name, so that more data later moves few of
    them. Raises UserError where one part would be empty.
    """
    seconds = Counter()
    for row in rows:
        seconds[row.get("speaker") or row["id"]] += row["duration"]
    if len(seconds) < 2:
        raise UserError(f"--valid_fraction {fraction}: {len(seconds)} speaker or file cannot be split: leave it out")
    target = fraction * sum(seconds.values())
    dev, heard = set(), 0.0
    for name in sorted(seconds, key=lambda name: hashlib.sha256(f"0 {name}".encode()).digest()):
        fits = heard + seconds[name] / 2 <= target  # taking it brings the sum closer to the target
        if fits and len(dev) < len(seconds) - 1:
            dev.add(name)
            heard += seconds[name]
    dev = dev or {min(seconds, key=lambda name: (seconds[name], name))}
    is_dev = [(row.get("speaker") or row["id"]) in dev for row in rows]
    return tuple([row for row, own in zip(rows, is_dev, strict=True) if own == part] for part in (False, True))


def prepare(args) -> None:
    """The whole job. UserError where nothing usable is found or a flag does not fit what is found."""
    rows, wordless = build_rows(args)
    parts = {args.output: measure_usable(rows, args, wordless)}
    if args.valid_fraction:
        paths = args.output, args.output.with_name(f"{args.output.stem}_dev.csv")
        parts = dict(zip(paths, split_off(parts[args.output], args.valid_fraction), strict=True))
    columns = ["id", "audio", "duration", *["text"] * args.text, *["speaker"] * bool(args.speaker_from_parent)]
    for path, part in parts.items():
        write_manifest(path, part, columns)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of audio files, in any depth")
    parser.add_argument("--text", action="store_true", help="take the text from the .txt beside each file")
    help_ = "the folder that a file lies in names its speaker (2: the folder above that one, …)"
    parser.add_argument(
        "--speaker_from_parent", type=number(int, min=0), nargs="?", const=1, default=0, metavar="LEVEL", help=help_
    )
    parser.add_argument(
        "--valid_fraction", type=number(float, min=0, below=1), default=0.0, help="of the seconds, for a dev manifest"
    )
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
