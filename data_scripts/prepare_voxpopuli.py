"""Make manifests of VoxPopuli: unlabelled speech of up to 23 languages, and transcribed speech of 16.

    python data_scripts/prepare_voxpopuli.py /data/voxpopuli --output_dir data/voxpopuli
    python pretrain.py --train_data data/voxpopuli/sources.yaml --sampling_alpha_language 0.5 …

The folder is the --root of https://github.com/facebookresearch/voxpopuli, with what its scripts make, some or all of

    unlabelled_data/unlabelled_v2.tsv.gz              event_id, segment_no, start, end, of all languages
    unlabelled_data/LANGUAGE/YEAR/EVENT_NUMBER.ogg    segments (get_unlabelled_data.py), or else
    raw_audios/LANGUAGE/YEAR/EVENT.ogg                whole recordings (download_audios.py)
    transcribed_data/LANGUAGE/asr_{train,dev,test}.tsv, YEAR/ID.ogg    (get_asr_data.py)

Each language becomes LANGUAGE/unlabelled.csv (id, audio, duration, language; in whole recordings also start) and
LANGUAGE/train.csv, dev.csv, test.csv with text (normalised; --raw_text: as it was printed) and speaker. sources.yaml
lists the unlabelled speech of all languages, to be mixed. No transcript is there of it, but the sessions in which dev
and test of the same language lie are left out, so that pretraining does not hear them; what that takes is counted.

Lengths come from the list of segments, which a sample of the files is held against. Transcribed speech is measured; an
interrupted run goes on. Rows of whole recordings are slow to train on, for Ogg is decoded from its beginning: pack them.
"""

import gzip
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from corpus_files import Parser
from corpus_parts import Part, find_root, write_parts, write_sources

from w2v2.audio.inspection import NUM_INSPECTED
from w2v2.errors import UserError
from w2v2.manifests.readers import read_table

SPLITS = ("train", "dev", "test")
CUT, WHOLE, TRANSCRIBED = "unlabelled_data", "raw_audios", "transcribed_data"
SEGMENTS = "unlabelled_v2.tsv"
HEADER = ["event_id", "segment_no", "start", "end"]
COLUMNS = ("id", "audio", "duration", "text", "speaker", "language")
NUM_DECODED = 8  # whole recordings, hours long, that the list of segments is held against


def is_heard(event: str, subset: str) -> bool:
    """Whether an event is in a subset of the release, by its id such as 20190101-0900-PLENARY-3_en."""
    is_plenary = "PLENARY" in event
    return {"400k": True, "100k": is_plenary, "10k": is_plenary and "20190101" <= event[:8] < "20200801"}[subset]


