"""Pack a manifest's audio into a few large WAV files, so that training reads crops and decodes nothing.

    python data_scripts/pack_audio.py data/train.csv --output_dir data/packed
    python data_scripts/pack_audio.py --verify data/packed
    python pretrain.py --train_data data/packed …

The folder may be moved and holds

    shard-00000.wav …   ordinary WAV files, 16 kHz, mono, 16 bits: the utterances one after another; 115 MB an hour
    manifest.parquet    id, audio (the shard), start (seconds), num_samples; text, speaker and label where there are any
    SHA256SUMS          of all of these, for --verify or sha256sum -c
    packing.jsonl       what was packed; then a line a shard

Ids, order and lengths stay, so the effective batches do. 16-bit mono audio at 16 kHz stays the same bit for bit; other
audio is decoded, mixed (or its `channel` taken) and resampled as in training, rounded and clipped. After an
interruption, the same command goes on with the missing shards, to the same bytes. Unreadable utterances are left out
and listed in skipped_audio.jsonl; once they are mended, pack anew with --overwrite.
"""

import hashlib
import json
import os
import sys
import wave
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from corpus_files import Parser, list_skipped, open_atomic, write_lines
from slices import HELP, find_logs, parse_slice, read_records, refuse_unknown, remove_slices
from tqdm import tqdm

from w2v2.audio.crops import SAMPLING_RATE, AudioError, is_compressed, read_pcm, write_seekable
from w2v2.data.utterances import load_manifest
from w2v2.errors import UserError, number
from w2v2.train.durable import hash_file

FORMAT = 3  # raise it when the same audio and flags would give other files
MAX_SHARD_HOURS = 18.0  # the file stays below 2 GiB, as its 32-bit sizes demand
ROW = ("id", "audio", "start", "num_samples")
MANIFEST, SUMS, LOG, SKIPPED = "manifest.parquet", "SHA256SUMS", "packing.jsonl", "skipped_audio.jsonl"


def pack(args) -> None:
    """Plan the shards, write the missing ones, then the sums and the manifest. Raises UserError for a user's slips."""
    check_flags(args)
    folder = args.output_dir
    table, unmeasured = load_manifest(
        args.manifests, data_root=args.data_root, fill=not args.slice, further=["language"]
    )
    if args.slice:
        refuse_unknown(table.data.column("num_samples"))
    # 1. What is to be written, and what is there already.
    shards = cut_shards(table["num_samples"], args.shard_hours)
    digest = hashlib.sha256()  # of all that the manifest says, paths included
    for rows in table.iter(1 << 16):
        digest.update(json.dumps(rows).encode())
    settings = {"format": FORMAT, "shard_hours": args.shard_hours, "rows_sha256": digest.hexdigest()}
    if args.slice:
        shards = {name: shards[name] for name in args.slice.take(list(shards))}
    log = args.slice.find_log(folder / LOG) if args.slice else folder / LOG
    finished = claim_folder(folder, settings, args.overwrite)
    write_lines(log, [settings, *(record for name, record in finished.items() if name in shards)])
    # 2. The shards.
    records = pack_missing(log, table, shards, finished, args.num_workers)
    if args.slice:
        print(f"{folder}: slice {args.slice.index} of {args.slice.count}, {len(shards):,} shards")
        return
    write_lines(folder / LOG, [settings, *records])  # in order
    remove_slices(folder / LOG)
    # 3. The manifest, unless too much is missing.
    skipped = unmeasured + [entry for record in records for entry in record["skipped"]]
    list_skipped(folder / SKIPPED, skipped)
    total = len(table) + len(unmeasured)
    if len(skipped) > args.max_skipped_fraction * total or len(skipped) == total:
        limit = f"--max_skipped_fraction {args.max_skipped_fraction:g}"
        raise UserError(
            f"{len(skipped)} of {total} utterances cannot be read, more than {limit} allows: mend them ({SKIPPED} lists them) and pack with --overwrite, or raise it"
        )
    lengths = np.concatenate([record["num_samples"] for record in records])  # (rows,)
    write_index(folder, table, shards, records, lengths)
    print(f"{folder}: {total - len(skipped):,} utterances in {len(shards):,} shards; {len(skipped):,} left out")
    # 4. What is not as the manifest or the source has it.
    shorter = int(((lengths > 0) & (lengths != np.array(table["num_samples"]))).sum())
    if (clipped := sum(record["clipped_samples"] for record in records)) or shorter:
        clipping = f"{clipped:,} samples beyond full scale are clipped"
        print(f"{shorter:,} utterances are shorter than their manifest says; {clipping}")


