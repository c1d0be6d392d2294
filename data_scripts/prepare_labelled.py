"""Turn a folder of audio files whose names say what they are into a manifest (CSV) with labels.

    python data_scripts/prepare_labelled.py /data/emodb/wav --output data/emodb.csv --corpus emodb
    python data_scripts/prepare_labelled.py /data/commands --output data/commands.csv --pattern '(?P<label>[^/]+)/'

`--pattern` is a regular expression, searched in each file's path below the folder, without the extension. Its named
groups become columns: label, speaker, session, or any other. `--label_map W=anger` spells a label out. `--corpus` knows
the patterns of emodb (03a01Wa: speaker, sentence, emotion in German, version) and ravdess (03-01-06-01-02-01-12: the
third is the emotion, the last the speaker). A file that does not match is an error, unless `--skip_unmatched`. Files
that cannot be read are listed in OUTPUT.skipped.jsonl.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path

from corpus_files import Parser, check_csv, exit_status, find_audio, list_skipped, measure, write_manifest

from w2v2.errors import UserError
from w2v2.finetune.labels import parse_label_map

CORPORA = {
    "emodb": (
        r"(^|/)(?P<speaker>\d\d)(?P<sentence>[ab]\d\d)(?P<label>[WLEAFTN])[a-z]?$",
        ["W=anger", "L=boredom", "E=disgust", "A=fear", "F=happiness", "T=sadness", "N=neutral"],
    ),
    "ravdess": (
        r"(^|/)0[13]-01-(?P<label>\d\d)-(?P<intensity>\d\d)-(?P<sentence>\d\d)-\d\d-(?P<speaker>\d\d)$",
        ["01=neutral", "02=calm", "03=happy", "04=sad", "05=angry", "06=fearful", "07=disgust", "08=surprised"],
    ),
}
RESERVED = ("id", "audio", "duration", "start")


def compile_pattern(args) -> tuple[re.Pattern, dict[str, str]]:
    """The pattern and the labels' new names, from --corpus or --pattern and --label_map."""
    if bool(args.corpus) == bool(args.pattern):
        raise UserError("give one of --corpus and --pattern")
    text, names = CORPORA[args.corpus] if args.corpus else (args.pattern, [])
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--pattern {text}: is no regular expression ({error}): mend it") from None
    if "label" not in pattern.groupindex and "speaker" not in pattern.groupindex:
        raise UserError(
            f"--pattern {text}: names neither a label nor a speaker: write (?P<label>…) around what says it"
        )
    if taken := set(RESERVED) & set(pattern.groupindex):
        raise UserError(f"--pattern {text}: the name {sorted(taken)[0]} is taken: call the group otherwise")
    return pattern, parse_label_map([*names, *args.label_map])


def prepare(args) -> None:
    """The whole job; UserError where nothing usable is found, or a name does not match."""
    check_csv(args.output)
    pattern, names = compile_pattern(args)
    files = find_audio(args.folder)
    found = {file: pattern.search(file.with_suffix("").as_posix()) for file in files}
    unmatched = [file for file, match in found.items() if match is None]
    if unmatched and (len(unmatched) == len(files) or not args.skip_unmatched):
        raise UserError(
            f"{args.folder}: {len(unmatched)} of {len(files)} names do not match the pattern, such as {unmatched[0]}: mend "
            "--pattern, or give --skip_unmatched"
        )
    files = [file for file in files if found[file] is not None]
    durations, skipped = measure([str(args.folder / file) for file in files], args.num_workers)
    prefix = os.path.relpath(os.path.realpath(args.folder), os.path.realpath(args.output.parent))
    rows = []
    for file, duration in zip(files, durations, strict=True):
        if duration is not None:
            row = {"id": file.as_posix(), "audio": Path(prefix, file).as_posix(), "duration": duration}
            rows.append(row | {name: value or "" for name, value in found[file].groupdict().items()})
            if "label" in rows[-1]:
                rows[-1]["label"] = names.get(rows[-1]["label"], rows[-1]["label"])
    if not rows:
        raise UserError(f"{args.folder}: none of {len(files)} files can be used; the first: {skipped[0]}")
    write_manifest(args.output, rows, ["id", "audio", "duration", *pattern.groupindex])
    hours = sum(row["duration"] for row in rows) / 3600
    labels = Counter(row["label"] for row in rows if row.get("label")).most_common(10)
    print(f"{args.output}: {len(rows)} utterances, {hours:.2f} hours", ", ".join(f"{label} {n}" for label, n in labels))
    if unmatched:
        print(f"{len(unmatched)} files whose names do not match are left out, such as {unmatched[0]}", file=sys.stderr)
    list_skipped(args.output.with_suffix(".skipped.jsonl"), [{"audio": e.path, "reason": e.reason} for e in skipped])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of audio files, in any depth")
    parser.add_argument("--output", type=Path, required=True, help="the manifest to write, a .csv")
    parser.add_argument("--corpus", choices=list(CORPORA), help="a corpus whose names are known")
    parser.add_argument("--pattern", help="regular expression with named groups, searched in the path")
    parser.add_argument("--label_map", nargs="+", default=[], metavar="OLD=NEW", help="labels to rename")
    parser.add_argument("--skip_unmatched", action="store_true", help="leave out files whose name does not match")
    parser.add_argument("--num_workers", type=int, default=16, help="threads that read headers (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
