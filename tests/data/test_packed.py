"""`w2v2.packed`: an address gives what the file gave, and no damaged shard gives wrong lengths or ends the process."""

import multiprocessing
import os

import numpy as np
import pyarrow as pa
import pytest

from w2v2.data import packed
from w2v2.data.audio import AudioError, probe, read_crop, read_pcm
from w2v2.data.manifest import load_manifest
from w2v2.data.packed import Address, find_index, locate, parse_address, quantized, write_shard
from w2v2.errors import UserError

LENGTHS = [5_000, 1, 16_000, 777, 40_000]


def speech(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(-32_768, 32_768, length).astype(np.int16)


def make_shard(folder, number=0, seed=0, lengths=LENGTHS):
    """A shard of noise. Returns its path and the addresses of its utterances."""
    path = folder / f"shard-{number:05d}.arrow"
    write_shard(path, [(f"u{i}", speech(length, seed)) for i, length in enumerate(lengths)])
    return path, [f"{path}#{first}+{count}" for first, count in zip(*locate(path), strict=True)]


@pytest.fixture
def shard(tmp_path):
    return make_shard(tmp_path)


def test_an_address_gives_the_samples_and_any_crop_of_them(shard):
    rng = np.random.default_rng(0)
    for address, length in zip(shard[1], LENGTHS, strict=True):
        whole = speech(length)
        assert probe(address) == length
        np.testing.assert_array_equal(read_pcm(address), whole)
        for _ in range(20):
            start = int(rng.integers(length))
            count = int(rng.integers(1, length - start + 1))
            crop = read_pcm(address, start, count)
            assert crop.dtype == np.int16
            np.testing.assert_array_equal(crop, whole[start : start + count])
            floats = read_crop(address, start, count)
            assert floats.dtype == np.float32
            np.testing.assert_array_equal(floats, whole[start : start + count] / 32_768)


def test_a_window_at_an_utterances_end_never_reaches_into_the_next(shard):
    address, whole = shard[1][2], speech(16_000)
    np.testing.assert_array_equal(read_pcm(address, 15_000, 1_100), whole[-1_100:])
    np.testing.assert_array_equal(read_pcm(address, 0, 16_100), np.pad(whole, (0, 100)))
    for start, count in [(0, 16_200), (15_000, 12_000), (50_000, 1_000), (16_000, None)]:
        with pytest.raises(AudioError, match="shorter than its manifest says"):
            read_pcm(address, start, count)


def test_arrow_reads_a_shard_and_finds_the_same(shard):
    with pa.memory_map(str(shard[0])) as file:
        table = pa.ipc.open_file(file).read_all()
        table.validate(full=True)
        assert table["id"].to_pylist() == ["u0", "u1", "u2", "u3", "u4"]
        for samples, length in zip(table["samples"], LENGTHS, strict=True):
            np.testing.assert_array_equal(samples.values.to_numpy(), speech(length))


def test_utterances_are_found_in_whichever_record_batch_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "BATCH_SAMPLES", 5_000)
    path, addresses = make_shard(tmp_path)
    with pa.memory_map(str(path)) as file:
        assert pa.ipc.open_file(file).num_record_batches == 3
    for address, length in zip(addresses, LENGTHS, strict=True):
        np.testing.assert_array_equal(read_pcm(address), speech(length))


def test_a_shard_without_utterances_is_a_shard(tmp_path):
    path, addresses = make_shard(tmp_path, lengths=[])
    assert addresses == [] and path.stat().st_size > 0


@pytest.mark.parametrize(
    "audio, expected",
    [
        ("shard-00003.arrow#8+5", Address("shard-00003.arrow", 8, 5)),
        ("/a b/ü#1+2/shard-123456.arrow#0+0", Address("/a b/ü#1+2/shard-123456.arrow", 0, 0)),
        ("/line\nbreak/shard-00003.arrow#8+5", Address("/line\nbreak/shard-00003.arrow", 8, 5)),
        ("/a/shard-00003.arrow", None),
        ("/a/shard-00003.arrow#8", None),
        ("/a/shard-0003.arrow#8+5", None),
        ("/a/my-shard-00003.arrow#8+5", None),
        ("/a/shard-00003.arrow#8+5.wav", None),
        ("/a/shard-00003.arrow#8+5\n", None),
        ("/a/shard-00003.arrow#-8+5", None),
        ("/a/shard-0000٣.arrow#8+5", None),
        ("/a/take#2+3.flac", None),
    ],
)
def test_exactly_the_addresses_are_taken_for_addresses(audio, expected):
    assert parse_address(audio) == expected


def read_all(addresses):
    """Every address's outcome: its number of samples, or the reason of its error."""
    outcomes = []
    for address in addresses:
        try:
            outcomes.append(len(read_pcm(address)))
        except AudioError as error:
            assert "\n" not in str(error) and error.path == address
            outcomes.append(error.reason)
    return outcomes


@pytest.fixture(autouse=True)
def _nothing_is_open():
    packed._opened.cache_clear()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_shard_cut_short_is_an_error_wherever_it_was_cut(shard, share):
    path, addresses = shard
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert all("truncated" in outcome for outcome in read_all(addresses))
    with pytest.raises(AudioError, match="truncated"):
        probe(addresses[0])


