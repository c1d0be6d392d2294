"""Shards: found by patterns, read to the sample wherever they lie, fetched once while they are needed, or named."""

import json
import os
import shutil
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from conftest import write_tones
from hub_stand_in import HubStandIn

from w2v2.audio.crops import AudioError, read_pcm
from w2v2.data import shard_cache
from w2v2.data.batching import Cursor, EffectiveBatches, PlanStream
from w2v2.data.collate import CropDataset
from w2v2.data.shard_cache import Shard, ShardCache
from w2v2.data.shards import _name_shards, list_shards, read_shards
from w2v2.data.streaming import FetchAhead, ShardOrder, StreamedCrops
from w2v2.errors import LocalError, UserError
from w2v2.manifests.dataset_loading import DatasetSource
from w2v2.manifests.manifest import read_manifests

NUM_SHARDS, PER_SHARD = 6, 4
SECONDS = np.random.default_rng(1).uniform(0.6, 2.5, NUM_SHARDS * PER_SHARD).round(2).tolist()
FORMS = ("tar", "parquet")
PLACES = ("disk", "file", "http")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Tones, and folders `tar` and `parquet` of the same, written by webdataset and datasets; the text is the stem."""
    folder = tmp_path_factory.mktemp("corpus")
    paths = write_tones(folder / "audio", SECONDS)
    for form in FORMS:
        (folder / form).mkdir()
    for number in range(NUM_SHARDS):
        some = paths[number * PER_SHARD : (number + 1) * PER_SHARD]
        with webdataset.TarWriter(str(folder / f"tar/train-{number:02d}.tar")) as tar:
            for path in some:
                tar.write({"__key__": path.stem, "wav": path.read_bytes(), "json": json.dumps({"text": path.stem})})
        rows = dict(
            audio=[{"bytes": path.read_bytes(), "path": path.name} for path in some], text=[p.stem for p in some]
        )
        table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(folder / f"parquet/train-{number:02d}.parquet")
    return folder


@pytest.fixture(scope="module")
def hub(corpus):
    with HubStandIn() as stand_in:
        stand_in.files = {path.name: path.read_bytes() for form in FORMS for path in (corpus / form).iterdir()}
        yield stand_in


@pytest.fixture(autouse=True)
def memory(corpus):
    files = fsspec.filesystem("memory")
    for form in FORMS:
        files.put(str(corpus / form), f"/corpus/{form}", recursive=True)
    yield files
    files.rm("/", recursive=True)


def place_of(place, corpus, hub, form) -> str:
    """A pattern for all shards."""
    names = f"train-{{00..{NUM_SHARDS - 1:02d}}}.{form}"
    places = {"disk": corpus / form / names, "memory": f"memory://corpus/{form}/train-*.{form}"}
    places["file"] = f"file://{corpus}/{form}"  # copied, as from a network disk
    return str(places.get(place) or f"{hub.url}/lab/speech/resolve/main/{names}")


def make_args(tmp_path, *patterns, **changes):
    values = dict(train_data=patterns, output_dir=str(tmp_path), shuffle_window_shards=2)
    return SimpleNamespace(**values | dict(batch_hours=1e-6, shard_cache_gb=None, shard_cache_dir=None) | changes)


def read(args):
    return read_shards([one if isinstance(one, DatasetSource) else str(one) for one in args.train_data], args)


def open_crops(args):
    """The table of the shards as a list, and a data set that reads them."""
    table, skipped, notes = read(args)
    assert not skipped
    rows = table.to_pylist()
    return rows, StreamedCrops(rows, SimpleNamespace(sampling_rate=16_000), 0, notes["shards"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_shards_hold_what_the_files_hold_wherever_they_lie(corpus, hub, tmp_path, form, place):
    args = make_args(tmp_path, place_of(place, corpus, hub, form))
    rows, crops = open_crops(args)
    assert [row["text"] for row in rows] == [f"tone{n}" for n in range(len(SECONDS))]
    assert [row["num_samples"] for row in rows] == [round(16_000 * length) for length in SECONDS]
    assert [row["id"].split("/")[0] for row in rows[::PER_SHARD]] == [
        f"train-{n:02d}.{form}" for n in range(NUM_SHARDS)
    ]
    for row in rows:
        np.testing.assert_array_equal(
            crops.read(row, 77, 5_000), read_pcm(corpus / f"audio/{row['text']}.wav", 77, 5_000)
        )
    copies = [path for path in (tmp_path / "cache/shards").iterdir() if not path.name.endswith(".lock")]
    assert bool(copies) == (form == "parquet" or place != "disk")
    # The index is not made twice, and the ids do not depend on the place.
    before = {path: path.stat() for path in (tmp_path / "cache/index").iterdir()}
    assert read(args)[0].to_pylist() == rows and len(before) == NUM_SHARDS
    assert {path: path.stat() for path in (tmp_path / "cache/index").iterdir()} == before
    elsewhere = read(make_args(tmp_path / "elsewhere", corpus / form))[0]
    assert elsewhere["id"].to_pylist() == [row["id"] for row in rows]


def test_names_do_not_tell_the_place_and_their_order_is_that_of_the_names(tmp_path):
    for name in ("a/en/1.tar", "a/de/1.tar", "a/de/0.tar", "a/de/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    shards = list_shards([str(tmp_path / "a/en"), str(tmp_path / "a/de/*.tar")], tmp_path / "copies")
    assert [(shard.name, shard.in_place) for shard in shards] == [
        ("de/0.tar", True),
        ("de/1.tar", True),
        ("en/1.tar", True),
    ]
    assert [s.name for s in list_shards([str(tmp_path / "a/en/1.tar")], tmp_path)] == ["1.tar"]


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["s3://b/c/x/1.tar", "s3://b/c/y/1.tar"], ["x/1.tar", "y/1.tar"]),
        (["https://h/d/1.tar?sign=a/b", "https://h/d/2.tar?sign=c/d"], ["1.tar", "2.tar"]),
        (["https://h/get.tar?id=1", "https://h/get.tar?id=2"], ["get.tar?id=1", "get.tar?id=2"]),
        (["/d/what?.tar"], ["what?.tar"]),
    ],
)
def test_names_are_without_signatures(urls, names):
    assert _name_shards(urls) == names


def test_streamed_parquet_is_heard_as_the_data_set_is(corpus, tmp_path, caplog):
    """Starts tell of the recording that a clip was cut from; a row without audio is left out, and counted."""
    audio = [{"bytes": (corpus / f"audio/tone{n}.wav").read_bytes(), "path": f"tone{n}.wav"} for n in range(3)]
    rows = dict(audio=[*audio, {"bytes": None, "path": None}], text=list("abcd"), start=[0.0, 0.25, 0.5, 1.0])
    (tmp_path / "clips").mkdir()
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(tmp_path / "clips/train.parquet")
    streamed, skipped, notes = read(make_args(tmp_path, DatasetSource(str(tmp_path / "clips"))))
    whole, _, others = read_manifests([DatasetSource(str(tmp_path / "clips"))], cache_dir=tmp_path / "cache")
    columns = ["start", "num_samples", "text"]
    assert streamed.select(columns).to_pylist() == whole.select(columns).to_pylist() and not skipped
    assert streamed["num_samples"].to_pylist() == [round(SECONDS[n] * 16_000) for n in range(3)]
    (tmp_path / "silent").mkdir()
    table.select([3]).to_parquet(tmp_path / "silent/train.parquet")
    with pytest.raises(UserError, match="has no row with audio: leave it out"):
        read(make_args(tmp_path / "other", DatasetSource(str(tmp_path / "silent"))))
    for warnings in (notes["warnings"], others["warnings"]):
        assert any("1 of 4 rows have no audio and are left out" in line for line in warnings)


@pytest.mark.parametrize("column", [None, "audio"])
def test_a_data_set_is_streamed_by_its_parquet_files(corpus, tmp_path, column):
    """Nothing of it is loaded by `datasets`."""
    rows, crops = open_crops(make_args(tmp_path, DatasetSource(str(corpus / "parquet"), audio_column=column)))
    assert [row["text"] for row in rows] == [f"tone{n}" for n in range(len(SECONDS))]
    np.testing.assert_array_equal(crops.read(rows[5], 0, 5_000), read_pcm(corpus / "audio/tone5.wav", 0, 5_000))
    refusals = {
        "no column 'sound', which --audio_column_name names.*audio": dict(audio_column="sound"),
        "no split 'dev'.*it has train": dict(splits=("train+dev",)),
    }
    for said, changes in refusals.items():
        with pytest.raises(UserError, match=said):
            read(make_args(tmp_path, DatasetSource(str(corpus / "parquet"), **changes)))
    with pytest.raises(UserError, match=r"reads Parquet files, and .*tone.*\.wav is not one"):
        read(make_args(tmp_path, DatasetSource(str(corpus / "audio"))))


def write_bad(folder: Path, name: str) -> None:
    """Files that are no shards, or such without audio."""
    path = folder / name
    if name == "paths.parquet":
        pq.write_table(pa.table({"audio": ["a.wav"], "text": ["a"]}), path)
    elif name == "rowless.parquet":
        pq.write_table(pa.table({"audio": pa.array([], pa.binary())}), path)
    elif name == "zipped.tar":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.wav"))
    elif name == "audioless.tar":
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
    elif name == "noise.tar":
        with webdataset.TarWriter(str(path)) as tar:
            tar.write({"__key__": "a", "wav": b"no audio"})
    else:
        path.write_bytes(b"" if name.startswith("empty") else b"id,audio\n1,a.wav\n" * 100)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text.tar", "tar"), ("empty.tar", "empty"), ("zipped.tar", "compress"), ("audioless.tar", "no audio"),
        ("noise.tar", "no audio could be measured"), ("text.parquet", "cannot be read as a Parquet"), ("empty.parquet", "cannot be read as a Parquet"),
        ("rowless.parquet", "is empty"), ("paths.parquet", "has no column `audio` with the bytes"),
        ("text.csv", "is not a shard"), ("text.tar.gz", "is not a shard"),
    ],
)  # fmt: skip
def test_what_is_no_shard_is_named(tmp_path, name, said):
    write_bad(tmp_path, name)
    with pytest.raises(UserError, match=f"{name}.*{said}") as refused:
        read(make_args(tmp_path / "run", tmp_path / name))
    assert "\n" not in str(refused.value) and "cache" not in str(refused.value)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("memory://corpus/nothing-*.tar", "matches no shard"), ("/nowhere/{0..3}.tar", "does not exist"),
        ("memory://corpus/nothing.tar", "does not exist"), ("gopher://a/b.tar", "gopher"), ("pipe:cat a.tar", "pipe"),
        ("a-{5..2}.tar", "counts backwards"), ("memory://corpus/tar", "twice"),
    ],
)  # fmt: skip
def test_a_pattern_that_names_nothing_usable_is_refused(tmp_path, pattern, said):
    both = [pattern, "memory://corpus/tar/train-00.tar"]
    with pytest.raises(UserError, match=said):
        read(make_args(tmp_path, *both))


def test_a_place_that_does_not_answer_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(UserError, match=f"{url}.*check the address"):
            read(make_args(tmp_path, url))


def test_a_shard_that_fails_is_tried_again_then_named(corpus, hub, tmp_path, monkeypatch):
    rows, crops = open_crops(make_args(tmp_path, place_of("http", corpus, hub, "tar")))
    copy = Path(rows[0]["audio"].rsplit(":", 2)[0])
    expected = crops.read(rows[0], 0, 5_000)
    monkeypatch.setattr(hub, "failures", {"train-00.tar": [503, 0]})  # an error, then a connection that is cut
    copy.unlink()
    np.testing.assert_array_equal(crops.read(rows[0], 0, 5_000), expected)
    assert not hub.failures["train-00.tar"]
    copy.unlink()
    monkeypatch.setattr(hub, "failures", {"train-00.tar": 503})
    with pytest.raises(LocalError, match=f"shard {hub.url}/.*train-00.tar cannot be fetched after 3 tries.*503"):
        crops.read(rows[0], 0, 5_000)
    monkeypatch.setattr(hub, "failures", {})
    monkeypatch.setitem(hub.files, "train-00.tar", hub.files["train-00.tar"] + b"x")
    with pytest.raises(LocalError, match=r"train-00.tar cannot be fetched.*bytes arrived.*changed"):
        crops.read(rows[0], 0, 5_000)
    assert not list(copy.parent.glob("*train-00.tar"))


def test_an_utterance_is_read_though_its_shard_comes_and_goes(corpus, hub, tmp_path, monkeypatch):
    """Another process evicts the copy before it is read, and a third one fetches it again before that is looked at."""
    rows, crops = open_crops(make_args(tmp_path, place_of("http", corpus, hub, "tar")))
    expected, read, tries = crops.read(rows[0], 0, 5_000), CropDataset.read, []

    def read_late(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise AudioError(rows[0]["audio"], "does not exist")
        return read(*arguments)

    monkeypatch.setattr(CropDataset, "read", read_late)
    np.testing.assert_array_equal(crops.read(rows[0], 0, 5_000), expected)
    rows[0]["audio"] = rows[0]["audio"].rsplit(":", 2)[0] + ":0:512"  # no audio
    with pytest.raises(AudioError):
        crops.read(rows[0], 0, 5_000)


@pytest.mark.parametrize(("place", "form"), [("http", "tar"), ("memory", "tar"), ("disk", "parquet")])
def test_a_shard_of_the_same_size_that_was_rewritten_is_named(corpus, hub, tmp_path, monkeypatch, memory, place, form):
    path = corpus / f"{form}/train-00.{form}"
    if place == "disk":
        path = Path(shutil.copy(path, tmp_path))
    pattern = path if place == "disk" else place_of(place, corpus, hub, form)
    rows, crops = open_crops(make_args(tmp_path / "run", pattern))
    Path(rows[0]["audio"].rsplit(":", 2)[0]).unlink()
    expected, content = crops.read(rows[0], 0, 5_000), path.read_bytes()
    Path(rows[0]["audio"].rsplit(":", 2)[0]).unlink()
    if place == "http":
        monkeypatch.setitem(hub.files, "train-00.tar", content[:-1] + b"x")
    elif place == "memory":
        memory.pipe_file("/corpus/tar/train-00.tar", content)
    else:
        os.utime(path, (1, 1))
    with pytest.raises(LocalError, match=r"train-00.* cannot be fetched after 3 tries .*changed since it was listed"):
        crops.read(rows[0], 0, 5_000)
    again, crops = open_crops(make_args(tmp_path / "run", pattern))  # a new start lists it anew
    np.testing.assert_array_equal(crops.read(again[0], 0, 5_000), expected)


def test_what_an_index_lacks_is_said_at_each_start(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for name, path in zip("abc", write_tones(tmp_path / "audio", [1.0, 1.0, 1.0]), strict=True):
            tar.write({"__key__": name, "wav": path.read_bytes() if name != "b" else b"no audio"})
    args, said = make_args(tmp_path / "run", tmp_path / "a.tar"), []
    for _ in range(2):
        _, skipped, notes = read(args)
        assert len(skipped) == 1
        said += [line for line in notes["warnings"] if "could not be read" in line]
    index = next((tmp_path / "run/cache/index").iterdir())
    assert said[0] == said[1] and "1 of 3 utterances could not be read when it was indexed, the first b" in said[0]
    assert said[0].endswith(f"to try again, remove {index}")


def test_the_copies_stay_within_their_room_and_the_oldest_go(corpus, tmp_path, monkeypatch):
    """What is in the folder is counted at every step, also of what is being written; the room of two windows suffices."""
    sizes = sorted(path.stat().st_size for path in (corpus / "tar").iterdir())
    room, held = sum(sizes[-4:]), []
    copied = ShardCache._make_room

    def count(cache, *arguments):
        copied(cache, *arguments)
        held.append(sum(p.stat().st_size for p in cache.folder.iterdir()))

    monkeypatch.setattr(ShardCache, "_make_room", count)
    args = make_args(tmp_path, "memory://corpus/tar", shard_cache_gb=room / 1e9)
    rows, crops = open_crops(args)
    rng = np.random.default_rng(0)
    for number in [*range(len(rows)), *rng.integers(0, len(rows), 40)]:
        crops.read(rows[number], 0, 5_000)
    assert len(held) > NUM_SHARDS + 10 and 0.7 * room < max(held) <= room
    # What was not used for the longest time goes first.
    there, missing = ([s for s in crops.copies.values() if s.is_there is wanted] for wanted in (True, False))
    for shard in there[1:]:
        crops.cache.fetch(shard)
    crops.cache.fetch(missing[0])
    assert not there[0].is_there and there[-1].is_there and missing[0].is_there
    with pytest.raises(UserError, match=r"--shard_cache_gb 0.0001 does not hold 2 windows of shards, 0.00"):
        read(make_args(tmp_path, "memory://corpus/tar", shard_cache_gb=1e-4))


def test_a_cache_that_cannot_be_used_is_named(tmp_path):
    args = make_args(tmp_path / "run", "memory://corpus/tar", shard_cache_dir=str(tmp_path / "file"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="--shard_cache_dir .*file cannot be written or locked"):
        read(args)
    args.shard_cache_dir = None
    read(args)
    index = next((tmp_path / "run/cache/index").iterdir())
    index.write_bytes(index.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{index}, an index of a shard, is damaged: remove it"):
        read(args)


def test_processes_of_a_machine_fetch_a_shard_once(corpus, hub, tmp_path, monkeypatch):
    url = f"{hub.url}/lab/speech/resolve/main/train-00.tar"
    (shard,) = list_shards([url], tmp_path)
    before, started = len(hub.paths), threading.Barrier(4)

    def fetch(_):
        started.wait()
        ShardCache(tmp_path, 10**9, None).fetch(shard)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, range(4)))
    assert len(hub.paths) == before + 1 and Path(shard.path).read_bytes() == hub.files["train-00.tar"]


def test_a_window_is_fetched_before_it_is_heard(corpus, hub, tmp_path):
    """Where a plan is drawn, the next window is on its way, across epochs; an epoch fetches each shard once."""
    args = make_args(tmp_path, place_of("memory", corpus, hub, "parquet"), shuffle_window_shards=1)
    table, _, notes = read(args)
    shards = notes["shards"]
    for shard in shards.list:
        Path(shard.path).unlink(missing_ok=True)
    fetched, copy = [], shards.cache._copy

    def note(shard: Shard):
        fetched.append(shard.name)
        return copy(shard)

    shards.cache._copy = note
    lengths = table["num_samples"].to_numpy()
    order = ShardOrder(shards.num_rows, 1, 5)
    batches = EffectiveBatches(lengths, batch_samples=40_000, crop_samples=40_000, grid_samples=0, seed=5, order=order)
    stream = PlanStream(batches, Cursor(1, 3), range(30), rank=0, num_ranks=1, micro_batch_samples=10**9)
    coming = [
        shards.list[numbers[0]].name for _, (_, numbers) in zip(range(12), order.windows(Cursor(1, 3)), strict=False)
    ]
    for plan in FetchAhead(stream, shards):
        here = next(
            n
            for n, (window, _) in enumerate(order.windows(Cursor(1, 3)))
            if window == order.find_window(plan.following)
        )
        wait_until(lambda here=here: set(coming[: here + 2]) <= set(fetched))
    assert fetched[0] == coming[0] and plan.following.epoch >= 2  # threads may overtake one another
    before, given_up = set(threading.enumerate()), iter(FetchAhead(stream, shards))
    next(given_up)
    assert set(threading.enumerate()) - before
    given_up.close()
    wait_until(lambda: not set(threading.enumerate()) - before)


def wait_until(holds) -> None:
    for _ in range(500):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("waited five seconds")
