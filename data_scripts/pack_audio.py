"""Pack a manifest's audio into few files of bare 16-bit samples, so that training reads crops instead of decoding files.

    python data_scripts/pack_audio.py data/train.csv --output_dir data/packed
    python data_scripts/pack_audio.py --verify data/packed
    python pretrain.py --train_data data/packed …

Takes every manifest that pretrain.py takes. The packed folder serves as a manifest itself: the same utterances with the same
ids, order and lengths, so the effective batches are the same, and a run may even change over to it when it resumes (only a segment
whose manifest makes it end after its file's end is packed as it fits, moved back by up to half a second). The folder may be moved. 16-bit mono audio at 16 kHz is kept bit for bit; other audio is resampled and averaged as in training, and
rounded to 16 bits. An hour takes 115 MB.

Killed in the middle, the same command goes on with the shards that are missing. Utterances that cannot be read are left out
and listed in OUTPUT_DIR/skipped.jsonl. The same audio and flags give the same bytes, whatever the number of workers.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from corpus_files import Parser, exit_status
from pack_shards import ShardTask, pack_all
from packed_folder import (
    CACHE,
    SKIPPED,
    alone_in,
    check_free,
    claim,
    fault,
    read_records,
    verify,
    write_index,
    write_json_lines,
    write_settings,
)
from tqdm import tqdm

from w2v2.data.audio import SAMPLING_RATE, probe
from w2v2.data.manifest import read_manifests
from w2v2.data.packed import INDEX, SHARDS, find_index, sha256_of
from w2v2.errors import UserError, printable

FORMAT = 1  # raise it when the same audio and flags would give other files
DIGEST_ROWS = 1 << 16


def pack(args) -> None:
    """The whole job; UserError where the folder is not free for it, or nothing can be read."""
    folder = args.output_dir
    check_flags(args)
    table, unmeasured = read_manifests(
        args.manifests, data_root=args.data_root, cache_dir=folder / CACHE, num_workers=args.num_workers, probe=probe
    )
    bounds = cut_shards(table["num_samples"].to_numpy(), args.shard_hours)
    settings = {"format": FORMAT, "shard_hours": args.shard_hours, "shards": len(bounds)}
    settings |= {"utterances": len(table), "utterances_sha256": digest(table)}
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        claim(folder, settings, args.overwrite)
        records = pack_missing(folder, table, bounds, args.num_workers)
        skipped = unmeasured + unread(table, bounds, records)
        list_skipped(folder / SKIPPED, skipped)
        write_index(folder, table, bounds, records)
        write_settings(folder, settings | {"index_sha256": sha256_of(folder / INDEX)})
    report(folder, records, skipped)


def check_flags(args) -> None:
    """UserError for values that cannot serve, before anything is read."""
    if not args.shard_hours > 0:
        raise UserError(f"--shard_hours {args.shard_hours:g}: give a positive number")
    check_free(args.output_dir)
    for name in args.manifests:
        index = find_index(Path(name).expanduser())
        if index and index.parent.resolve() == args.output_dir.resolve():
            raise UserError(f"{name} is --output_dir itself: name another folder")


def cut_shards(num_samples: np.ndarray, shard_hours: float) -> list[tuple[int, int]]:
    """First and last (exclusive) row of every shard: consecutive rows, so many that a shard holds about `shard_hours`."""
    begins = np.cumsum(num_samples) - num_samples
    number = begins // max(1, round(shard_hours * 3600 * SAMPLING_RATE))
    firsts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return list(zip(firsts, [*firsts[1:], len(num_samples)], strict=True))


def digest(table: pa.Table) -> str:
    """SHA-256 of what the manifest says, paths included, however the table is cut up in memory."""
    content = hashlib.sha256()
    for first in range(0, len(table), DIGEST_ROWS):
        rows = table.slice(first, DIGEST_ROWS).replace_schema_metadata(None)
        content.update(rows.combine_chunks().to_batches()[0].serialize())
    return content.hexdigest()


def pack_missing(folder: Path, table: pa.Table, bounds: list[tuple[int, int]], num_workers: int) -> list[dict]:
    """Pack the shards that are not there whole. Returns the records of all, in order, as they stand in `shards.jsonl`."""
    names = [f"shard-{number:05d}.arrow" for number in range(len(bounds))]
    records = {name: record for name, record in read_records(folder).items() if not fault(folder, record)}
    records = {name: records[name] for name in names if name in records}
    write_json_lines(folder / SHARDS, records.values())
    missing = {name: part for name, part in zip(names, bounds, strict=True) if name not in records}
    num_samples = {name: samples_in(table.slice(a, b - a)) for name, (a, b) in zip(names, bounds, strict=True)}
    bar = tqdm(
        desc="Packing",
        total=samples_in(table),
        initial=sum(num_samples[name] for name in records),
        unit_scale=1 / SAMPLING_RATE / 3600,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}]",
        disable=None,
    )
    with bar, open(folder / SHARDS, "a", encoding="utf-8") as lines:
        for record in pack_all(tasks(folder, table, missing), num_workers):
            records[record["shard"]] = record
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            bar.update(num_samples[record["shard"]])
    write_json_lines(folder / SHARDS, [records[name] for name in names])
    return [records[name] for name in names]


def tasks(folder: Path, table: pa.Table, parts: dict[str, tuple[int, int]]) -> Iterator[ShardTask]:
    for name, (first, last) in parts.items():
        rows = table.slice(first, last - first)
        starts = np.rint(rows["start"].to_numpy() * SAMPLING_RATE).astype(np.int64).tolist()
        columns = (rows[column].to_pylist() for column in ("id", "audio", "num_samples"))
        yield ShardTask(folder, name, *columns, starts)


def unread(table: pa.Table, bounds: list[tuple[int, int]], records: list[dict]) -> list[dict]:
    """The utterances that are in no shard, in order, with the reason."""
    lost = [
        (first + row, reason) for (first, _), r in zip(bounds, records, strict=True) for row, reason in r["skipped"]
    ]
    rows = table.select(["id", "audio"]).take(pa.array([row for row, _ in lost], pa.int64())).to_pylist()
    return [row | {"reason": reason} for row, (_, reason) in zip(rows, lost, strict=True)]


def list_skipped(path: Path, skipped: list[dict]) -> None:
    """An old list goes, even where there is nothing to list."""
    path.unlink(missing_ok=True)
    if skipped:
        write_json_lines(path, skipped)


def samples_in(table: pa.Table) -> int:
    return int(table["num_samples"].to_numpy().sum())


def report(folder: Path, records: list[dict], skipped: list[dict]) -> None:
    """What the folder holds; what is not as it was in the sources is said."""
    total = {
        name: sum(record[name] for record in records)
        for name in records[0]
        if name not in ("shard", "sha256", "skipped")
    }
    print(
        f"{folder}: {total['utterances']:,} utterances, {total['samples'] / SAMPLING_RATE / 3600:.2f} hours, "
        f"{total['bytes'] / 1e9:.3f} GB in {len(records):,} shards; {len(skipped):,} skipped, {total['rounded']:,} rounded to "
        f"16 bits, {total['clipped']:,} clipped ({total['clipped_samples']:,} samples)"
    )
    if skipped:
        print(
            f"{len(skipped):,} utterances are left out, so the effective batches are not the manifest's; they are listed in "
            f"{folder / SKIPPED}; once they are mended pack anew with --overwrite:",
            file=sys.stderr,
        )
    for entry in skipped[:5]:
        print(f"  {printable(entry['audio'])}: {entry['reason']}", file=sys.stderr)


def check(folder: Path, num_workers: int) -> None:
    """What `--verify` does."""
    records = list(verify(folder, num_workers).values())
    num_bytes = sum(record["bytes"] for record in records)
    print(f"{folder}: {len(records):,} shards and the index are as they were written ({num_bytes / 1e9:.3f} GB)")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("manifests", nargs="*", metavar="MANIFEST", help="what pretrain.py takes as --train_data")
    parser.add_argument("--output_dir", type=Path, help="folder for the shards and their index")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    parser.add_argument("--shard_hours", type=float, default=2.0, help="audio in a shard (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="delete what was packed into OUTPUT_DIR before")
    parser.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="read a packed folder against its checksums instead"
    )
    args = parser.parse_args(argv)
    if args.verify and not args.manifests and not args.output_dir:
        return exit_status(parser.prog, lambda: check(args.verify, args.num_workers))
    if args.verify or not args.manifests or not args.output_dir:
        parser.error("give manifests and --output_dir, or --verify FOLDER alone")
    return exit_status(parser.prog, lambda: pack(args))


if __name__ == "__main__":
    sys.exit(main())
