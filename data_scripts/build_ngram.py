"""Make an n-gram language model (ARPA) from transcripts or plain text, for `finetune_ctc.py --lm`.

    python data_scripts/build_ngram.py data/librispeech/train-clean-100.csv --output data/lm.arpa
    python data_scripts/build_ngram.py books.txt --order 4 --text_case lower --output data/lm.arpa

Manifests give their transcripts; any other file (.txt, .gz) is text, a sentence a line. The text is normalised as in
fine-tuning: give both the same flags. The smoothing is modified Kneser-Ney, in memory. For more than some ten million
words use KenLM's lmplz, whose ARPA files serve as well.
"""

import gzip
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from corpus_files import Parser, open_atomic
from kneser_ney import BEGIN, END, UNKNOWN, estimate, write_arpa

from w2v2.errors import UserError, number, refuse, tell
from w2v2.evaluate.scores import TARGET_UNITS
from w2v2.finetune.normalisation import CASES, TextRules, find_case
from w2v2.manifests.manifest import COLUMNS
from w2v2.manifests.readers import READERS, find_suffix, read_table
from w2v2.manifests.segments import cast_text, merge_aliases


def read_lines(path: Path) -> Iterable[str]:
    """The sentences of a manifest or a text file, as they are written."""
    refuse((path.suffix in (".yaml", ".yml"), f"{path}: is no text: name the manifests that it lists"))
    return _read_transcripts(path) if path.is_dir() or find_suffix(path) in READERS else _read_lines(path)


def _read_transcripts(path: Path) -> list[str]:
    """The text column alone: the audio is not looked at."""
    raw = read_table(path, lambda name: name in COLUMNS["text"])
    names = [name for name in COLUMNS["text"] if name in raw.table.column_names]
    for line in merge_aliases(raw, names) if names else ():
        tell(line)
    texts = cast_text(raw, names[0]).to_pylist() if names else []
    if not any(texts):
        raise UserError(f"{path}: no transcripts in this manifest: give one with a column `text`, or a text file")
    return texts


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            yield from file
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile):
        raise UserError(f"{path} is not UTF-8 text: save it again with that encoding") from None


def build(args) -> None:
    """Count, estimate and write, whole or not at all."""
    files = ", ".join(map(str, args.text))
    drop_tokens = tuple(args.drop_tokens)
    lines = [line for path in args.text for line in read_lines(path)]
    case = find_case(lines) if args.text_case == "auto" else args.text_case
    folds = args.fold_accents, args.fold_compatibility
    rules = TextRules(args.target_unit, case, args.drop_characters, args.keep_characters, *folds, drop_tokens)
    sentences = [words for line in lines if (words := rules(line).split())]
    if not sentences:
        raise UserError(f"{files}: no words found: give manifests with a column `text`, or text files")
    if reserved := {BEGIN, END, UNKNOWN}.intersection(chain.from_iterable(sentences)):
        raise UserError(f"{files}: holds the word {min(reserved)}, which an n-gram reserves: remove it from the text")
    model = estimate(sentences, args.order)
    with open_atomic(args.output) as file:
        write_arpa(model, file)
    sizes = ", ".join(f"{len(table)} {n}-grams" for n, table in enumerate(model.probabilities, 1))
    print(f"{args.output}: {len(sentences)} sentences, {sum(map(len, sentences))} words; {sizes}")
    if model.fallbacks:
        print(
            f"too little text to estimate the discounts of order {model.fallbacks}: fixed discounts are used",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="manifests, folders that are manifests, or text files")
    parser.add_argument("--output", type=Path, required=True, help="the ARPA file to write")
    parser.add_argument("--order", type=number(int, min=2), default=4, help="longest n-gram")
    parser.add_argument("--data_root", help="not needed: the audio is not looked at")
    parser.add_argument("--target_unit", choices=TARGET_UNITS, default="characters", help="tokens: as phonemes are")
    parser.add_argument("--text_case", choices=CASES, default="auto", help="auto: capitals, if the text has both")
    parser.add_argument("--drop_characters", help="left out, instead of punctuation", metavar="CHARACTERS")
    parser.add_argument("--keep_characters", default="", help="kept all the same", metavar="CHARACTERS")
    parser.add_argument("--fold_accents", action="store_true", help="write É as E")
    parser.add_argument("--fold_compatibility", action="store_true", help="write ﬁ as fi (NFKC)")
    parser.add_argument("--drop_tokens", nargs="*", default=[], help="left out of the text", metavar="TOKEN")
    return parser.run(build, argv)


if __name__ == "__main__":
    sys.exit(main())
