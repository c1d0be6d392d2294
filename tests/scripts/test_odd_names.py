"""Ids and paths that strain a format: what goes in comes out again, line for line, in every manifest and every list
that is written.
"""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pack_audio
import prepare_folder
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
from accelerate import Accelerator
from conftest import refusal, write_csv

import pretrain
from w2v2.audio.crops import read_pcm
from w2v2.data.utterances import load_manifest
from w2v2.errors import printable
from w2v2.finetune.ctc_data import log_skipped, read_skipped
from w2v2.train.records import SkippedAudio

NAMES = [
    "a b.wav",
    " leading and trailing .wav",
    'it\'s "quoted".wav',
    'only "".wav',
    "comma, semicolon; and | pipe.wav",
    "tab\there.wav",
    "line\nbreak.wav",
    "return\rhere.wav",
    "both\r\nhere.wav",
    "Ünïcödé 語 العربية.wav",
    "emoji 🎤👩‍🚀.wav",
    "no\u00a0break, line\u2028separator, next\u0085line.wav",
    "-rf.wav",
    "--output_dir=x.wav",
    "back\\slash\\n.wav",
    "dollar $HOME ${HOME} $(id) `id` %s {x} {0}.wav",
    "~user.wav",
    "escape\x1b[31mred\x07.wav",
    "hash#8+5.wav",
    "file:name?x=1&y=2.wav",
    "null.wav",
    "1e5.wav",
    "2020-01-01.wav",
    "up/../down.wav",
    "long/" + "/".join(["x" * 200] * 8) + ".wav",
]
IN_LINES = [name for name in NAMES if not set("\n\r") & set(name)]  # a line of a text file can hold them
IN_TSV = [name for name in IN_LINES if "\t" not in name]


