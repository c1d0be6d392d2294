"""Turn any folder of audio files into a manifest (CSV) for pretraining or fine-tuning.

    python data_scripts/prepare_folder.py recordings --output data/train.csv --valid_fraction 0.02

Every audio file below the folder becomes a row `id,audio,duration`: its path without the extension, its path relative
to the manifest, its seconds by its header. `--speaker_from_parent` adds `speaker`, `--text` adds `text`. Files that
cannot be used are listed in OUTPUT.skipped.jsonl and left out. The same files and flags give the same manifests.
"""

import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

from corpus_files import EXTENSIONS, Parser, check_csv, exit_status, find_audio, list_skipped, measure, write_manifest

from w2v2.data.audio import AudioError
from w2v2.errors import UserError


def speaker_of(file: Path, level: int) -> str:
    """Name of the folder `level` steps above a file, which has to lie below the folder that is scanned."""
    folders = file.parent.parts
    if len(folders) < level:
        raise UserError(
            f"--speaker_from_parent {level}: {file} has only {len(folders)} folders above it below the folder given; "
            "give a smaller number, or one folder a speaker"
        )
    return folders[-level]


def read_transcript(audio: Path) -> str:
    """Text of the .txt file beside an audio file, white space squeezed; AudioError where it cannot serve."""
    try:
        text = " ".join(audio.with_suffix(".txt").read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        raise AudioError(str(audio), f"has no {audio.stem}.txt beside it") from None
    except UnicodeDecodeError:
        raise AudioError(str(audio), f"{audio.stem}.txt is not UTF-8") from None
    if not text:
        raise AudioError(str(audio), f"{audio.stem}.txt is empty")
    return text


def build_rows(folder: Path, manifest_dir: Path, files: list[Path], args) -> tuple[list[dict], list[AudioError]]:
    """Rows of the usable files, in order, and the reasons why the others are none."""
    stems = Counter(_stem(file) for file in files)
    rows = []
    speakers = [speaker_of(file, args.speaker_from_parent) if args.speaker_from_parent else "" for file in files]
    prefix = os.path.relpath(os.path.realpath(folder), os.path.realpath(manifest_dir))
    durations, skipped = measure([str(folder / file) for file in files], args.num_workers)
    for file, speaker, duration in zip(files, speakers, durations, strict=True):
        if duration is None:
            continue
        try:
            text = read_transcript(folder / file) if args.text else ""
        except AudioError as error:
            skipped.append(error)
            continue
        name = _stem(file) if stems[_stem(file)] == 1 else file.as_posix()
        audio = Path(prefix, file).as_posix()
        audio = f"./{audio}" if audio[0].isspace() else audio  # readers of CSV drop a space after a comma
        rows.append({"id": name, "audio": audio, "duration": duration, "text": text, "speaker": speaker})
    return rows, skipped


def _stem(file: Path) -> str:
    return file.with_suffix("").as_posix().strip()


def split_off(rows: list[dict], fraction: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Train and dev rows: about `fraction` of the seconds for dev, whole speakers where there are any.

    The order in which speakers (or files) go to dev is a hash of their name and the seed, so that more data later
    moves few of them. Raises UserError where one part would be empty.
    """
    seconds: Counter = Counter()
    for row in rows:
        seconds[row["speaker"] or row["id"]] += row["duration"]
    if len(seconds) < 2:
        raise UserError(
            f"--valid_fraction {fraction}: {len(seconds)} speaker or file cannot be split; leave the flag out"
        )
    target = fraction * sum(seconds.values())
    dev, heard = set(), 0.0
    for name in sorted(seconds, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
        fits = heard + seconds[name] / 2 <= target  # taking it brings the sum closer to the target
        if fits and len(dev) < len(seconds) - 1:
            dev.add(name)
            heard += seconds[name]
    if not dev:
        dev.add(min(seconds, key=lambda name: (seconds[name], name)))
    parts: tuple[list[dict], list[dict]] = ([], [])
    for row in rows:
        parts[(row["speaker"] or row["id"]) in dev].append(row)
    return parts


def check_flags(args) -> None:
    """UserError for values that cannot serve."""
    check_csv(args.output)
    if args.speaker_from_parent < 0:
        raise UserError(f"--speaker_from_parent {args.speaker_from_parent}: give 1 for a file's own folder, 2 …")
    if not 0 <= args.valid_fraction < 1:
        raise UserError(f"--valid_fraction {args.valid_fraction}: give a number from 0 to below 1")
    valid = args.valid_output
    if valid and (valid.parent.resolve() != args.output.parent.resolve() or valid.name == args.output.name):
        raise UserError(
            f"--valid_output {valid}: give another name than --output's, in the same folder {args.output.parent}"
        )


def prepare(args) -> None:
    """The whole job. UserError where nothing usable is found or a flag does not fit what is found."""
    check_flags(args)
    files = find_audio(args.folder, args.extensions)
    rows, skipped = build_rows(args.folder, args.output.parent, files, args)
    if not rows:
        raise UserError(f"{args.folder}: none of {len(files)} files can be used; the first: {skipped[0]}")
    parts = {args.output: rows}
    if args.valid_fraction:
        valid_output = args.valid_output or args.output.with_name(f"{args.output.stem}_dev.csv")
        parts = dict(zip((args.output, valid_output), split_off(rows, args.valid_fraction, args.seed), strict=True))
    columns = ["id", "audio", "duration", *["text"] * args.text, *["speaker"] * bool(args.speaker_from_parent)]
    for path, part in parts.items():
        write_manifest(path, ({column: row[column] for column in columns} for row in part), columns)
        hours = sum(row["duration"] for row in part) / 3600
        speakers = f", {len({row['speaker'] for row in part})} speakers" if args.speaker_from_parent else ""
        print(f"{path}: {len(part)} utterances, {hours:.2f} hours{speakers}")
    list_skipped(args.output.with_suffix(".skipped.jsonl"), [{"audio": e.path, "reason": e.reason} for e in skipped])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of audio files, in any depth")
    parser.add_argument("--output", type=Path, required=True, help="the manifest to write, a .csv")
    parser.add_argument(
        "--text", action="store_true", help="take the text from the .txt beside each file, or leave it out"
    )
    parser.add_argument(
        "--speaker_from_parent", type=int, nargs="?", const=1, default=0, metavar="LEVEL",
        help="the folder that a file lies in names its speaker (2: the folder above that one, …)",
    )  # fmt: skip
    parser.add_argument(
        "--valid_fraction", type=float, default=0.0, help="of the seconds, for a dev manifest; whole speakers"
    )
    parser.add_argument("--valid_output", type=Path, help="the dev manifest (default: OUTPUT's name with _dev)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another dev part (default: %(default)s)")
    parser.add_argument(
        "--extensions", nargs="+", default=list(EXTENSIONS), help="of audio files (default: %(default)s)", metavar="EXT"
    )
    parser.add_argument("--num_workers", type=int, default=16, help="threads that read headers (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
