"""A sources file: what it may say, and one table of all sources, as their manifests give it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import write_csv, write_tones
from datasets import Audio, Dataset, DatasetDict
from test_utterances import load

from w2v2.data.batching import crop_length
from w2v2.errors import UserError
from w2v2.manifests.dataset_loading import DatasetSource
from w2v2.manifests.manifest import read_manifests
from w2v2.manifests.sources import is_sources_file, parse_sources, read_sources

SECOND = 16_000


def write(folder, text, name="mixed.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def write_corpora(folder, weights=("", "")):
    """Two corpora with different columns, one over two manifests, and their sources file."""
    rng = np.random.default_rng(0)
    for name, size in (("en/train", 40), ("en/more", 9), ("sw/train", 6)):
        path = folder / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        write_csv(path, [f"/{name}/{n}.wav" for n in range(size)], rng.uniform(1, 12, size).round(3).tolist())
    lines = (folder / "sw/train.csv").read_text().splitlines()
    rows = [lines[0] + ",text,channel", *(f"{line},maneno,{n % 2}" for n, line in enumerate(lines[1:]))]
    (folder / "sw/train.csv").write_text("\n".join(rows))
    english = f"- {{name: english, data: [en/train.csv, en/more.csv], language: en{weights[0]}}}\n"
    return write(folder, english + f"- {{name: swahili, data: sw/train.csv, language: sw{weights[1]}}}\n")


def test_keys_are_read_as_they_are_written(tmp_path):
    path = write(tmp_path, """
# a comment
- data: corpora/no.csv
  language: no  # Norwegian, and no truth value
- name: 007
  data: [a, ~/b.csv, /c]
  data_root: audio
  language: "yes"
  weight: 1e-9
