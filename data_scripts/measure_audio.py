"""Measure a manifest's audio once: a Parquet manifest with every length, which a run reads at once.

    python data_scripts/measure_audio.py data/train.csv podcasts --output data/train.parquet

MANIFEST is whatever pretrain.py takes as --train_data. The output has id, audio (absolute paths), start (seconds),
num_samples (at 16 kHz), and channel, text, speaker and label where there are any. Lengths are read from headers where
these can be relied on, else by decoding. They are kept in OUTPUT.measuring, so that the same command goes on after an
interruption. Files that cannot be read are left out, and listed in OUTPUT.skipped.jsonl.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from corpus_files import Parser, list_skipped, open_atomic, parse_path
from slices import HELP, find_logs, parse_slice, read_records, remove_slices

from w2v2.audio.crops import SAMPLING_RATE, measure_length
from w2v2.audio.inspection import measure_lengths
from w2v2.errors import number, refuse
from w2v2.manifests.columns import LETTERS
from w2v2.manifests.manifest import read_manifests

LENGTHS = "lengths.jsonl"
BATCH_ROWS = 1 << 16


def measure(args) -> None:
    """One slice of the files that have no length, or all of them and then the manifest."""
    is_source = args.output.resolve() in [Path(name).expanduser().resolve() for name in args.manifests]
    refuse((is_source, f"--output {args.output} is one of the manifests: name another file"))
    folder = args.output.with_suffix(".measuring")
    if not args.slice and (logs := find_logs(folder / LENGTHS)):
        lengths = dict.fromkeys(tuple(record) for record in read_records(logs))  # path, size, time of change, length
        with open_atomic(folder / LENGTHS) as file:
            file.writelines(json.dumps(record) + "\n" for record in lengths)
        remove_slices(folder / LENGTHS)
    if args.slice or args.num_workers:
        table, *_ = read_manifests(args.manifests, data_root=args.data_root, fill=False)
        paths = table["audio"].filter(pc.is_null(table["num_samples"])).unique().to_pylist()
        mine = args.slice.take(paths) if args.slice else paths
        log = args.slice.find_log(folder / LENGTHS).name if args.slice else LENGTHS
        found = measure_lengths(mine, measure_length, folder, log, args.num_workers)
    if args.slice:
        print(f"slice {args.slice.index}/{args.slice.count}: {len(found):,} of {len(paths):,} files measured")
        return
    table, skipped, _ = read_manifests(args.manifests, data_root=args.data_root, cache_dir=folder, further=["language"])
    list_skipped(args.output.with_suffix(".skipped.jsonl"), skipped)
    if "channel" in table.column_names and (pc.max(table["channel"]).as_py() or 0) < len(LETTERS):
        letters = pc.take(pa.array([*LETTERS]), table["channel"])
        table = table.set_column(table.column_names.index("channel"), "channel", letters)
    with open_atomic(args.output, "wb") as file, pq.ParquetWriter(file, table.schema) as writer:
        for batch in table.to_batches(BATCH_ROWS):
            writer.write_batch(batch)
    hours = pc.sum(table["num_samples"]).as_py() / SAMPLING_RATE / 3600
    print(f"{args.output}: {len(table):,} utterances, {hours:.2f} hours; {len(skipped):,} left out")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST", help="what pretrain.py takes as --train_data")
    parser.add_argument(
        "--output", type=partial(parse_path, suffix=".parquet"), required=True, help="the manifest to write, a .parquet"
    )
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    workers = number(int, min=1, max=1000)
    parser.add_argument("--num_workers", type=workers, help="processes that measure (None: as many as cores)")
    parser.add_argument("--slice", type=parse_slice, metavar="I/N", help=HELP)
    return parser.run(measure, argv)


if __name__ == "__main__":
    sys.exit(main())
