"""Make manifests of Common Voice: of every language of a release, by its own splits, with the clips where they are.

    python data_scripts/prepare_common_voice.py /data/cv-corpus-17.0-2024-03-15 --output_dir data/common_voice
    python pretrain.py --train_data data/common_voice/sources.yaml --sampling_alpha_language 0.5 …

The folder is the release's, which the archive of each language unpacks into: LANGUAGE/clips/*.mp3, train.tsv, dev.tsv,
test.tsv, validated.tsv, other.tsv, invalidated.tsv, clip_durations.tsv. A language's own folder serves as well. Each
language becomes

    LANGUAGE/train.csv, dev.csv, test.csv   id, audio, duration, text, speaker (client_id), language
    LANGUAGE/pretrain.csv                   the same without text, for pretraining
    sources.yaml                            the pretrain.csv of all languages, to be mixed

Pretraining hears the clips of --pretrain_from, but no clip of dev.tsv or test.tsv, nor another of their speakers, who
often have more in validated.tsv and other.tsv (--keep_speakers takes these). What that leaves out is counted.

Durations come from clip_durations.tsv (releases from 16.1 on), which a sample of the clips is held against; older
releases, and --measure_all, have every clip decoded. An interrupted run goes on.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from corpus_files import Parser
from corpus_parts import Part, write_parts, write_sources

from w2v2.audio.inspection import NUM_INSPECTED
from w2v2.errors import UserError
from w2v2.manifests.readers import read_table

SPLITS = ("train", "dev", "test")
LISTS = ("validated", "other", "invalidated", "train")
COLUMNS = ("id", "audio", "duration", "text", "speaker", "language")
PRETRAIN = tuple(name for name in COLUMNS if name != "text")
DURATIONS = "clip_durations.tsv"
NAMES = {"client_id", "path", "sentence", "clip", "filename", "duration[ms]"}  # of the columns that are read


def find_languages(args) -> list[Path]:
    """The folders of the languages that are asked for, or there. UserError where one is no language of a release."""
    folder = args.folder.resolve()
    lists = sorted([*folder.glob("*/validated.tsv"), *folder.glob("validated.tsv")])
    there = {path.parent.name: path.parent for path in lists}
    if not there:
        remedy = "give the folder of a release, cv-corpus-VERSION-DATE, that the archives unpack to"
        raise UserError(f"{args.folder}: holds no LANGUAGE/validated.tsv: {remedy}")
    if missing := [name for name in args.languages or () if name not in there]:
        raise UserError(f"--languages {missing[0]}: not in {args.folder}, which has {', '.join(there)}")
    return [there[name] for name in args.languages or there]


def read_list(path: Path) -> list[dict]:
    """Rows of one of the release's lists; none where it is only a header, as in languages that have few clips."""
    with open(path, encoding="utf-8") as file:
        if len(list(islice(file, 2))) < 2:
            return []
    return read_table(path, NAMES.__contains__).table.to_pylist()


def read_durations(path: Path) -> dict[str, float]:
    """Clip → seconds. UserError where the file is not as releases have it."""
    rows = read_list(path)
    name = next((name for name in ("clip", "filename") if rows and name in rows[0]), None)
    try:
        return {row[name]: int(row["duration[ms]"]) / 1_000 for row in rows}
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path}: has no columns clip and duration[ms] of whole numbers: unpack it again") from None


