"""`w2v2.manifests.archives`: a tar is heard as the folder of its files is; what is wrong with it is counted or named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from w2v2.audio.crops import read_pcm
from w2v2.errors import UserError
from w2v2.manifests import tar_index
from w2v2.manifests.archives import gather_tars
from w2v2.manifests.manifest import read_manifests


def encode(seed, kind="flac"):
    out = io.BytesIO()
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, 16_000 + 800 * seed)
    soundfile.write(out, samples, 16_000, format=kind)
    return out.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, num_shards=3, num_samples=4, **further):
    """WebDataset's own writer; keys begin anew in each shard."""
    sources = {}
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"train-{shard:03d}.tar")) as out:
            for n in range(num_samples):
                seed = num_samples * shard + n
                kind = ("flac", "wav", "mp3")[n % 3]
                sources[f"train-{shard:03d}/{n:05d}"] = encode(seed, kind)
                told = {
                    "txt": f"words {seed}",
                    "cls": seed % 2,
                    "json": {"speaker": f"s{n}", "start": 99, "Language": "sw"},
                }
                out.write({"__key__": f"{n:05d}", kind: sources[f"train-{shard:03d}/{n:05d}"], **told})
    return sources


def lines_of(notes):
    return "\n".join(notes["warnings"])


@pytest.mark.parametrize("spelling", [["train-{000..002}.tar"], ["train-*.tar"], ["train-000.tar", "train-00[12].tar"]])
def test_shards_of_webdataset_are_a_manifest(tmp_path, spelling):
    sources = write_shards(tmp_path)
    names = [str(tmp_path / name) for name in spelling]
    table, skipped, notes = read_manifests(names, cache_dir=tmp_path / "cache", further=["language"])
    assert table["id"].to_pylist() == list(sources) and not skipped and notes["passed_over"] == {}
    for row, content in zip(table.to_pylist(), sources.values(), strict=True):
        (tmp_path / "file").write_bytes(content)
        np.testing.assert_array_equal(read_pcm(row["audio"]), read_pcm(str(tmp_path / "file")))
        assert row["num_samples"] == len(read_pcm(row["audio"])) and row["start"] == 0
        assert row["language"] == "sw"
    assert table["text"].to_pylist() == [f"words {n}" for n in range(12)]
    assert table["label"].to_pylist() == [str(n % 2) for n in range(12)]
    assert table["speaker"].to_pylist() == [f"s{n % 4}" for n in range(12)]