def test_a_shard_filled_up_with_zeros_is_an_error(shard):
    path, addresses = shard
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    os.truncate(path, size)
    assert all("truncated" in outcome for outcome in read_all(addresses))


def test_a_shard_cut_short_under_an_open_reader_is_an_error_not_a_signal(shard):
    path, addresses = shard
    assert read_all(addresses) == LENGTHS
    os.truncate(path, 3_000)
    outcomes = read_all(addresses)
    assert all("cut short after it was opened" in outcome for outcome in outcomes[2:])


def test_no_flipped_bit_outside_the_samples_changes_what_is_read(shard):
    """Reading trusts none of Arrow's structure: damage there is an error or has no effect, and damage to samples stays in place."""
    path, addresses = shard
    content = path.read_bytes()
    spans = [(a.first_byte, a.first_byte + 2 * a.num_samples) for a in map(parse_address, addresses)]
    outside = [byte for byte in range(len(content)) if not any(first <= byte < last for first, last in spans)]
    for byte in [*range(6), *outside[:: len(outside) // 60], *range(len(content) - 6, len(content))]:
        damaged = bytearray(content)
        damaged[byte] ^= 0x41
        path.write_bytes(damaged)
        packed._opened.cache_clear()
        for address, length in zip(addresses, LENGTHS, strict=True):
            try:
                np.testing.assert_array_equal(read_pcm(address), speech(length))
            except AudioError as error:
                assert byte < 6 or byte >= len(content) - 6, error
            else:
                assert 6 <= byte < len(content) - 6


def test_a_shard_that_is_missing_no_shard_or_another_one_is_an_error(tmp_path):
    path, addresses = make_shard(tmp_path)
    other, _ = make_shard(tmp_path, 1, lengths=[10])
    os.replace(other, path)
    assert "belongs to another packing" in read_all(addresses)[-1]
    packed._opened.cache_clear()
    path.unlink()
    assert read_all(addresses) == ["does not exist"] * len(addresses)
    path.mkdir()
    assert all("cannot be read" in outcome for outcome in read_all(addresses))


def num_open(folder):
    """Descriptors of this process for files in a folder; those of other tests do not count."""
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.realpath(descriptor).startswith(f"{folder}/") for descriptor in descriptors)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors where Linux lists them")
def test_few_shards_are_open_at_a_time(tmp_path):
    addresses = [make_shard(tmp_path, number, lengths=[50])[1][0] for number in range(packed.MAX_OPEN + 40)]
    for _ in range(2):
        assert read_all(addresses) == [50] * len(addresses)
        assert 1 < num_open(tmp_path) <= packed.MAX_OPEN
    packed._opened.cache_clear()
    assert num_open(tmp_path) == 0


def test_a_shard_that_others_push_out_of_the_cache_stays_open_while_it_is_read(shard, monkeypatch):
    read = os.preadv

    def evict_then_read(*arguments):
        packed._opened.cache_clear()
        return read(*arguments)

    monkeypatch.setattr(packed.os, "preadv", evict_then_read)
    np.testing.assert_array_equal(read_pcm(shard[1][2]), speech(16_000))


def test_a_read_that_comes_in_pieces_is_put_together(shard, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(packed.os, "preadv", lambda file, buffers, at: read(file, [buffers[0][:999]], at))
    np.testing.assert_array_equal(read_pcm(shard[1][4], 7, 30_000), speech(40_000)[7:30_007])


def _read_often(addresses, seed, queue):
    rng, wrong = np.random.default_rng(seed), 0
    for _ in range(300):
        row = int(rng.integers(len(LENGTHS)))
        wrong += not np.array_equal(read_pcm(addresses[row]), speech(LENGTHS[row]))
    queue.put(wrong)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_readers_that_share_a_descriptor_do_not_disturb_each_other(shard):
    addresses = shard[1]
    assert read_all(addresses) == LENGTHS  # opened before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    readers = [context.Process(target=_read_often, args=(addresses, seed, queue)) for seed in range(3)]
    for reader in readers:
        reader.start()
    assert [queue.get(timeout=60) for _ in readers] == [0, 0, 0]
    for reader in readers:
        reader.join()


def test_quantizing_rounds_clips_and_says_so():
    exact = speech(1_000) / np.float32(32_768)
    samples, num_clipped, inexact = quantized(exact)
    assert samples.dtype == np.int16 and (num_clipped, inexact) == (0, False)
    np.testing.assert_array_equal(samples, speech(1_000))
    samples, num_clipped, inexact = quantized(np.array([1.0, -1.0, 1.5, -2.0, 0.0], np.float32))
    assert (num_clipped, inexact) == (3, True)
    assert samples.tolist() == [32_767, -32_768, 32_767, -32_768, 0]
    samples, num_clipped, inexact = quantized(np.array([0.3 / 32_768, 1.7 / 32_768], np.float32))
    assert samples.tolist() == [0, 2] and (num_clipped, inexact) == (0, True)


def test_an_unfinished_packing_is_no_manifest(tmp_path):
    (tmp_path / "packed.json").write_text("{}")
    assert find_index(tmp_path) == tmp_path / "utterances.parquet"
    for name in (tmp_path, tmp_path / "utterances.parquet"):
        with pytest.raises(UserError, match="not packed to its end"):
            load_manifest(str(name), probe=probe)
    (tmp_path / "packed.json").unlink()
    assert find_index(tmp_path) is None
