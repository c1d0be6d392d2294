"""Turn a folder of audio files whose names say what they are into a manifest (CSV) with labels.

    python data_scripts/prepare_labelled.py /data/emodb/wav --output data/emodb.csv --corpus emodb
    python data_scripts/prepare_labelled.py /data/commands --output data/commands.csv --pattern '(?P<label>[^/]+)/'

`--pattern` is a regular expression, searched in each file's path below the folder, without the extension. Its named
groups become columns: label, speaker, session, or any other. `--label_map W=anger` spells a label out. `--corpus` knows
the patterns of emodb (03a01Wa: speaker, sentence, emotion in German, version) and ravdess (03-01-06-01-02-01-12: the
third is the emotion, the last the speaker). A file that does not match is an error, unless `--skip_unmatched`. Files
that cannot be read are listed in OUTPUT.skipped.jsonl.
"""

import re
import sys
from pathlib import Path

from corpus_files import Parser, measure_usable, write_manifest

from w2v2.errors import UserError
from w2v2.finetune.labels import parse_label_map
from w2v2.manifests.folders import find_audio, say_passed_over

CORPORA = {
    "emodb": (
        r"(^|/)(?P<speaker>\d\d)(?P<sentence_code>[ab]\d\d)(?P<label>[WLEAFTN])[a-z]?$",
        ["W=anger", "L=boredom", "E=disgust", "A=fear", "F=happiness", "T=sadness", "N=neutral"],
    ),
    "ravdess": (
        r"(^|/)0[13]-01-(?P<label>\d\d)-(?P<intensity>\d\d)-(?P<sentence_code>\d\d)-\d\d-(?P<speaker>\d\d)$",
        ["01=neutral", "02=calm", "03=happy", "04=sad", "05=angry", "06=fearful", "07=disgust", "08=surprised"],
    ),
}
RESERVED = {"id", "audio", "duration", "start"}


def compile_pattern(args) -> tuple[re.Pattern, dict[str, str]]:
    """The pattern and the labels' new names, from --corpus or --pattern and --label_map."""
    text, names = CORPORA[args.corpus] if args.corpus else (args.pattern, [])
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--pattern {text}: is not a regular expression ({error}): mend it") from None
    if not {"label", "speaker"} & pattern.groupindex.keys():
        raise UserError(f"--pattern {text}: names neither a label nor a speaker: write (?P<label>…) around one")
    if taken := RESERVED & pattern.groupindex.keys():
        raise UserError(f"--pattern {text}: the column {min(taken)} exists already: rename that group")
    if args.label_map and "label" not in pattern.groupindex:
        raise UserError(f"--label_map: --pattern {text} names no label: write (?P<label>…) around it")
    return pattern, parse_label_map([*names, *args.label_map])


def prepare(args) -> None:
    """The whole job. UserError where nothing usable is found, or a name does not match."""
    pattern, names = compile_pattern(args)
    rows, unmatched, written = [], [], set()
    found, passed_over = find_audio(args.folder)
    say_passed_over(args.folder, passed_over)
    for file in sorted(map(Path, found)):
        if match := pattern.search(file.with_suffix("").as_posix()):
            groups = {name: value or "" for name, value in match.groupdict().items()}
            if "label" in groups:
                written.add(groups["label"])
                groups["label"] = names.get(groups["label"], groups["label"])
            rows.append({"id": file.as_posix(), "audio": file.as_posix()} | groups)
        else:
            unmatched.append(file)
    if not rows or (unmatched and not args.skip_unmatched):
        found = f"{len(unmatched)} of {len(rows) + len(unmatched)} names do not match the pattern"
        example = f", such as {unmatched[0]}" if unmatched else ""
        raise UserError(f"{args.folder}: {found}{example}: mend --pattern, or give --skip_unmatched")
    write_manifest(args.output, measure_usable(rows, args), ["id", "audio", "duration", *pattern.groupindex])
    if unused := parse_label_map(args.label_map).keys() - written:
        print(f"warning: --label_map: no file has the label {', '.join(sorted(unused))}", file=sys.stderr)
    if unmatched:
        print(f"{len(unmatched)} files whose names do not match are left out, such as {unmatched[0]}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_corpus("folder of audio files, in any depth")
    names = parser.add_mutually_exclusive_group(required=True)
    names.add_argument("--corpus", choices=list(CORPORA), help="a corpus whose names are known")
    names.add_argument("--pattern", help="regular expression with named groups, searched in the path")
    parser.add_argument("--label_map", nargs="+", default=[], metavar="OLD=NEW", help="labels to rename")
    parser.add_argument("--skip_unmatched", action="store_true", help="leave out files whose name does not match")
    return parser.run(prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
