"""Packed audio: many utterances in few files, as bare 16-bit samples at 16 kHz, so that a crop is one read of its bytes.

A packed folder, which `data_scripts/pack_audio.py` writes and which may be moved, holds

    shard-00000.arrow …  Arrow IPC files, uncompressed: columns `id` and `samples`, a list of int16 an utterance
    shards.jsonl         a line a shard: its size, its SHA-256 and what happened to the audio in it
    utterances.parquet   the manifest: `id`, `audio`, `num_samples`, and text, speaker and label where there are any
    packed.json          what was packed, and how; the sign by which a folder is known as packed

An utterance's `audio` is an address: the shard, `#`, its first byte, `+`, its number of samples, as in
`shard-00003.arrow#1181696+240000`. Any other name is that of a file, whatever it holds. The bytes are fetched by `pread` rather than
through a mapping: a crop out of thousands of shards then costs no parsing (Arrow takes longer to open a file than a crop takes to
read), a forked worker shares nothing that moves, and a shard that is cut short under a reader gives an error, not a SIGBUS.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

INDEX, SETTINGS, SHARDS = "utterances.parquet", "packed.json", "shards.jsonl"
ADDRESS = re.compile(r"((?:.*/)?shard-[0-9]{5,}\.arrow)#([0-9]+)\+([0-9]+)", re.DOTALL)
MAGIC = b"ARROW1"  # an Arrow IPC file begins and ends with it, so one that was not written to its end is known by that
SCHEMA = pa.schema([("id", pa.string()), ("samples", pa.large_list(pa.int16()))], {"sampling_rate": "16000"})
BATCH_SAMPLES = 1 << 24  # a record batch is written when it holds this many: 34 MB, 17 minutes
MAX_OPEN = 128  # shards that a process keeps open
BYTES_PER_SAMPLE = 2


class ShardError(Exception):
    """A shard that cannot give what it is asked for; the message is the reason, `errno` the system's where that refused it."""

    errno: int | None = None

    @classmethod
    def of(cls, error: OSError) -> "ShardError":
        found = cls(f"cannot be read: {error.strerror}")
        found.errno = error.errno
        return found


class Address(NamedTuple):
    """Where an utterance's samples lie."""

    shard: str
    first_byte: int
    num_samples: int


def parse_address(audio: str) -> Address | None:
    """None for anything but the address of a packed utterance: a file's path, `#` in it or not."""
    match = ADDRESS.fullmatch(audio)
    return Address(match[1], int(match[2]), int(match[3])) if match else None


def find_index(path: Path) -> Path | None:
    """The manifest of a packed folder, given the folder or that manifest; whether it is there yet is not looked up."""
    index = path if path.name == INDEX else path / INDEX
    return index if index.with_name(SETTINGS).is_file() else None


def read_samples(address: Address, start: int, num_samples: int) -> np.ndarray:
    """`num_samples` from `start` of an utterance, int16, shape (S,). Raises ShardError."""
    shard = _holder(address)  # kept in hand: another thread's readers may push it out of the cache, and so close it
    samples = np.empty(num_samples, np.int16)
    rest, at = memoryview(samples).cast("B"), address.first_byte + BYTES_PER_SAMPLE * start
    while rest:
        try:
            count = os.preadv(shard.descriptor, [rest], at)
        except OSError as error:
            _opened.cache_clear()  # a descriptor may be stale: the next try opens the file again
            raise ShardError.of(error) from None
        if not count:
            raise ShardError("was cut short after it was opened: copy it again, or pack it again")
        rest, at = rest[count:], at + count
    return samples


def check(address: Address) -> None:
    """Raises ShardError where the shard is missing, damaged at either end, or too short to hold the utterance."""
    _holder(address)


def _holder(address: Address) -> "_Shard":
    shard, last = _opened(address.shard), address.first_byte + BYTES_PER_SAMPLE * address.num_samples
    if last > shard.size:
        raise ShardError(f"has {shard.size} bytes, and this utterance ends at {last}: it belongs to another packing")
    return shard


class _Shard:
    """A descriptor that is closed when the last reader lets go of it."""

    descriptor = None

    def __init__(self, path: str):
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
            status = os.fstat(self.descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no file")
            self.size = status.st_size
            ends = [os.pread(self.descriptor, len(MAGIC), at) for at in (0, max(0, self.size - len(MAGIC)))]
        except FileNotFoundError:
            raise ShardError("does not exist") from None
        except OSError as error:
            raise ShardError.of(error) from None
        except ValueError as error:  # also a null character in the path
            raise ShardError(f"cannot be read: {error}") from None
        if ends != [MAGIC, MAGIC]:
            raise ShardError("is truncated or damaged: copy it again, or pack it again")

    def __del__(self, close=os.close):
        if self.descriptor is not None:
            close(self.descriptor)


_opened = lru_cache(MAX_OPEN)(_Shard)  # a failure is not remembered


def quantized(samples: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """float32 in [-1, 1) → int16, the number of samples that had to be clipped, and whether anything was lost."""
    scaled = samples * np.float32(32_768)
    rounded = np.rint(scaled)
    clipped = np.clip(rounded, -32_768, 32_767)
    return clipped.astype(np.int16), int((clipped != rounded).sum()), bool((clipped != scaled).any())


def write_shard(path: Path, utterances: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write `(id, int16 samples)` in record batches of bounded size. The same utterances give the same bytes."""
    with open(path, "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        ids, waveforms, held = [], [], 0
        for name, samples in utterances:
            ids.append(name)
            waveforms.append(samples)
            held += len(samples)
            if held >= BATCH_SAMPLES:
                writer.write_batch(_batch(ids, waveforms))
                ids, waveforms, held = [], [], 0
        if ids:
            writer.write_batch(_batch(ids, waveforms))


def _batch(ids: list[str], waveforms: list[np.ndarray]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *map(len, waveforms)], dtype=np.int64)
    samples = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(waveforms)))
    return pa.record_batch([pa.array(ids, pa.string()), samples], schema=SCHEMA)


def locate(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """First byte and number of samples, int64 of shape (rows,), of every utterance in a shard: where Arrow itself finds them."""
    firsts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with pa.memory_map(str(path)) as file:
        base = file.read_buffer(1).address
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            samples = reader.get_batch(number).column("samples")
            offsets = samples.offsets.to_numpy()
            begin = samples.buffers()[3].address - base
            firsts.append(begin + BYTES_PER_SAMPLE * offsets[:-1])
            lengths.append(np.diff(offsets))
    return np.concatenate(firsts), np.concatenate(lengths)


def sha256_of(path: Path) -> str:
    """As `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