""")  # fmt: skip
    first, second = parse_sources(path)
    assert (first.name, first.language, first.weight, first.data_root) == ("no", "no", 1.0, None)
    assert first.data == [f"{tmp_path}/corpora/no.csv"]
    assert (second.name, second.language, second.weight) == ("007", "yes", 1e-9)
    assert second.data == [f"{tmp_path}/a", str(Path.home() / "b.csv"), "/c"]
    assert second.data_root == f"{tmp_path}/audio"


SLIPS = {
    "": "mixed.yaml: a sources file is a list: write an entry `- data: manifest.csv`",
    "data: a.csv": "a sources file is a list",
    "- a.csv": "line 1: a source is given by keys, found 'a.csv'",
    "- {data: a": "not valid YAML",
    "- name: a": "line 1: the source has no data",
    "- dataset_config_name: sw": "line 1: the source has no data",
    "- data: a\n  dataset_name: b": "line 2: dataset_name does not go with data",
    "- data: a\n  audio_column_name: b": "line 2: audio_column_name does not go with data",
    "- dataset_name: a\n  data_root: b": "line 2: data_root does not go with dataset_name",
    "- dataset_name: a/b\n- dataset_name: a/b\n  name: c": "two sources have the data a/b [train]: name them once",
    "- data: a\n  nam: b": "line 2: unknown key 'nam': did you mean name?",
    "- data: a\n  sampling: b": "line 2: unknown key 'sampling': a source has name, ",
    "- data: a\n  name: a\n  data: b": "line 3: data comes twice in one source: begin each source with `- `",
    "- data:": "data takes one value, or a list of them",
    "- data: []": "data takes one value, or a list",
    "- data: [a, [b]]": "data takes one value, or a list",
    "- data: a\n  name: [b]": "name takes one value",
    "- data: a\n  language:": "language takes one value: give it that, or leave the key out",
    "- data: a\n  weight: twice": "line 2: weight is twice: it has to be a number, 0 or more",
    "- data: a\n  weight: -1": "weight is -1: it has to be a number, 0 or more",
    "- data: a\n  weight: .nan": "weight is .nan: it has to be a number",
    "- data: a\n  weight: .inf": "weight is .inf: it has to be a number",
    "- data: a\n  weight: inf": "weight is inf: it has to be a number, 1e+15 or less",
    "- data: a\n  weight: 0\n- data: b\n  weight: 0": "all weights are 0, so nothing would be heard: raise one",
    "- data: en/train.csv\n- data: sw/train.csv": "two sources have the name 'train': give each source a `name`",
    "- data: a\n- data: [b, ./a]\n": "/a: name them once, and change a share by `weight`",
    "- data: a\n  language: en\n- data: b": "source b has no language, others have: give every source one, or none",
    "- data: a\n  name: en/us": "the name 'en/us' holds a slash",
}


@pytest.mark.parametrize("text", SLIPS)
def test_a_slip_in_the_file_is_named(tmp_path, text):
    with pytest.raises(UserError) as refused:
        parse_sources(write(tmp_path, text))
    assert SLIPS[text] in str(refused.value) and str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"- data: \xff\xfe")
    for name, message in (("binary.yaml", "not valid YAML"), ("absent.yaml", "does not exist")):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            parse_sources(tmp_path / name)


def test_a_sources_file_stands_alone():
    assert is_sources_file(["a.yaml"]) and is_sources_file(["a.YML"]) and not is_sources_file(["a.csv", "b"])
    with pytest.raises(UserError, match=r"a\.yaml is a sources file and has to stand alone"):
        is_sources_file(["b.csv", "a.yaml"])


def test_the_table_is_the_sources_one_after_another(tmp_path):
    path = write_corpora(tmp_path)
    table, skipped, notes = read_sources(str(path))
    parts = {source.name: read_manifests(source.data)[0] for source in notes["sources"]}
    assert list(parts) == ["english", "swahili"]
    expected = [row | {"id": f"{name}/{row['id']}"} for name, part in parts.items() for row in part.to_pylist()]
    assert table.select(["id", "audio", "start", "num_samples"]).to_pylist() == [
        {name: row[name] for name in ("id", "audio", "start", "num_samples")} for row in expected
    ]
    assert table["text"].to_pylist() == [""] * 49 + ["maneno"] * 6
    assert table["channel"].to_pylist() == [None] * 49 + [0, 1] * 3
    assert not skipped and len(set(table["id"].to_pylist())) == 55
    assert {name: len(rows) for name, rows in notes["samples"].items()} == {"english": 49, "swahili": 6}


def test_audio_of_two_sources_is_told(tmp_path):
    for name in "xy":
        write_csv(tmp_path / f"{name}.csv", ["/a.wav"], [1.0])
    notes = read_sources(str(write(tmp_path, "- data: x.csv\n- data: y.csv\n")))[2]
    assert any("1 rows name audio that another manifest or source names too" in line for line in notes["warnings"])


def test_what_is_left_of_each_source_is_counted(tmp_path):
    found = load(write_corpora(tmp_path), min_seconds=3.0, crop_seconds=8.0)
    first = 0
    for source in found.sources:
        own = np.array([row["num_samples"] for row in read_manifests(source.data)[0].to_pylist()])
        lost, own = own[own < 3 * SECOND], own[own >= 3 * SECOND]
        rows = slice(first, first := first + len(own))
        assert found.num_samples[rows].tolist() == own.tolist()
        assert all(name.startswith(f"{source.name}/") for name in found.table[rows]["id"])
        heard = int(crop_length(own, 8 * SECOND, round(0.32 * SECOND)).sum())
        assert (source.num_utterances, source.num_samples, source.heard_samples) == (len(own), own.sum(), heard)
        assert source.summarize()["dropped_hours"] == pytest.approx(lost.sum() / SECOND / 3600)
    assert (
        first == len(found.table) and sum(source.summarize()["dropped"] for source in found.sources) == 55 - first > 0
    )


def test_a_source_of_which_nothing_is_left_is_named(tmp_path):
    path = write_corpora(tmp_path)
    write_csv(tmp_path / "sw/train.csv", ["/a.wav", "/b.wav"], [1.25, 2.5])
    with pytest.raises(UserError, match=r"source swahili: none of its 2 utterances \(1\.25 to 2\.50 s\) has a fitting"):
        load(path, min_seconds=3.0)


def test_a_source_without_weight_is_not_read(tmp_path):
    path = write_corpora(tmp_path, weights=(", weight: 0", ""))
    for manifest in (tmp_path / "en").iterdir():
        manifest.unlink()
    found = load(path)
    assert [source.name for source in found.sources] == ["swahili"]
    assert f"{path}: source english has weight 0: it is not heard" in found.warnings


def test_a_file_that_cannot_be_measured_is_skipped_by_its_sources_name(tmp_path):
    soundfile.write(tmp_path / "good.wav", np.zeros(3 * SECOND), SECOND)
    (tmp_path / "bad.wav").write_text("only words")
    write_csv(tmp_path / "some.csv", ["good.wav", "bad.wav"])
    table, skipped, notes = read_sources(str(write(tmp_path, "- {name: one, data: some.csv}")))
    assert table["id"].to_pylist() == ["one/good.wav"] and [row["id"] for row in skipped] == ["one/bad.wav"]
    assert notes["sources"][0].num_unreadable == 1


def test_data_sets_are_sources_as_manifests_are(tmp_path):
    """A folder that `datasets` wrote, two of its splits, beside the same audio in a manifest."""
    paths = write_tones(tmp_path / "audio", [2.5, 3.0, 3.5])
    write_csv(tmp_path / "some.csv", paths)
    rows = [{"sound": str(path), "sentence": "la"} for path in paths]
    parts = {name: Dataset.from_list(some) for name, some in (("train", rows[:2]), ("more", rows[2:]))}
    parts = DatasetDict({name: part.cast_column("sound", Audio(decode=False)) for name, part in parts.items()})
    parts.save_to_disk(tmp_path / "saved")
    entry = "- {dataset_name: saved, dataset_split_names: [train, more], audio_column_name: sound, weight: 0.5}\n"
    table, skipped, notes = read_sources(str(write(tmp_path, entry + "- data: some.csv")), cache_dir=tmp_path / "cache")
    assert [source.name for source in notes["sources"]] == ["saved", "some"] and not skipped
    assert table["num_samples"].to_pylist() == [40_000, 48_000, 56_000] * 2
    assert all(name.startswith("saved/") for name in table["id"].to_pylist()[:3])
    hub = parse_sources(
        write(tmp_path, "- {dataset_name: org/voices, dataset_config_name: sw, dataset_split_names: a}")
    )
    assert hub[0].name == "voices-sw" and hub[0].data == [DatasetSource("org/voices", "sw", ("a",))]


def test_each_source_may_have_its_own_data_root(tmp_path):
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv", ["x.wav"], [3.0])
        (tmp_path / f"{name}_audio").mkdir()
    path = write(tmp_path, "- {data: a.csv, data_root: a_audio}\n- {data: b.csv}")
    table, _, _ = read_sources(str(path), data_root=str(tmp_path / "b_audio"))
    assert table["audio"].to_pylist() == [f"{tmp_path}/a_audio/x.wav", f"{tmp_path}/b_audio/x.wav"]


def test_the_table_is_mapped_and_not_held_in_memory(tmp_path):
    size = 20_000
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv", [f"{n}.wav" for n in range(size)], [3 + n / 1e4 for n in range(size)])
    before = pa.total_allocated_bytes()
    found = load(write(tmp_path, "- data: a.csv\n- data: b.csv"))
    assert len(found.table) == 2 * size and pa.total_allocated_bytes() - before < 2 * size
    assert found.table.column_names == ["id", "audio", "start", "num_samples"]


def test_the_file_that_is_shipped_can_be_copied():
    sources = parse_sources(Path(__file__).parents[2] / "configs/data/mixed.yaml")
    assert [(source.name, source.language, source.weight) for source in sources] == [
        ("librispeech", "en", 1.0), ("audiobooks", "en", 1.0), ("swahili", "sw", 2.0),
        ("fleurs-amharic", "am", 1.0),
    ]  # fmt: skip
    assert sources[2].data_root.endswith("data/swahili/audio")