def length_of(name: str) -> int:
    return 8_000 + 100 * NAMES.index(name)  # tells the files apart


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of its own length under each name."""
    folder = tmp_path_factory.mktemp("odd names, 'quoted' ü")
    (folder / "up").mkdir()
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        samples = np.random.default_rng(len(name)).standard_normal(length_of(name)) * 0.1
        with open(folder / name, "wb") as file:  # libsndfile knows names of 1,024 bytes at most
            soundfile.write(file, samples.clip(-1, 1), 16_000, format="WAV")
    return folder


def rows(names):
    """The id is the name itself, between marks: the ends of an id are trimmed."""
    return [{"id": f"<{name}>", "audio": name, "text": f"«{name}»", "speaker": f"s{name}s"} for name in names]


def write_delimited(path, content, dialect):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, content[0], lineterminator="\n", **dialect)
        writer.writeheader()
        writer.writerows(content)


def write_manifest(path: Path, names: list[str]) -> Path:
    content = rows(names)
    if path.suffix == ".csv":
        write_delimited(path, [row | {"audio": f"./{row['audio']}"} for row in content], dict(quoting=csv.QUOTE_ALL))
    elif path.suffix == ".tsv":
        write_delimited(path, content, dict(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        lines = (json.dumps(row, ensure_ascii="escaped" in path.name) + "\n" for row in content)
        path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["a.csv", "a.tsv", "a.json", "a.jsonl", "escaped.jsonl", "a.parquet"])
def test_a_manifest_gives_back_ids_texts_and_files(corpus, kind):
    names = IN_TSV if kind.endswith("tsv") else NAMES
    table, skipped = load_manifest([str(write_manifest(corpus / kind, names))])
    assert skipped == []
    for column in ("id", "text", "speaker"):
        assert table[column][:] == [row[column] for row in rows(names)]
    assert table["num_samples"][:] == [length_of(name) for name in names]
    assert all(len(read_pcm(audio)) == length_of(name) for audio, name in zip(table["audio"], names, strict=True))


def test_without_ids_the_path_serves(corpus):
    path = corpus / "without.jsonl"
    path.write_text("".join(json.dumps({"audio": name, "text": ""}) + "\n" for name in NAMES))
    table, skipped = load_manifest([str(path)])
    assert (table["id"][:], skipped) == (NAMES, [])


def test_kaldi_and_fairseq_files_hold_whatever_a_line_can(corpus, tmp_path):
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    names = [name for name in IN_LINES if name == name.strip()]
    lines = [f"utt\u00a0{number}-ü🎤 \t {corpus / name}\n" for number, name in enumerate(names)]
    (kaldi / "wav.scp").write_text("".join(lines), encoding="utf-8")
    table, skipped = load_manifest([str(kaldi)])
    assert (table["id"][:], skipped) == ([f"utt\u00a0{number}-ü🎤" for number in range(len(names))], [])
    assert table["num_samples"][:] == [length_of(name) for name in names]

    fairseq = tmp_path / "train.tsv"
    fairseq.write_text("".join([f"{corpus}\n", *(f"{name}\t{length_of(name)}\n" for name in IN_TSV)]), encoding="utf-8")
    table, _ = load_manifest([str(fairseq)])
    assert [len(read_pcm(audio)) for audio in table["audio"]] == [length_of(name) for name in IN_TSV]


def test_a_folder_is_read_whatever_its_files_are_named(corpus, tmp_path):
    inside, outside = corpus / "inside.csv", tmp_path / "elsewhere.csv"
    for source in (inside, outside):
        assert prepare_folder.main([str(corpus), "--output", str(source)]) == 0
    for source in (corpus, inside, outside):
        table, skipped = load_manifest([str(source)])
        assert skipped == [] and len(set(table["id"])) == len(NAMES)
        lengths = dict(zip(map(os.path.realpath, table["audio"]), table["num_samples"], strict=True))
        assert lengths == {os.path.realpath(corpus / name): length_of(name) for name in NAMES}


def test_a_name_that_is_no_text_is_refused(tmp_path, capsys):
    good, odd = tmp_path / "audio" / "good.wav", os.fsencode(tmp_path / "audio") + b"/caf\xe9.wav"
    good.parent.mkdir()
    for path in (good, odd):
        soundfile.write(path, np.full(16_000, 0.1), 16_000, format="WAV")
    assert prepare_folder.main([str(good.parent), "--output", str(tmp_path / "a.csv")]) == 0
    [line] = (tmp_path / "a.skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["audio"] == os.fsdecode(odd) and "UTF-8" in json.loads(line)["reason"]
    assert load_manifest([str(tmp_path / "a.csv")])[0]["audio"][:] == [str(tmp_path / "audio/good.wav")]
    argv = f"--train_data={good.parent}", f"--output_dir={tmp_path / 'run'}", "--use_cpu"
    refusal(capsys, pretrain.main, *argv, named=("\\udce9.wav", "rename it"))


def test_packed_audio_keeps_ids_order_and_samples(corpus, tmp_path):
    manifest = write_manifest(corpus / "pack.jsonl", NAMES)
    folder = tmp_path / "packed, \n 'here'"
    assert pack_audio.main([str(manifest), "--output_dir", str(folder), "--num_workers", "1"]) == 0
    table, _ = load_manifest([str(folder)])
    assert table["id"][:] == [f"<{name}>" for name in NAMES] and table["text"][:] == [f"«{name}»" for name in NAMES]
    for row, name in zip(table, NAMES, strict=True):
        samples = read_pcm(row["audio"], round(row["start"] * 16_000), row["num_samples"])
        np.testing.assert_array_equal(samples, read_pcm(str(corpus / name)))


def test_packing_lists_what_it_cannot_read_a_line_each(tmp_path, capsys):
    soundfile.write(tmp_path / "good.wav", np.full(16_000, 0.1), 16_000)
    content = [{"id": f"<{name}>", "audio": f"/gone/{name}", "duration": 1.0} for name in NAMES]
    content.append({"id": "good", "audio": "good.wav", "duration": 1.0})
    manifest = tmp_path / "a.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in content))
    flags = ["--output_dir", str(tmp_path / "packed"), "--max_skipped_fraction", "1"]
    assert pack_audio.main([str(manifest), *flags]) == 0
    with open(tmp_path / "packed" / "skipped_audio.jsonl", encoding="utf-8") as file:
        listed = list(map(json.loads, file))
    expected = [(row["id"], os.path.normpath(row["audio"])) for row in content[:-1]]
    assert [(entry["id"], entry["audio"]) for entry in listed] == expected
    shown = [line for line in capsys.readouterr().err.split("\n") if "/gone/" in line]
    assert len(shown) == 5 and all(line.isprintable() for line in shown)


ENTRIES = [{"id": f"<{name}>", "audio": f"/audio/{name}", "reason": "does not exist"} for name in NAMES]


def test_a_runs_list_of_skipped_files_survives_a_resumption(tmp_path):
    args, accelerator = SimpleNamespace(output_dir=tmp_path, max_skipped_fraction=1.0), Accelerator(cpu=True)
    first = SkippedAudio(args, accelerator, 1_000, [])
    first.add(ENTRIES[:20], step=3)
    first.add(ENTRIES[20:], step=9)
    with open(tmp_path / "skipped_audio.jsonl", "ab") as file:
        file.write('{"id": "ü'.encode()[:-1])  # a kill in the middle of a character
    again = SkippedAudio(args, accelerator, 1_000, [], first_step=5)
    assert again.ids == {entry["id"] for entry in ENTRIES[:20]}
    again.add(ENTRIES, step=6)
    with open(tmp_path / "skipped_audio.jsonl", encoding="utf-8") as file:
        assert [line | {"step": None} for line in map(json.loads, file)] == [e | {"step": None} for e in ENTRIES]


def test_fine_tunings_list_of_skipped_files(tmp_path):
    log_skipped(tmp_path / "skipped_audio.jsonl", ENTRIES)
    with open(tmp_path / "skipped_audio.jsonl", "a") as file:
        file.write('{"id": "cut short by a full di\n')
    log_skipped(tmp_path / "skipped_audio.jsonl", ENTRIES)
    assert list(read_skipped(tmp_path / "skipped_audio.jsonl").values()) == ENTRIES


def refuse(tmp_path, capsys, manifest):
    """The one line by which pretraining on this manifest is refused."""
    (tmp_path / "a.jsonl").write_text(manifest)
    flags = f"--train_data={tmp_path / 'a.jsonl'}", f"--output_dir={tmp_path / 'run'}", "--report_to=none", "--use_cpu"
    return refusal(capsys, pretrain.main, *flags)


@pytest.mark.parametrize("name", ["line\nbreak.wav", "escape\x1b[31mred\x07.wav", "a\u2028b.wav", "null\0.wav"])
@pytest.mark.parametrize("measured", [True, False])
def test_an_odd_name_gives_one_line_without_codes(tmp_path, capsys, name, measured):
    row = {"audio": f"/gone/{name}"} | ({} if measured else {"duration": 3.0})
    line = refuse(tmp_path, capsys, json.dumps(row) + "\n")
    assert line.isprintable() and printable(name) in line


def test_only_the_markers_of_the_data_root_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    monkeypatch.setenv("data_root", "/from/the/environment")
    names = ["$HOME/a.wav", "${HOME}/b.wav", "~/c.wav", "$(pwd)/d.wav", "`pwd`/e.wav", "%HOME%/f.wav", "{HOME}/g.wav"]
    marked = ["$data_root/h.wav", "${data_root}/i.wav", "{data_root}/j.wav"]
    manifest = write_csv(tmp_path / "a.csv", [*names, *marked], [1.0] * 10)
    table, _ = load_manifest([str(manifest)], data_root=str(tmp_path))
    assert table["audio"][:] == [f"{tmp_path}/{name}" for name in [*names, "h.wav", "i.wav", "j.wav"]]


STRAINS = {
    "surrogate": '{"audio": "\\ud800.wav", "duration": 1}',
    "deep": '{"audio": "a.wav", "duration": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"audio": "a.wav", "duration": ' + "9" * 5_000 + "}",
    "1e400": '{"audio": "a.wav", "duration": 1e400}',
    "1e300": '{"audio": "a.wav", "duration": 1e300}',
    "start": '{"audio": "a.wav", "duration": 1, "start": 1e18}',
    "2**63": '{"audio": "a.wav", "num_samples": 9223372036854775808}',
}


@pytest.mark.parametrize("content", STRAINS.values(), ids=STRAINS)
@pytest.mark.parametrize("first", ["", '{"audio": "b.wav", "duration": 1}\n'], ids=["first", "later"])
def test_a_manifest_that_strains_its_reader_is_one_line(tmp_path, capsys, content, first):
    line = refuse(tmp_path, capsys, first + content + "\n")
    assert "a.jsonl" in line and len(line) < 500
