"""Data sets on the Hub: read through the stand-in, and refused in one line where they cannot be."""

import io
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from hub_stand_in import SHA
from huggingface_hub import HfFileSystem

from w2v2.audio.crops import read_crop
from w2v2.data.shards import read_shards
from w2v2.errors import UserError
from w2v2.manifests.dataset_loading import DatasetSource
from w2v2.manifests.manifest import read_manifests

NAME = "speech-lab/tones"


def encode(number):
    file = io.BytesIO()
    soundfile.write(file, [0.1 * number, -0.2] * (8_000 + number), 16_000, format="FLAC")
    return file.getvalue()


def write_parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def make_rows(first, last):
    return [{"audio": {"bytes": encode(n), "path": f"{n}.flac"}, "sentence": f"word {n}"} for n in range(first, last)]


@pytest.fixture
def hub(hub, monkeypatch, tmp_path):
    """With a data set of two configurations; what `datasets` read of its environment when it was loaded follows."""
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"), raising=False
    )
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: {config}/{split}.parquet\n" for split in ("train", "validation"))
        for config in ("english", "swahili")) + "---\n"  # fmt: skip
    files = {"README.md": card.encode()}
    for number, config in enumerate(("english", "swahili")):
        files[f"{config}/train.parquet"] = write_parquet(make_rows(10 * number, 10 * number + 3))
        files[f"{config}/validation.parquet"] = write_parquet(make_rows(10 * number + 3, 10 * number + 5))
    hub.datasets[NAME] = files
    return hub


def read(name=NAME, config="swahili", splits=("train",), **columns):
    return read_manifests([DatasetSource(name, config, tuple(splits), **columns)])


def test_a_configuration_is_read_from_the_hub(hub):
    table, skipped, _ = read(splits=["train", "validation[1:]"])
    numbers = [10, 11, 12, 14]
    assert table["id"].to_pylist() == [f"{n}.flac" for n in numbers] and not skipped
    assert table["text"].to_pylist() == [f"word {n}" for n in numbers]
    for audio, number in zip(table["audio"].to_pylist(), numbers, strict=True):
        samples, _ = soundfile.read(io.BytesIO(encode(number)), dtype="float32")
        assert read_crop(audio).tolist() == samples.tolist()


def test_an_audiofolder_is_read_from_the_hub(hub):
    files = {f"train/{folder}/same.flac": encode(number) for number, folder in enumerate("ab")}
    lines = "".join(f'{{"file_name": "{folder}/same.flac", "sentence": "{folder}"}}\n' for folder in "ab")
    hub.datasets["speech-lab/folder"] = files | {"train/metadata.jsonl": lines.encode()}
    table, _, _ = read("speech-lab/folder", config=None)
    assert table["id"].to_pylist() == ["a/same.flac", "b/same.flac"] and table["text"].to_pylist() == ["a", "b"]
    assert table["num_samples"].to_pylist() == [16_000, 16_002]


def test_splits_are_streamed_from_the_hub(hub, tmp_path):
    """Their Parquet files are copied one by one; `datasets` loads nothing."""
    HfFileSystem.clear_instance_cache()
    args = SimpleNamespace(
        output_dir=str(tmp_path / "run"), shuffle_window_shards=1, shard_cache_gb=None, batch_hours=1e-6
    )
    args.shard_cache_dir = str(tmp_path / "copies")
    table, skipped, notes = read_shards([DatasetSource(NAME, "swahili", ("train", "validation"))], args)
    for shard in notes["shards"].list:  # indexing may have evicted one
        notes["shards"].cache.fetch(shard)
    numbers = [10, 11, 12, 13, 14]
    assert table["text"].to_pylist() == [f"word {n}" for n in numbers] and not skipped
    assert table["id"].to_pylist()[0] == "train.parquet/10.flac" and len(notes["shards"].list) == 2
    assert notes["shards"].list[0].url == f"hf://datasets/{NAME}@{SHA}/swahili/train.parquet"
    for audio, number in zip(table["audio"].to_pylist(), numbers, strict=True):
        samples, _ = soundfile.read(io.BytesIO(encode(number)), dtype="float32")
        assert read_crop(audio).tolist() == samples.tolist()
    assert not list((tmp_path / "datasets_cache").rglob("*.arrow"))
    with pytest.raises(UserError, match=r"has no split 'trian': did you mean train\?"):
        read_shards([DatasetSource(NAME, "swahili", ("trian",))], args)


def test_what_was_loaded_once_needs_no_hub(hub, monkeypatch):
    before = read()[0]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    asked = len(hub.paths)
    assert read()[0].equals(before) and len(hub.paths) == asked


GATED = (403, "GatedRepo", "Access to dataset is restricted")
NO_TOKEN = (401, "GatedRepo", "Access to dataset is restricted and you are not authenticated")
BAD_TOKEN = (401, "", "Invalid credentials in Authorization header")


@pytest.mark.parametrize(
    ("asked", "refusal", "named"),
    [
        (dict(name="speech-lab/tonse"), None, ["did you mean speech-lab/tones?", "hf auth login"]),
        (dict(name="nobody/nothing"), None, ["nobody/nothing: is neither a folder", "hf auth login"]),
        (dict(), GATED, ["is gated", f"/datasets/{NAME}", "hf auth login"]),
        (dict(), NO_TOKEN, ["is gated", f"/datasets/{NAME}", "hf auth login"]),
        (dict(), BAD_TOKEN, ["does not accept your token", "hf auth login"]),
        (dict(config="swahile"), None, ["--dataset_config_name swahile", "did you mean swahili?", "english"]),
        (dict(config=None), None, ["--dataset_config_name", "by --dataset_config_name: english, swahili\n"]),
        (dict(splits=["trian"]), None, ["no split 'trian'", "did you mean train?", "validation"]),
        (dict(splits=["train[a:]"]), None, ["train[a:]", "does not parse", "train[:10%]"]),
        (dict(audio_column="adio"), None, ["no column 'adio'", "--audio_column_name", "did you mean audio?"]),
        (dict(text_column="text"), None, ["no column 'text'", "--text_column_name", "audio, sentence"]),
        (dict(audio_column="sentence"), None, ["no audio file could be measured", "word 10"]),
    ],
)
def test_slips_are_one_line(hub, asked, refusal, named):
    if refusal:
        hub.refusals[NAME] = refusal
    with pytest.raises(UserError) as raised:
        read(**asked)
    assert "\n" not in str(raised.value) and all(text in f"{raised.value}\n" for text in named), raised.value


def test_a_hub_that_is_away_is_said(hub, monkeypatch):
    hub.server_close()
    hub.shutdown()
    with pytest.raises(UserError, match="cannot be reached.*HF_HUB_OFFLINE=1.*local folder"):
        read()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        read()


def test_scripts_are_refused(hub):
    hub.datasets[NAME] = {"README.md": b"", "tones.py": b"raise SystemExit('run')"}
    with pytest.raises(UserError, match="no script is run.*trust_remote_code"):
        read(config=None)