class Language:
    """The lists of one language, each clip with its duration where that is known."""

    def __init__(self, folder: Path, measure_all: bool):
        self.folder, self.name = folder, folder.name
        self.missing: set[str] = set()  # lists that are asked for and not there
        has_durations = (folder / DURATIONS).exists() and not measure_all
        self.durations = read_durations(folder / DURATIONS) if has_durations else {}
        if not has_durations:
            print(
                f"{self.name}: no {DURATIONS} can be used, so every clip is decoded once to measure it", file=sys.stderr
            )
        self.sample = NUM_INSPECTED if has_durations else None

    def read(self, name: str) -> list[dict]:
        """Rows of a list. Clips that last no time by the release's own durations are left out."""
        try:
            raw = read_list(self.folder / f"{name}.tsv")
        except FileNotFoundError:
            self.missing.add(name)
            return []
        rows = []
        for row in raw:
            try:
                clip, speaker, text = row["path"].strip(), sys.intern(row["client_id"]), row["sentence"].strip()
            except KeyError as error:
                raise UserError(f"{self.folder / name}.tsv: has no column {error}: unpack it again") from None
            clip = clip if clip.endswith(".mp3") else f"{clip}.mp3"
            known = {"duration": self.durations[clip]} if clip in self.durations else {}
            rows.append({"id": clip[:-4], "audio": f"clips/{clip}", "text": text, "speaker": speaker} | known)
            rows[-1]["language"] = self.name
        kept = [row for row in rows if row.get("duration") != 0]
        if empty := len(rows) - len(kept):
            print(f"{self.name}/{name}.tsv: {empty:,} clips last 0 ms by {DURATIONS} and are left out", file=sys.stderr)
        return kept


def choose_clips(language: Language, held_out: list[dict], args) -> list[dict]:
    """Each clip of --pretrain_from once, but those of dev and test and of their speakers; what that leaves out is told."""
    clips, speakers = {row["id"] for row in held_out}, {row["speaker"] for row in held_out}
    chosen, left_out = {}, Counter()
    for row in (row for name in args.pretrain_from for row in language.read(name)):
        if row["id"] in clips:
            left_out["clips of dev and test"] += 1
        elif row["speaker"] in speakers and not args.keep_speakers:
            left_out[f"more of their {len(speakers):,} speakers"] += 1
        elif row["id"] in chosen:
            left_out["listed before"] += 1
        else:
            chosen[row["id"]] = row
    told = ", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "nothing"
    heard = {row["speaker"] for row in chosen.values()}
    shared = f", {len(heard & speakers):,} of them in dev or test" if args.keep_speakers else ""
    what = f"{len(chosen):,} clips of {len(heard):,} speakers{shared}"
    print(f"{language.name}: {', '.join(args.pretrain_from)}: {what}; left out: {told}")
    return list(chosen.values())


def find_parts(args) -> Iterator[Part]:
    """A part for each split of each language that has clips, and one for pretraining."""
    for language in (Language(folder, args.measure_all) for folder in find_languages(args)):
        splits = {name: language.read(name) for name in SPLITS}
        num_splits = Counter(row["id"] for rows in splits.values() for row in rows)
        splits["pretrain"] = choose_clips(language, splits["dev"] + splits["test"], args)
        for name, rows in splits.items():
            path = args.output_dir / language.name / f"{name}.csv"
            part = Part(path, language.folder, rows, COLUMNS, sample=language.sample)
            if name == "pretrain":
                part.columns = PRETRAIN
                part.faults += [f"{name}.tsv is missing" for name in args.pretrain_from if name in language.missing]
                unknown = [f"{name}.tsv" for name in ("dev", "test") if name in language.missing]
                part.add_fault(unknown, "missing lists, so their clips and speakers cannot be kept out of pretraining")
            else:
                part.faults += [f"{name}.tsv is missing"] * (name in language.missing)
                part.check_text()
                part.add_fault([r["id"] for r in rows if num_splits[r["id"]] > 1], "clips that another split has too")
            if rows or part.faults:
                yield part
            else:
                path.unlink(missing_ok=True)
                print(f"{language.name}: the release has no clips for {name}")


def prepare(args) -> None:
    """The whole job. UserError names every part that is not whole, after the whole ones were written."""
    written = write_parts(find_parts(args), args)
    write_sources(args.output_dir / "sources.yaml", [path for path in written if path.stem == "pretrain"])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of a release, or of one of its languages", "--output_dir")
    parser.add_argument("--languages", nargs="+", metavar="LANGUAGE", help="(default: all there)")
    help_ = "lists whose clips are for pretraining"
    parser.add_argument("--pretrain_from", nargs="+", choices=LISTS, default=["validated", "other"], help=help_)
    help_ = "let pretraining hear other clips of speakers in dev and test"
    parser.add_argument("--keep_speakers", action="store_true", help=help_)
    parser.add_argument("--measure_all", action="store_true", help=f"decode every clip rather than trust {DURATIONS}")
    parser.add_allow_incomplete()
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