def read_segments(root: Path, language: str, subset: str) -> Iterator[tuple[str, str, float, float]]:
    """Event, number, start and end in seconds of the segments of a language. UserError where the list is missing."""
    path = next((p for name in (SEGMENTS, f"{SEGMENTS}.gz") if (p := root / CUT / name).exists()), None)
    if path is None:
        address = f"https://dl.fbaipublicfiles.com/voxpopuli/annotations/{SEGMENTS}.gz"
        raise UserError(f"{root / CUT / SEGMENTS}.gz is missing: fetch {address}, as get_unlabelled_data.py does")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            header = next(file, "").rstrip("\r\n").split("\t")
            columns = [header.index(name) for name in HEADER]
            for line in file:
                cells = line.rstrip("\r\n").split("\t")
                event, segment, start, end = (cells[column] for column in columns)
                if event.endswith(f"_{language}") and is_heard(event, subset):
                    yield event, segment, float(start), float(end)
    except (ValueError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is damaged, or has no {', '.join(HEADER)} ({error}): fetch it again") from None


def read_split(root: Path, language: str, split: str, text: str) -> list[dict]:
    """Rows of one transcribed split. UserError where a column is missing."""
    path, rows = root / TRANSCRIBED / language / f"asr_{split}.tsv", []
    for row in read_table(path, {"id", "speaker_id", text}.__contains__).table.to_pylist():
        try:
            name, speaker, said = row["id"], row["speaker_id"], row[text]
        except KeyError as error:
            raise UserError(f"{path}: has no column {error}: run get_asr_data.py again") from None
        audio = f"{TRANSCRIBED}/{language}/{name[:4]}/{name}.ogg"
        rows.append({"id": name, "audio": audio, "text": said.strip(), "speaker": speaker, "language": language})
    return rows


def build_unlabelled(root: Path, language: str, held_out: list[str], args) -> Part:
    """The unlabelled part of a language, without the sessions of the utterances `held_out`."""
    sessions = {name[:at] for name in held_out for at, sign in enumerate(name) if sign == "-"}  # and shorter beginnings
    is_cut = (root / CUT / language).is_dir()
    rows, taken = [], [0, 0.0]
    for event, number, start, end in read_segments(root, language, args.subset):
        if event.removesuffix(f"_{language}") in sessions:
            taken = [taken[0] + 1, taken[1] + end - start]
            continue
        row = {"id": f"{event}_{number}", "audio": f"{WHOLE}/{language}/{event[:4]}/{event}.ogg", "start": start}
        if is_cut:
            row = {"id": row["id"], "audio": f"{CUT}/{language}/{event[:4]}/{event}_{number}.ogg"}
        rows.append(row | {"duration": round(end - start, 3), "language": language})
    hours = f"{taken[0]:,} segments ({taken[1] / 3600:.1f} hours) of sessions that dev and test are from"
    print(f"{language}/unlabelled: left out: {hours if taken[0] else 'nothing'}")
    columns = ["id", "audio", *["start"] * (not is_cut), "duration", "language"]
    sample = NUM_INSPECTED if is_cut else NUM_DECODED
    return Part(args.output_dir / language / "unlabelled.csv", root, rows, columns, sample=sample)


def find_languages(root: Path, args) -> list[str]:
    """The languages that are asked for, or those there are folders of."""
    folders = [path for name in (CUT, WHOLE, TRANSCRIBED) for path in (root / name).glob("*") if path.is_dir()]
    there = sorted({path.name for path in folders} - {"original"})
    if missing := [name for name in args.languages or () if name not in there]:
        raise UserError(f"--languages {missing[0]}: not in {args.folder}, which has {', '.join(there) or 'none'}")
    return args.languages or there


def find_parts(root: Path, args) -> Iterator[Part]:
    """A part for each transcribed split of each language that is there, and one for its unlabelled speech."""
    for language in find_languages(root, args):
        folder, held_out, missing = root / TRANSCRIBED / language, [], []
        for split in SPLITS if folder.is_dir() else ():
            part = Part(args.output_dir / language / f"{split}.csv", root, [], COLUMNS)
            if (folder / f"asr_{split}.tsv").exists():
                part.rows = read_split(root, language, split, "raw_text" if args.raw_text else "normalized_text")
                part.check_text()
                held_out += [row["id"] for row in part.rows if split != "train"]
            else:
                part.faults = [f"asr_{split}.tsv is missing"]
                missing += [f"asr_{split}.tsv"] * (split != "train")
            yield part
        if (root / CUT / language).is_dir() or (root / WHOLE / language).is_dir():
            if not folder.is_dir():
                print(f"{language}: no {folder}, so the sessions of dev and test are not left out", file=sys.stderr)
            part = build_unlabelled(root, language, held_out, args)
            part.add_fault(missing, "missing lists, so their sessions cannot be kept out of pretraining")
            yield part


def prepare(args) -> None:
    """The whole job. UserError names every part that is not whole, after the whole ones were written."""
    root = find_root(args.folder, [CUT, WHOLE, TRANSCRIBED], "voxpopuli")
    written = write_parts(find_parts(root, args), args)
    unlabelled = [path for path in written if path.stem == "unlabelled"]
    write_sources(args.output_dir / "sources.yaml", unlabelled)
    languages = [path.parent.name for path in unlabelled]
    if whole := [name for name in languages if not (root / CUT / name).is_dir()]:
        print(f"{', '.join(whole)}: whole recordings in Ogg: pack them once with data_scripts/pack_audio.py")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("--root of VoxPopuli's own scripts", "--output_dir")
    parser.add_argument("--languages", nargs="+", metavar="LANGUAGE", help="(default: all there)")
    help_ = "of the unlabelled speech: 100k: plenary sessions; 10k: those from January 2019 to July 2020"
    parser.add_argument("--subset", choices=("400k", "100k", "10k"), default="400k", help=help_)
    parser.add_argument("--raw_text", action="store_true", help="transcripts with capitals and punctuation")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
