"""Data sets of Hugging Face: every form that `datasets` writes gives the samples, ids and columns that went in."""

import io
import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

from w2v2.data.audio import read_crop
from w2v2.data.dataset_loading import DatasetSource
from w2v2.data.manifest import read_manifests

FORMATS = ["FLAC", "WAV", "OGG", "FLAC", "WAV"]
LABELS = ["sad", "happy"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps its Arrow files in a folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def corpus():
    """Five utterances: bytes, name, text, label, samples as soundfile decodes them."""
    found = []
    for number, form in enumerate(FORMATS):
        samples, file = np.random.default_rng(number).uniform(-0.5, 0.5, 16_000 + 1_600 * number), io.BytesIO()
        soundfile.write(file, samples, 16_000, format=form)
        decoded, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
        name = f"utterance-{number}.{form.lower()}"
        found.append(dict(bytes=file.getvalue(), path=name, text=f"words {number}", label=number % 2, samples=decoded))
    return found


def as_dataset(corpus):
    rows = [{"audio": {key: row[key] for key in ("bytes", "path")}, "sentence": row["text"], "mood": row["label"]}
            for row in corpus]  # fmt: skip
    features = datasets.Features(
        audio=datasets.Audio(decode=False), sentence=datasets.Value("string"), mood=datasets.ClassLabel(names=LABELS)
    )
    table = pa.Table.from_pylist(rows, schema=datasets.Features(features).arrow_schema)
    return datasets.Dataset(table.replace_schema_metadata(None)).cast(features)


def write_disk(corpus, folder):
    as_dataset(corpus).save_to_disk(folder, num_shards=2)


def write_disk_dict(corpus, folder):
    whole = as_dataset(corpus)
    datasets.DatasetDict(train=whole, dev=whole.select([0])).save_to_disk(folder)


def write_filtered(corpus, folder):
    twice = datasets.concatenate_datasets([as_dataset(corpus)] * 2)
    twice.select(range(len(corpus) - 1, -1, -1)).select(range(len(corpus) - 1, -1, -1)).save_to_disk(folder)


def write_parquet(corpus, folder):
    whole = as_dataset(corpus)
    for shard in range(2):
        whole.shard(2, shard, contiguous=True).to_parquet(folder / f"data/train-{shard:05}-of-00002.parquet")


def write_plain_parquet(corpus, folder):
    """As a tool without `datasets` would: no features in the schema."""
    folder.mkdir()
    rows = [{"audio": {key: row[key] for key in ("bytes", "path")}, "sentence": row["text"]} for row in corpus]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=2)


def write_audiofolder(corpus, folder):
    (folder / "train").mkdir(parents=True)
    lines = []
    for row in corpus:
        (folder / "train" / row["path"]).write_bytes(row["bytes"])
        lines.append(json.dumps({"file_name": row["path"], "sentence": row["text"]}) + "\n")
    (folder / "train/metadata.jsonl").write_text("".join(lines))


def write_paths(corpus, folder):
    """A column of paths, from files beside it."""
    folder.mkdir()
    for row in corpus:
        (folder / row["path"]).write_bytes(row["bytes"])
    rows = {"audio": [row["path"] for row in corpus], "sentence": [row["text"] for row in corpus]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)


def write_compressed(corpus, folder):
    """Its Arrow file rewritten with compressed buffers, whose bytes have no address."""
    as_dataset(corpus).save_to_disk(folder)
    path = next(folder.glob("*.arrow"))
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
        with pa.OSFile(f"{path}.new", "wb") as new:
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_stream(new, table.schema, options=options) as stream:
                stream.write_table(table)
    shutil.move(f"{path}.new", path)


FORMS = [write_disk, write_disk_dict, write_filtered, write_parquet, write_plain_parquet, write_audiofolder,
         write_paths, write_compressed]  # fmt: skip


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_utterances(corpus, tmp_path, write):
    write(corpus, tmp_path / "set")
    table, skipped, _ = read_manifests([DatasetSource(str(tmp_path / "set"))], cache_dir=tmp_path / "cache")
    assert table["id"].to_pylist() == [row["path"] for row in corpus] and not skipped
    assert table["text"].to_pylist() == [row["text"] for row in corpus]
    assert table["num_samples"].to_pylist() == [len(row["samples"]) for row in corpus]
    for audio, row in zip(table["audio"].to_pylist(), corpus, strict=True):
        np.testing.assert_allclose(read_crop(audio), row["samples"], atol=1e-6)  # Vorbis: two decoders