def check_flags(args) -> None:
    """UserError for flags that cannot serve, before anything is read or deleted."""
    folder = args.output_dir
    if not args.manifests or not folder:
        raise UserError("give manifests and --output_dir, or --verify FOLDER")
    if args.slice and args.overwrite:
        raise UserError(
            "--overwrite with --slice would delete what other slices wrote: leave it out, and remove the folder yourself"
        )
    sources = [Path(name).expanduser().resolve() for name in args.manifests]
    is_taken = folder.exists() and not folder.is_dir()
    is_taken |= folder.is_dir() and not all(path.name.startswith(LOG[:7]) for path in folder.iterdir())
    if is_taken and not find_logs(folder / LOG) or any(folder.resolve() in (path, path.parent) for path in sources):
        raise UserError(f"--output_dir {folder}: is a file, or holds other files or a source: name a new folder")


def cut_shards(num_samples: Iterable[int], shard_hours: float) -> dict[str, range]:
    """Shard's name → its rows of the manifest: consecutive rows, as many as fit into `shard_hours`, at least one."""
    room, most = (round(hours * 3600 * SAMPLING_RATE) for hours in (shard_hours, MAX_SHARD_HOURS))
    bounds, held = [0], 0
    for row, length in enumerate(num_samples):
        if length > most:
            raise UserError(f"utterance {row + 1} holds more than {MAX_SHARD_HOURS:g} hours: cut it into several")
        if held and held + length > room:
            bounds.append(row)
            held = 0
        held += length
    bounds.append(row + 1)
    return {f"shard-{n:05d}.wav": range(*bounds[n : n + 2]) for n in range(len(bounds) - 1)}


def claim_folder(folder: Path, settings: dict, overwrite: bool) -> dict[str, dict]:
    """Records of the shards that are there already, by name. UserError where something else was packed."""
    if overwrite:
        for path in (*folder.glob("shard-*.wav"), *find_logs(folder / LOG)):
            path.unlink(missing_ok=True)
    lines = read_records(find_logs(folder / LOG))
    if any(line != settings for line in lines if "shard" not in line):
        raise UserError(f"--output_dir {folder} holds another packing: name a new folder, or give --overwrite")
    for name in (MANIFEST, SUMS):  # without them, the packing is unfinished
        (folder / name).unlink(missing_ok=True)
    sizes = {path.name: path.stat().st_size for path in folder.glob("shard-*.wav")}
    return {line["shard"]: line for line in lines if "shard" in line and sizes.get(line["shard"]) == line["bytes"]}


