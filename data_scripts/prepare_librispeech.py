"""Make manifests of LibriSpeech, after checking that every subset is whole.

    python data_scripts/prepare_librispeech.py /data/LibriSpeech --output_dir data/librispeech

The folder is the one that the archives of https://www.openslr.org/12 unpack to: SUBSET/SPEAKER/CHAPTER/*.flac with one
*.trans.txt a chapter. Each subset that is there becomes OUTPUT_DIR/SUBSET.csv (id, audio, duration, text, speaker), and
the three training subsets together train-960.csv. Utterances and hours are held against the published figures.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from corpus_files import Parser
from corpus_parts import Part, find_root, write_parts

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
COMBINED = {"train-960": ("train-clean-100", "train-clean-360", "train-other-500")}


def read_transcripts(path: Path) -> dict[str, str]:
    """Utterance id → text from one chapter's `ID WORDS…` lines; {} where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; unpack the archive again") from None
    return {name: text.strip() for name, _, text in (line.partition(" ") for line in lines if line.strip())}


def scan_chapters(part: Part, *folders: Path) -> Part:
    """Fill a part with the files of SPEAKER/CHAPTER folders below these, and what is wrong with their transcripts."""
    silent = []
    for chapter in sorted(path for folder in folders for path in folder.glob("*/*") if path.is_dir()):
        speaker = chapter.parent.name
        texts = read_transcripts(chapter / f"{speaker}-{chapter.name}.trans.txt")
        names = sorted(path.stem for path in chapter.glob("*.flac"))
        silent += sorted(texts.keys() - set(names))
        for name in names:
            audio = (chapter / f"{name}.flac").relative_to(part.root).as_posix()
            part.rows.append({"id": name, "audio": audio, "text": texts.get(name, ""), "speaker": speaker})
    part.add_fault(silent, "transcribed utterances without audio")
    part.check_text()
    return part


def find_parts(args) -> Iterator[Part]:
    """A part for each subset that is asked for, or there."""
    root = find_root(args.folder, KNOWN, "LibriSpeech")
    for name in args.subsets or [name for name in KNOWN if (root / name).is_dir()]:
        utterances, hours = KNOWN[name]
        part = Part(args.output_dir / f"{name}.csv", root, [], utterances=utterances, hours=hours)
        yield scan_chapters(part, root / name)


def prepare(args) -> None:
    """The whole job. UserError names every subset that is not whole, after the whole ones were written."""
    write_parts(find_parts(args), args, COMBINED)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of the unpacked subsets, or the one that holds LibriSpeech/", "--output_dir")
    parser.add_argument("--subsets", nargs="+", choices=list(KNOWN), metavar="SUBSET", help="(default: all there)")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
