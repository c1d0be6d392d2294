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

from w2v2.audio.crops import read_crop
from w2v2.errors import UserError
from w2v2.manifests.dataset_loading import DatasetSource
from w2v2.manifests.manifest import read_manifests

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


def read_saved(folder, columns, **options):
    datasets.Dataset(pa.table(columns)).save_to_disk(folder)
    return read_manifests([DatasetSource(str(folder), **options)], cache_dir=folder / "cache")[0].to_pydict()


def audio_of(corpus):
    return pa.array([{key: row[key] for key in ("bytes", "path")} for row in corpus], datasets.Audio.pa_type)


def test_ids_are_unique_whatever_the_columns_say(corpus, tmp_path):
    audio = audio_of(corpus)
    sentence = read_saved(tmp_path / "1", {"audio": audio, "id": [7, 7, 8, 9, 10]})  # FLEURS: the sentence's
    assert sentence["id"] == [row["path"] for row in corpus]
    own = read_saved(tmp_path / "2", {"audio": audio, "id": [3, 4, 5, 6, 7]}, splits=("train[1:3]", "train[4:]"))
    assert own["id"] == ["4", "5", "7"]
    nameless = pa.array([row["bytes"] for row in corpus])
    assert read_saved(tmp_path / "3", {"audio": nameless}, splits=("train[2:4]",))["id"] == ["train/2", "train/3"]


def test_rows_without_audio_are_left_out_and_counted(corpus, tmp_path, caplog):
    audio = pa.array([None, *audio_of(corpus[1:]).to_pylist()], datasets.Audio.pa_type)
    table = read_saved(tmp_path / "set", {"audio": audio, "text": list("abcde")})
    assert table["text"] == list("bcde") and "1 of 5 rows have no audio" in caplog.text


def test_lengths_come_from_a_column_and_starts_do_not(corpus, tmp_path):
    """GigaSpeech and its like tell where the utterance lay in the recording that it was cut from."""
    seconds = [len(row["samples"]) / 16_000 for row in corpus]
    table = read_saved(tmp_path / "set", {"audio": audio_of(corpus), "begin_time": [100.0] * 5, "duration": seconds})
    assert table["start"] == [0.0] * 5 and table["num_samples"] == [len(row["samples"]) for row in corpus]
    wrong = {"audio": audio_of(corpus), "duration": [9 * length for length in seconds]}
    with pytest.raises(UserError, match="go beyond the end of their files"):
        read_saved(tmp_path / "wrong", wrong)


ARRAYS = pa.array([{"array": [0.1, 0.2], "path": "a.wav", "sampling_rate": 16_000}])


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"audio": ARRAYS}, ["the column audio holds", "not encoded audio", "datasets.Audio"]),
        ({"speech": pa.array([[0.1, 0.2]])}, ["has no column of audio: it has speech", "--audio_column_name"]),
        ({"audio": pa.array([None], datasets.Audio.pa_type)}, ["no row has audio"]),
    ],
)
def test_what_is_no_audio_is_refused(tmp_path, columns, named):
    with pytest.raises(UserError) as raised:
        read_saved(tmp_path / "set", columns)
    assert all(text in str(raised.value) for text in named), raised.value


def test_no_rows_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="is empty: name another split"):
        read_saved(tmp_path / "set", {"audio": audio_of(corpus)}, splits=("train[5:]",))


def test_two_columns_of_audio_need_a_choice(corpus, tmp_path):
    sides = {"left": audio_of(corpus), "right": audio_of(corpus[::-1])}
    kinds = datasets.Features({name: datasets.Audio(decode=False) for name in sides})
    datasets.Dataset(pa.table(sides)).cast(kinds).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="several columns of audio .left, right.*--audio_column_name"):
        read_manifests([DatasetSource(str(tmp_path / "set"))])
    chosen = read_manifests([DatasetSource(str(tmp_path / "set"), audio_column="right")])[0]
    assert chosen["id"].to_pylist() == [row["path"] for row in corpus[::-1]]


def test_broken_files_are_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be loaded.*mend its files") as raised:
        read_manifests([DatasetSource(str(tmp_path))])
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="audiofolder is a format"):
        read_manifests([DatasetSource("audiofolder")])