def test_a_tar_is_what_its_files_are(tmp_path):
    """A folder and a tar of it, long names and folders and all, give the same ids, lengths and samples."""
    folder = tmp_path / "corpus"
    for n, name in enumerate(["a.wav", "deep/er/b.FLAC", f"deep/{'long' * 40}.ogg", "é ü.mp3"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(n, Path(name).suffix[1:]))
    (folder / "notes.pdf").write_bytes(b"no audio")
    with tarfile.open(tmp_path / "corpus.tar", "w") as tar:
        tar.add(folder, ".")
    packed, _, notes = read_manifests([tmp_path / "corpus.tar"])
    plain, _, _ = read_manifests([folder])
    assert notes["passed_over"] == {".pdf": 1}
    lengths = [
        dict(zip(table["id"].to_pylist(), table["num_samples"].to_pylist(), strict=True)) for table in (packed, plain)
    ]
    assert lengths[0] == {name.rpartition(".")[0]: length for name, length in lengths[1].items()}


def test_a_duration_in_json_is_believed(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as out:
        out.write(
            {"__key__": "u", "wav": encode(0, "wav"), "json": {"duration": 0.995, "text": "T", "id": "x", "path": "y"}}
        )
    table, _, _ = read_manifests([tmp_path / "a.tar"])
    assert table.to_pylist()[0] | {"audio": ""} == dict(id="u", audio="", start=0.0, num_samples=15_920, text="T")


def test_an_index_is_read_once(tmp_path, monkeypatch):
    write_shards(tmp_path)
    names, cache = [tmp_path / "train-{000..002}.tar"], {"cache_dir": tmp_path / "cache"}
    first, _, _ = read_manifests(names, **cache)
    monkeypatch.setattr(tar_index, "_scan", lambda path: f"{path} was read again")
    again, _, _ = read_manifests(names, **cache)
    assert again.equals(first)
    with open(tmp_path / "train-001.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match="train-001.tar was read again"):
        read_manifests(names, **cache)


def test_audio_is_not_read_for_the_index(tmp_path):
    """A sparse file of 4 GB is indexed as fast as any."""
    member = tarfile.TarInfo("a.wav")
    member.size = 1 << 32
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(member.tobuf())
        file.truncate(512 + member.size + 1024)
    index = tar_index.index_tar(str(tmp_path / "a.tar"))
    assert index.to_pylist() == [dict(id="a", offset=512, size=1 << 32, text=None, label=None, fields=None)]


def test_what_is_passed_over_is_counted(tmp_path):
    members = [("a.wav", encode(0, "wav")), ("a.json", b"{"), ("b.txt", b"no audio"), (".c.wav", b""), ("d.npy", b"")]
    members += [("a.wav", encode(1, "wav")), ("e.left.wav", encode(2, "wav")), ("e.right.wav", encode(3, "wav"))]
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("f.wav", tarfile.SYMTYPE), ("g.wav", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.wav"
            tar.addfile(member)
    table, _, notes = read_manifests([tmp_path / "a.tar"])
    assert table["id"].to_pylist() == ["a", "e.left", "e.right"]
    assert table["num_samples"].to_pylist() == [16_800, 17_600, 18_400]  # the second a.wav
    assert notes["passed_over"] == {"link or special": 2, "hidden": 1, ".npy": 1, ".txt": 1}
    for said in ("same name, of which the last counts", "several audio members of one key", "no JSON object"):
        assert f"{said}" in lines_of(notes)


@pytest.mark.parametrize("place, num_left", [("data", 3), ("header", 3), ("garbage", 3), ("negative", 3), ("end", 4)])
def test_a_tar_that_is_cut_short_is_told(tmp_path, place, num_left):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.wav", encode(n, "wav")) for n in range(4)])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    content = path.read_bytes()
    ends = {"data": last.offset_data + 100, "header": last.offset + 100, "end": last.offset_data + last.size + 512}
    last.size = -512
    wrong = {"garbage": b"\x07" * 512, "negative": last.tobuf(tarfile.GNU_FORMAT)}
    if place in wrong:
        content = content[: last.offset] + wrong[place] + content[last.offset + 512 :]
    path.write_bytes(content[: ends.get(place)])
    table, _, notes = read_manifests([path])
    assert len(table) == num_left and "1 of 1 tars are cut short" in lines_of(notes)


def test_a_whole_tar_is_not_told_to_be_cut(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.wav", encode(0, "wav"))])
    assert read_manifests([tmp_path / "a.tar"])[2]["warnings"] == []


@pytest.mark.parametrize(
    "name, write, reason",
    [
        (
            "a.tar.gz",
            lambda path: write_tar(path, [("a.wav", encode(0))], "w:gz"),
            r"is compressed \(gzip\).*decompress it",
        ),
        ("a.tgz", lambda path: write_tar(path, [("a.wav", encode(0))], "w:gz"), r"is compressed \(gzip\)"),
        ("a.tar", lambda path: write_tar(path, [("a.wav", encode(0))], "w:xz"), r"is compressed \(xz\)"),
        ("a.tar", lambda path: path.write_bytes(b"these are words" * 100), "a.tar is not a tar"),
        ("a.tar", lambda path: path.write_bytes(b""), "a.tar is not a tar"),
        ("a.tar", lambda path: write_tar(path, [("a.npy", b""), ("b.npy", b"")]), r"hold no audio, but 2 \.npy"),
        ("b.tar", lambda path: None, "b.tar does not exist"),
        ("b-*.tar", lambda path: None, "does not exist"),
        ("b-{0..3}.tar", lambda path: (path.parent / "b-0.tar").touch(), r"b-1.tar does not exist"),
        ("b-{3..0}.tar", lambda path: None, "counts backwards"),
    ],
)
def test_what_is_no_tar_of_audio_is_named(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(UserError, match=reason) as caught:
        read_manifests([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_folder_of_tars_says_how_to_name_them(tmp_path):
    write_shards(tmp_path, 1)
    with pytest.raises(UserError, match=r"name its tars as '.*/\*\.tar'"):
        read_manifests([tmp_path])


def test_names_are_spelled_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{kind}-{n:02d}.tar" for kind in "ab" for n in range(8, 12)]
    for name in names:
        Path(name).touch()
    assert gather_tars(["x.csv", "{a,b}-{08..11}.tar"]) == {"x.csv": [], "{a,b}-{08..11}.tar": names}
    assert gather_tars(names[:3]) == {"a-08.tar and 2 more": names[:3]}


def test_tars_stand_beside_other_manifests(tmp_path):
    write_shards(tmp_path, 1, 2)
    soundfile.write(tmp_path / "x.wav", np.zeros(16_000), 16_000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "00000", "audio": "x.wav", "text": "silence"}))
    table, _, _ = read_manifests([tmp_path / "a.jsonl", tmp_path / "train-000.tar"])
    assert table["id"].to_pylist() == ["a/00000", "train-000/00000", "train-000/00001"]
    assert table["text"].to_pylist() == ["silence", "words 0", "words 1"]