def pack_missing(log: Path, table, shards: dict[str, range], records: dict, num_workers: int) -> list[dict]:
    """Write the shards without a record, in threads (decoders and hashes do not hold the GIL). Returns all records."""
    missing = [name for name in shards if name not in records]
    try:
        with open(log, "a", encoding="utf-8") as file, ThreadPoolExecutor(max(1, num_workers)) as pool:
            made = pool.map(lambda name: pack_shard(log.with_name(name), table, shards[name]), missing)
            for record in tqdm(made, "Packing", len(missing), unit="shard", disable=None):
                records[record["shard"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
    except OSError as error:
        reason = f"{log.parent} cannot be written: {error.strerror or error}"
        raise UserError(f"{reason}: mend that and run the same command again; finished shards stay") from None
    return [records[name] for name in shards]


def pack_shard(path: Path, table, rows: range) -> dict:
    """Write one shard. Returns its line of the log, in which an utterance that cannot be read has 0 samples."""
    lengths, skipped, clipped = [], [], 0
    columns = table[rows.start : rows.stop]  # one look into the table for all of them
    num_rows, copied, copy = Counter(columns["audio"]), None, path.with_suffix(".tmp.w64")
    with open_atomic(path, "wb") as file, wave.open(file, "wb") as shard:
        shard.setparams((1, 2, SAMPLING_RATE, 0, "NONE", ""))  # channels, bytes a sample, …
        channels = columns.get("channel", [None] * len(rows))
        for name, audio, start, num_samples, channel in zip(*map(columns.get, ROW), channels, strict=True):
            try:
                if copied != audio and num_rows[audio] > 1 and is_compressed(audio):
                    copied = None  # until the copy is whole
                    write_seekable(audio, copy)  # a compressed file of many utterances is decoded once
                    copied = audio
                first, source = round(start * SAMPLING_RATE), str(copy) if copied == audio else audio
                samples, beyond = read_utterance(source, first, num_samples, channel)  # (S,) int16
                clipped += beyond
            except AudioError as error:
                skipped.append({"id": name, "audio": audio, "reason": error.reason})
                samples = np.empty(0, np.int16)
            shard.writeframesraw(samples.astype("<i2").tobytes())
            lengths.append(len(samples))
    copy.unlink(missing_ok=True)
    record = {"shard": path.name, "num_samples": lengths, "skipped": skipped, "clipped_samples": clipped}
    return record | {"sha256": hash_file(path), "bytes": path.stat().st_size}


def read_utterance(path: str, start: int, num_samples: int, channel: int | None) -> tuple[np.ndarray, int]:
    """An utterance as int16 of shape (S,), and how many of its samples lie beyond full scale. Raises AudioError."""
    samples = read_pcm(path, start, num_samples, channel=channel)
    if samples.dtype == np.int16:
        return samples, 0
    scaled = np.rint(samples * np.float32(32_768))
    clipped = scaled.clip(-32_768, 32_767)
    return clipped.astype(np.int16), int((np.abs(scaled) > 32_768).sum())


def write_index(folder: Path, table, shards: dict[str, range], records: list[dict], lengths: np.ndarray) -> None:
    """Write manifest.parquet (the source's rows in their order, without the unreadable ones) and SHA256SUMS."""
    starts = np.concatenate([np.cumsum(own) - own for own in (np.array(r["num_samples"]) for r in records)])  # (rows,)
    source = table.with_format("arrow")[:]
    columns = {"id": source["id"], "audio": np.repeat(list(shards), list(map(len, shards.values())))}
    columns |= {"start": starts / SAMPLING_RATE, "num_samples": lengths}
    columns |= {name: source[name] for name in source.column_names if name not in (*columns, "channel")}
    with open_atomic(folder / MANIFEST, "wb") as file:
        pq.write_table(pa.table(columns).filter(lengths > 0), file)
    sums = {record["shard"]: record["sha256"] for record in records} | {MANIFEST: hash_file(folder / MANIFEST)}
    with open_atomic(folder / SUMS) as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sums.items())


def verify(folder: Path, num_workers: int) -> None:
    """Hold each file against its sum. UserError names what is wrong."""
    if not (folder / SUMS).is_file() or not (folder / MANIFEST).is_file():
        raise UserError(f"--verify {folder} holds no finished packing: run the command that packs it again")
    sums = dict(reversed(line.split("  ", 1)) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines())
    there = [name for name in sums if (folder / name).is_file()]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        found = dict(zip(there, pool.map(hash_file, map(folder.joinpath, there)), strict=True))
    if wrong := [name for name in sums if found.get(name) != sums[name]]:
        names = ", ".join(wrong[:5])
        raise UserError(f"{folder}: missing or damaged: {names}: delete them and run the command that packs it again")
    print(f"{folder}: {len(sums) - 1:,} shards and the manifest are as they were written")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("manifests", nargs="*", metavar="MANIFEST", help="what pretrain.py takes as --train_data")
    parser.add_argument("--output_dir", type=Path, help="folder for the shards and their manifest")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    hours = number(float, above=0, max=MAX_SHARD_HOURS)
    parser.add_argument("--shard_hours", type=hours, default=2.0, help="most audio in a shard")
    parser.add_argument("--num_workers", type=number(int, min=1, max=1000), default=os.cpu_count(), help="threads")
    parser.add_argument("--overwrite", action="store_true", help="delete what was packed into OUTPUT_DIR before")
    parser.add_argument("--max_skipped_fraction", type=number(float, min=0, max=1), default=0.01, help="left out")
    parser.add_argument("--slice", type=parse_slice, metavar="I/N", help=HELP)
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="check a packed folder against its sums instead")
    return parser.run(lambda args: verify(args.verify, args.num_workers) if args.verify else pack(args), argv)


if __name__ == "__main__":
    sys.exit(main())
