"""Make manifests of VoxCeleb1 for speaker identification, by its official split.

    python data_scripts/prepare_voxceleb.py /data/voxceleb1/wav --split iden_split.txt --output_dir data/voxceleb1

The folder holds SPEAKER/VIDEO/UTTERANCE.wav (both archives, dev and test, unpacked into one). `iden_split.txt` comes
with the corpus: a line is `1 id10003/na8-QEFmj44/00003.wav`, where 1 trains, 2 validates and 3 tests. It becomes
train.csv, dev.csv and test.csv (id, audio, duration, speaker): 138,361, 6,904 and 8,251 utterances of 1,251 speakers.
Verification needs no manifest: `verify_speakers.py --trials veri_test.txt`.
"""

import sys
from pathlib import Path

from corpus_files import Parser
from corpus_parts import Part, write_parts

from w2v2.errors import UserError

COLUMNS = ("id", "audio", "duration", "speaker")
SETS = {"1": ("train", 138_361), "2": ("dev", 6_904), "3": ("test", 8_251)}


def read_split(path: Path) -> list[dict]:
    """A row for every line, with its set under `set`. UserError names a line that is none of the split's."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        part, _, audio = line.strip().partition(" ")
        if part not in SETS or audio.count("/") != 2 or " " in audio:
            found = f"{line[:80]!r} is not of the form `1 SPEAKER/VIDEO/UTTERANCE.wav`"
            raise UserError(f"--split {path}, line {number}: {found}: give VoxCeleb1's own list")
        rows.append({"set": part, "id": audio.removesuffix(".wav"), "audio": audio, "speaker": audio.split("/")[0]})
    return rows


def prepare(args) -> None:
    """The whole job. UserError names every set that is not whole, after the whole ones were written."""
    rows = read_split(args.split)
    parts = []
    for number, (name, known) in SETS.items():
        own = [row for row in rows if row["set"] == number]
        parts.append(Part(args.output_dir / f"{name}.csv", args.folder, own, COLUMNS, known))
    write_parts(parts, args)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of SPEAKER/VIDEO/UTTERANCE.wav", "--output_dir")
    parser.add_argument("--split", type=Path, required=True, help="iden_split.txt")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
