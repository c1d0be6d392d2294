"""`w2v2.manifests.manifest` and `readers`: every kind of manifest gives the same table, lengths are known, and slips are
named in one line.
"""

import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile

from w2v2.audio.crops import AudioError, measure_length
from w2v2.data.utterances import load_manifest
from w2v2.errors import UserError
from w2v2.manifests.manifest import read_manifests

LENGTHS = {"a b.wav": 24_000, "deep/é 'q\".flac": 16_001}


def measure_nothing(path):
    raise AudioError(path, "is not measured, for its length is known")


def load(*paths, measure=measure_nothing, **options):
    data, skipped = load_manifest(paths, measure=measure, **options)
    assert skipped == []
    return data


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "my corpus"
    (folder / "deep").mkdir(parents=True)
    for name, length in LENGTHS.items():
        soundfile.write(folder / name, np.full(length, 0.1, np.float32), 16_000)
    return folder


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Our own, SpeechBrain's, NeMo's, fairseq's and Kaldi's way of writing the same two utterances.
NAMES = list(LENGTHS)
CSV_NAMES = ["a b.wav", '"deep/é \'q"".flac"']
NEMO = [
    {"audio_filepath": NAMES[0], "duration": 1.5, "text": "HELLO, YOU", "speaker": "s1"},
    {"audio_filepath": NAMES[1], "duration": 1.0001, "text": "", "speaker": "s2"},
]
SPEECHBRAIN = {
    "u1": {"wav": "{data_root}/" + NAMES[0], "length": 1.5, "words": "HELLO, YOU", "spk_id": "s1"},
    "u2": {"wav": "{data_root}/" + NAMES[1], "length": 1.0001, "words": "", "spk_id": "s2"},
}
OURS = f'audio,duration,text,speaker\n{CSV_NAMES[0]},1.5,"HELLO, YOU",s1\n{CSV_NAMES[1]},1.0001,,s2\n'
FILES = {
    "ours.csv": OURS,
    "samples.tsv": f"id\taudio\tnum_samples\ttext\tspeaker\nu1\t{NAMES[0]}\t24000\tHELLO, YOU\ts1\nu2\t{NAMES[1]}\t16002\t\ts2\n",
    "bom_and_crlf.csv": "\ufeff" + OURS.replace("\n", "\r\n"),
    "speechbrain.csv": "ID,duration,wav,spk_id,wrd\n"
    f'u1,1.5,$data_root/{CSV_NAMES[0]},s1,"HELLO, YOU"\nu2,1.0001,"$data_root/{CSV_NAMES[1][1:]},s2,\n',
    "speechbrain_old.csv": "ID, duration, wav, spk_id, wrd\n"
    f'u1, 1.5, {CSV_NAMES[0]}, s1, "HELLO, YOU"\nu2, 1.0001, {CSV_NAMES[1]}, s2, \n',
    "speechbrain.json": json.dumps(SPEECHBRAIN, indent=1),
    "speechbrain_one_line.json": json.dumps(SPEECHBRAIN),
    "nemo.jsonl": "\n".join(map(json.dumps, NEMO)),
    "nemo.json": "\n\n".join(map(json.dumps, NEMO)) + "\n",
    "list.json": json.dumps(NEMO),
    "mixed_types.jsonl": "\n".join(map(json.dumps, [NEMO[0] | {"duration": "1.5"}, NEMO[1] | {"text": None}])),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_manifest_gives_the_same_table(corpus, name):
    data = load(write(corpus / name, FILES[name]), data_root=str(corpus))
    assert data["audio"][:] == [str(corpus / audio) for audio in NAMES]
    assert data["num_samples"][:] == [24_000, 16_002]
    assert data["start"][:] == [0.0, 0.0]
    assert data["text"][:] == ["HELLO, YOU", ""] and data["speaker"][:] == ["s1", "s2"]
    assert data["id"][:] == (["u1", "u2"] if name.startswith(("samples", "speechbrain")) else NAMES)
    assert [data.features[name].dtype for name in ("id", "start", "num_samples")] == ["string", "float64", "int64"]
    assert "label" not in data.column_names


def test_parquet_may_hold_numbers_but_not_audio(corpus):
    table = pa.table({"Audio": NAMES, "duration": pa.array([1.5, 2], pa.float32()), "label": [3, 4], "other": [1, 2]})
    pyarrow.parquet.write_table(table, corpus / "a.parquet")
    data = load(corpus / "a.parquet")
    assert data["num_samples"][:] == [24_000, 32_000] and data["label"][:] == ["3", "4"]
    pyarrow.parquet.write_table(
        pa.table({"audio": [{"bytes": None, "path": "x"}, {"bytes": b"", "path": "x"}]}), corpus / "b.parquet"
    )
    with pytest.raises(UserError, match="b.parquet holds the audio itself, in its column audio: give"):
        load(corpus / "b.parquet")


@pytest.mark.parametrize("root", [".", "", "deep/..", "{absolute}"])
def test_fairseq_roots(corpus, root):
    root = root.format(absolute=corpus)
    data = load(write(corpus / "train.tsv", f"{root}\n{NAMES[0]}\t24000\n{NAMES[1]}\t16001\n"))
    assert [os.path.realpath(path) for path in data["audio"]] == [str(corpus / name) for name in NAMES]
    assert data["num_samples"][:] == list(LENGTHS.values()) and data["id"][:] == NAMES


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("cv.tsv", 'path\tsentence\tduration\na\t"Yes he said\t1\nb\t"A ""B"""\t1\n', ['"Yes he said', 'A "B"']),
        ("a.csv", 'audio,duration,text\na.wav,1,"one\ntwo"\na.wav,2,"say ""x"""\n', ["one\ntwo", 'say "x"']),
        (
            "a.csv",
            'audio,duration,text\na.wav,1,"first\nhe counted one, 2, three"\n',
            ["first\nhe counted one, 2, three"],
        ),
        ("a.csv", "audio,duration,text\na.wav,1,null\nb.wav,1,007\nc.wav,1,NaN\n", ["null", "007", "NaN"]),
        ("a.json", '[{"wav": "a", "length": 1, "text": "1e5"}, {"wav": "b", "length": 1, "text": 7}]', ["1e5", "7"]),
        (
            "a.jsonl",
            '{"audio": "a", "duration": 1, "text": "2020-01-01", "start_year": 2020, "end_mark": "x"}\n',
            ["2020-01-01"],
        ),
        (
            "b.jsonl",
            '{"audio": "a", "duration": 1, "text": NaN}\n{"audio": "b", "duration": 1, "text": "nan"}\n',
            ["", "nan"],
        ),
        ("b.csv", "audio,duration,text\na,1,NaN\n", ["NaN"]),
    ],
)
def test_text_stays_text(corpus, name, content, texts):
    assert load(write(corpus / name, content))["text"][:] == texts


def test_rows_beyond_one_batch_stay_in_order(corpus):
    rows = [{"audio": f"{n}.wav", "duration": 1} | ({"text": "late"} if n == 69_999 else {}) for n in range(70_000)]
    data = load(write(corpus / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert data["id"][:] == [row["audio"] for row in rows] and data["text"][-2:] == ["", "late"]


def test_relative_paths_start_at_data_root_or_the_manifest(corpus, tmp_path):
    manifest = write(corpus / "a.csv", "audio,duration\nx/a.wav,1\n/abs/b.wav,1\n/abs/b.wav,2\n")
    for root, options in ((corpus, {}), (tmp_path, {"data_root": str(tmp_path)})):
        data = load(manifest, **options)
        assert data["audio"][:] == [str(root / "x/a.wav"), "/abs/b.wav", "/abs/b.wav"]
        assert data["id"][:] == ["x/a.wav", "/abs/b.wav", "/abs/b.wav#2"]


def test_a_file_has_one_name_however_a_manifest_leads_to_it(corpus):
    plain = load(write(corpus / "plain.csv", "audio,duration\na.wav,1\n"))["audio"][:]
    (corpus / "sub").mkdir()
    around = load(write(corpus / "sub" / "around.csv", "audio,duration\n.././a.wav,1\n"))
    assert around["audio"][:] == plain and around["id"][:] == [".././a.wav"]
    with pytest.raises(UserError, match="1 rows repeat the audio"):
        load(write(corpus / "twice.csv", "id,audio,duration\nu1,a.wav,1\nu2,./a.wav,1\n"))

    # Behind a link `..` leads elsewhere.
    (corpus / "deep" / "er").mkdir()
    (corpus / "deep" / "b.wav").write_bytes((corpus / "a b.wav").read_bytes())
    (corpus / "link").symlink_to(corpus / "deep" / "er")
    (path,) = load(write(corpus / "linked.csv", "audio,duration\nlink/../b.wav,1\n"))["audio"][:]
    assert os.path.samefile(path, corpus / "deep" / "b.wav")


def test_speechbrains_wav_may_be_an_object_with_samples(corpus):
    rows = {"u": {"wav": {"file": "/a.wav", "start": 16_000, "stop": 24_000}, "words": "X"}}
    data = load(write(corpus / "a.json", json.dumps(rows)))
    assert data[0] == {"id": "u", "audio": "/a.wav", "start": 1.0, "num_samples": 8_000, "text": "X"}


def test_kaldi_folder_with_segments(corpus):
    write(corpus / "wav.scp", "r1 a b.wav\nr2 /x/r2.wav\n")
    write(corpus / "segments", "u1 r1 0.5 1.5\nu2 r2 1 2.25\n")
    write(corpus / "text", "u1 HI  THERE\nu2\n")
    write(corpus / "utt2spk", "u1 s\nu2 t\n")
    data = load(corpus)
    assert list(data[0].values()) == ["u1", str(corpus / "a b.wav"), 0.5, 16_000, "HI  THERE", "s"]
    assert list(data[1].values()) == ["u2", "/x/r2.wav", 1.0, 20_000, "", "t"]


@pytest.mark.parametrize(
    "file, content, lengths", [("utt2dur", "r2 1.25\n", [24_000, 20_000]), ("segments", "r1 r1 0.5 -1\n", [16_000])]
)
def test_kaldi_lengths_that_are_missing_are_measured(corpus, file, content, lengths):
    write(corpus / "wav.scp", f"r1 {NAMES[0]}\nr2 {NAMES[1]}\n")
    write(corpus / file, content)
    assert load(corpus, measure=measure_length)["num_samples"][:] == lengths


@pytest.mark.parametrize("entry", ["touch {}/ran |", "/raw.ark:17"])
def test_kaldi_pipes_and_archives_are_refused(corpus, entry):
    write(corpus / "wav.scp", f"r1 {entry.format(corpus)}\n")
    with pytest.raises(UserError, match="wav.scp: entry 'r1' is a shell pipe or lies in an archive"):
        load(corpus)
    assert not (corpus / "ran").exists()


def test_a_folder_is_searched_for_audio_and_measured(corpus):
    write(corpus / "notes.txt", "no audio")
    write(corpus / "._a b.wav", "macOS")
    os.symlink(corpus, corpus / "deep" / "round")
    data = load(corpus, measure=measure_length)
    assert dict(zip(data["id"], data["num_samples"], strict=True)) == LENGTHS
    assert data["audio"][:] == [str(corpus / name) for name in NAMES]


def test_a_packed_folder_is_read_from_its_manifest(corpus, tmp_path):
    columns = {"id": ["u", "v"], "audio": ["shard-00000.wav"] * 2, "start": [0.0, 24_000 / 16_000]}
    pyarrow.parquet.write_table(pa.table(columns | {"num_samples": [24_000, 16_001]}), corpus / "manifest.parquet")
    data = load(corpus, data_root=str(tmp_path))
    assert data["audio"][:] == [str(corpus / "shard-00000.wav")] * 2
    assert data["start"][:] == [0.0, 1.5] and data["num_samples"][:] == [24_000, 16_001]


def test_a_packing_that_was_not_finished_is_a_slip(corpus):
    (corpus / "a b.wav").rename(corpus / "shard-00000.wav")
    with pytest.raises(UserError, match="my corpus is an unfinished packing: run the same pack_audio.py command"):
        load(corpus)


def test_missing_durations_are_measured_once_until_a_change(corpus, tmp_path):
    manifest = write(corpus / "a.csv", f"audio,duration\n{CSV_NAMES[0]},\ngone.wav,7\n")
    calls = tmp_path / "calls"

    def counting(path):  # in a worker
        with open(calls, "a") as file:
            file.write(f"{path}\n")
        return measure_length(path)

    for _ in range(2):
        assert load(manifest, measure=counting, cache_dir=tmp_path / "cache")["num_samples"][:] == [24_000, 112_000]
    assert calls.read_text().splitlines().count(str(corpus / NAMES[0])) == 1
    with open(tmp_path / "cache/lengths.jsonl", "a") as file:
        file.write('["/x", 1')  # a kill cut the line short
    soundfile.write(corpus / NAMES[0], np.zeros(100, np.float32), 16_000)
    assert load(manifest, measure=counting, cache_dir=tmp_path / "cache")["num_samples"][:] == [100, 112_000]


def test_known_lengths_start_no_workers(corpus, tmp_path, monkeypatch):
    load(corpus, measure=measure_length, cache_dir=tmp_path)
    monkeypatch.setattr("w2v2.audio.inspection.map_files", None)
    assert len(load(corpus, measure=measure_length, cache_dir=tmp_path)) > 0


def test_files_that_cannot_be_measured_are_listed(corpus):
    write(corpus / "bad.wav", "no audio")
    manifest = write(corpus / "a.csv", "id,audio,start\nu1,a b.wav,0\nu2,bad.wav,0\nu3,gone.wav,0\nu4,a b.wav,9\n")
    data, skipped = load_manifest([manifest])
    assert data["id"][:] == ["u1"]
    names = {"u2": "bad.wav", "u3": "gone.wav", "u4": "a b.wav"}
    assert {row["id"]: row["audio"] for row in skipped} == {name: str(corpus / file) for name, file in names.items()}
    assert skipped[1]["reason"] == "does not exist"
    assert "ends before 9 s" in skipped[2]["reason"]


def test_what_one_of_several_manifests_lacks_is_empty(corpus):
    first = write(corpus / "a.csv", "audio,duration,text\na.wav,1,HI\n")
    second = write(corpus / "b.jsonl", '{"audio": "b.wav", "duration": 2, "label": "x"}')
    data = load(first, second)
    assert data["id"][:] == ["a.wav", "b.wav"] and data["num_samples"][:] == [16_000, 32_000]
    assert data["text"][:] == ["HI", ""] and data["label"][:] == ["", "x"]


def test_manifests_that_share_ids_get_them_prefixed(corpus, tmp_path):
    rows = "id,audio,duration\nu1,a.wav,1\n"
    assert load(write(corpus / "a.csv", rows), write(corpus / "b.csv", rows))["id"][:] == ["a/u1", "b/u1"]
    ids = load(corpus / "a.csv", write(tmp_path / "a.csv", rows))["id"][:]
    assert len(set(ids)) == 2


def test_no_two_utterances_share_an_id(corpus, monkeypatch):
    """`data` holds `data/a.wav`, and `data/data` as a folder of its own holds `a.wav`: both `data/data/a.wav`."""
    monkeypatch.chdir(corpus)
    for name in ("a.wav", "data/a.wav", "other/a.wav"):
        path = corpus / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.full(16_000, 0.1, np.float32), 16_000)
    with pytest.raises(UserError, match="^data, data/data: two utterances would have the id data/data/a.wav: give"):
        load("data", "data/data", measure=measure_length)
    ids = load("data/data", "data/other", measure=measure_length)["id"][:]
    assert ids == ["data/a.wav", "other/a.wav"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_row_may_name_its_columns_otherwise(corpus, capsys, suffix):
    rows = [
        {"audio": "a.wav", "duration": 1, "text": "A", "sentence": "no"},
        {"path": "b.wav", "duration": 2, "sentence": "B"},
        {"path": "c.wav", "duration": 3, "transcript": "C", "sentence": "no", "spk_id": "c"},
        {"audio": "d.wav", "duration": 4, "text": ""},
    ]
    path = corpus / f"m{suffix}"
    if suffix == ".jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa.parquet.write_table(
            pa.Table.from_pylist(
                rows,
                pa.schema(
                    {n: pa.int64() if n == "duration" else pa.string() for n in sorted({*rows[0], *rows[1], *rows[2]})}
                ),
            ),
            path,
        )
    table, _, notes = read_manifests([path], measure=measure_nothing)
    assert table["text"].to_pylist() == ["A", "B", "C", ""] and table["speaker"].to_pylist() == ["", "", "c", ""]
    assert [os.path.basename(name) for name in table["audio"].to_pylist()] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    said = [line.split(": ", 1)[1] for line in notes["warnings"]]
    row = ["row 2 (line 2)", "row 3 (line 3)"] if suffix == ".jsonl" else ["row 2", "row 3"]
    assert said == [
        f"2 rows have no audio: their path is read for it (the first: {row[0]})",
        f"1 rows have no text: their transcript is read for it (the first: {row[1]})",
        f"1 rows have no text: their sentence is read for it (the first: {row[0]})",
    ]


GOOD = '{"audio": "a.wav", "duration": 1}\n'
SLIPS = [
    ("missing.csv", None, "missing.csv does not exist"),
    ("empty.csv", "", "empty.csv is empty"),
    ("empty.jsonl", "\n\n", "empty.jsonl is empty"),
    ("list.txt", "a.wav\n", "unknown suffix '.txt': use .csv"),
    ("a.csv", "foo,bar\n1,2\n", "no audio column: it has foo, bar; name one of them audio or wav"),
    ("a.csv", "audio,duration\na.wav,1\nb.wav,-1\n", r"row 2 \(line 3\): duration is -1.0"),
    ("a.csv", "audio,duration\na.wav,1\n\nb.wav,nan\n", r"row 2 \(line 4\): duration is nan"),
    ("a.csv", "audio,duration\na.wav,long\n", r"row 1 \(line 2\): duration is 'long': write a number"),
    ("a.tsv", "/root\na.wav\t16000\nb.wav\tx\n", r"row 2 \(line 3\): num_frames is 'x'"),
    ("a.csv", "audio,duration,start\na.wav,1,-2\n", r"row 1 \(line 2\): start is -2"),
    ("a.csv", "audio,start,end\na.wav,3,2\n", r"row 1 \(line 2\): end is '2': it has to come after the start"),
    ("a.jsonl", GOOD + '{"audio": "b.wav", "duration": NaN}\n', r"row 2 \(line 2\): duration is nan"),
    ("a.jsonl", GOOD + '{"audio": "b.wav", "dur\n', "a.jsonl: line 2 is not valid JSON"),
    ("a.jsonl", GOOD + "[1]\n", "line 2 is not a JSON object"),
    ("a.jsonl", GOOD + '{"audio": "b.wav", "dur": 2}\n', r"row 2 \(line 2\): dur is '2': other rows name it duration"),
    ("a.json", '[{"audio": "a.wav"},\n {"audio"}]', "a.json: line 2 is not valid JSON"),
    ("a.json", "3", "a.json: found another JSON; use a list of objects"),
    ("a.csv", "audio,duration\n,1\n", r"row 1 \(line 2\): audio is ''"),
    ("a.jsonl", GOOD + '{"audio": null, "duration": 1}\n', r"row 2 \(line 2\): audio is ''"),
    ("a.csv", "audio,duration,text\na.wav,1,hi, you\n", r"row 1 \(line 2\) has 4 cells where the header has 3"),
    ("a.csv", "audio,duration,text\na.wav,1\n", r"row 1 \(line 2\) has 2 cells where the header has 3"),
    ("a.csv", 'audio,duration,text\na.wav,1,"hi\nb.wav,1,you\n', "line 2 does not parse .*: mend the quotes"),
    ("a.csv", 'audio,duration,text\na.wav,1,"hi" you\n', "line 2 does not parse"),
    ("a.csv", 'audio,duration,text\na.wav,1,hi\nb.wav,1,say "x"\n', "line 3 has a stray quote"),
    (
        "a.csv",
        'audio,duration,text\na.wav,1,"hi\nb.wav,1,hi\nc.wav,1,hi"\nd.wav,1,x\n',
        "line 2: a quote opens here and closes 2 rows below",
    ),
    ("a.csv", 'audio,text\na.wav,"hi\nb.wav,hi"\n', "line 2: a quote opens here and closes 1 rows below"),
    ("a.csv", "audio;duration\na.wav;1\n", "separated by ';': separate them by ','"),
    ("a.tsv", "audio,duration\na.wav,1\n", r"separated by ',': separate them by '\\t'"),
    ("a.json", '{"u1": {"wav": "a"},\n "u2": {"wav": "b"},\n "u1": {"wav": "c"}}', "line 3 .*'u1' comes twice"),
    ("a.jsonl", GOOD + '{"audio": "b.wav", "duration": 1, "duration": 2}\n', "line 2 .*'duration' comes twice"),
    (
        "a.csv",
        "audio,duration\na,1\nb,1\na,1\na,1\n",
        r"2 rows repeat the audio, .* the first: row 3 \(line 4\), .*/a:",
    ),
    (
        "a.csv",
        "audio,clip_from_start\na,0\nb,3\nc,4\n",
        r"row 2 \(line 3\): clip_from_start \(2 rows\) is '3': it looks like",
    ),
    (
        "a.csv",
        "audio,start,begin\na,1,2\n",
        r"begin \(1 rows\) is '2': it looks like a segment and is not used",
    ),
    (
        "a.jsonl",
        '{"audio": "a", "segments": [{"start": 1, "end": 2}]}\n',
        r"segments \(1 rows\) is .*looks like a segment and is not used",
    ),
    ("a.csv", "audio,duration,channel\na,1,NBC\n", "channel is 'NBC': write a number from 0 or a letter"),
    ("a.json", '[{"audio": "a.wav"}, 3]', "an entry is not a JSON object"),
    ("a.csv", "audio,audio,duration\na,b,1\n", "more than one column 'audio'"),
    ("a.csv", "id,audio,duration\nx,a,1\ny,b,1\nx,c,1\n", r"row 3 \(line 4\): id is 'x'"),
    ("a.csv", "id,audio,duration\nx,a,1\n,b,1\n", r"row 2 \(line 3\): id is ''"),
    ("a.csv", "wav\n$data_root/a.wav\n", r"row 1 \(line 2\): audio is '\$data_root/a.wav': pass --data_root"),
    ("a.csv", "audio,duration\nhttps://x/a.wav,1\n", "audio is 'https://x/a.wav': download"),
    ("a.csv", "audio,duration\né.wav,1\n".encode("latin-1"), "a.csv holds text that is not UTF-8"),
    ("a.parquet", b"PAR0", "a.parquet cannot be read .*[Pp]arquet"),
    ("a.csv", "audio\ngone.wav\n", "no audio file could be measured.*gone.wav, which does not exist"),
]


@pytest.mark.parametrize("name, content, message", SLIPS)
def test_a_slip_is_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / name, measure=measure_length)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_arguments_that_name_nothing_are_slips(corpus):
    manifest = write(corpus / "a.csv", OURS)
    (corpus / "empty").mkdir()
    for paths, options, message in (
        ([], {}, "no manifest"),
        ([manifest, manifest], {}, "given twice"),
        ([manifest], {"data_root": str(corpus / "gone")}, "--data_root .* is not a folder"),
        ([corpus / "nowhere"], {}, "does not exist"),
        ([corpus / "empty"], {}, "holds no audio files"),
    ):
        with pytest.raises(UserError, match=message):
            load(*paths, **options)


def test_kaldi_segments_may_name_channels(corpus, caplog):
    write(corpus / "wav.scp", "r1 a.wav\n")
    write(corpus / "segments", "u1 r1 0.5 1.5\nu2 r1 1 2 1\nu3 r1 1 2 0\n")
    write(corpus / "text", "u2 HI\nu8 LOST\nu9 LOST\n")
    data = load(corpus)
    assert data["channel"][:] == [None, 1, 0] and data["text"][:] == ["", "HI", ""]
    assert "text: 2 lines are of no utterance here, the first: u8" in caplog.text
    write(corpus / "segments", "u1 r1 0 1 1\n")  # alone
    assert load(corpus)["channel"][:] == [1]


def test_bad_kaldi_segments_are_slips(tmp_path):
    write(tmp_path / "wav.scp", "r1 a.wav\n")
    for segments in (
        "u1 r1 0 1 A\n",
        "u1 r1 0 1 8\n",
        "u1 r9 0 1\n",
        "u1 r1 0\n",
        "u1 r1 0 x\n",
        "u1 r1 2 1\n",
        "u1 r1 0 1\nu1 r1 1 2\n",
    ):
        write(tmp_path / "segments", segments)
        with pytest.raises(UserError, match="u1|row 1"):
            load(tmp_path)


def test_what_a_folder_holds_beside_audio_is_counted(corpus, caplog):
    for name in ("notes.txt", "more.TXT", "LICENSE", ".hidden"):
        write(corpus / name, "no audio")
    (corpus / ".Trash").mkdir()
    soundfile.write(corpus / ".Trash" / "old.wav", np.zeros(16_000), 16_000)
    table, _, notes = read_manifests([corpus])
    assert len(table) == 2 and notes["passed_over"] == {".txt": 2, "no suffix": 1, "hidden": 1, "hidden folder": 1}
    assert (
        "skipped files, hidden or with a suffix that is not of audio: 2 .txt, 1 hidden, 1 hidden folder, 1 no suf"
        in caplog.text
    )


def test_a_stray_quote_after_many_cells_is_found_at_once(corpus):
    cells = ["x"] * 300
    text = ",".join(["audio", *(f"c{n}" for n in range(300))]) + "\na.wav, " + ", ".join([*cells[1:], '5" nail']) + "\n"
    with pytest.raises(UserError, match="line 2 has a stray quote"):
        load(write(corpus / "a.csv", text))


@pytest.mark.parametrize(
    "cells, channels, line",
    [
        ([["0", "1"]], [[0, 1]], None),
        ([["1", "2", ""]], [[0, 1, None]], "read as counted from 1"),
        ([["1", "2"], ["1", "1"]], [[0, 1], [0, 0]], "read as counted from 1"),  # all manifests of a call alike
        ([["1", "2"], ["0", "1"]], [[1, 2], [0, 1]], None),
        ([["1", "2", "B"]], [[0, 1, 1]], "read as counted from 1"),
        ([["A", "B"], ["1", "0"]], [[0, 1], [1, 0]], None),
        ([["1", ""]], None, "channel is 1 wherever .*: write 0 or 1, or A or B"),
        ([["A"], ["1"]], None, "channel is 1 wherever .*: write 0 or 1, or A or B"),
        ([["2", "3"]], None, "channel is 2 or 3 wherever .*: write 0 or 1, or A or B"),
    ],
)
def test_channels_are_counted_alike_in_all_manifests(corpus, caplog, cells, channels, line):
    paths = []
    for column in cells:
        rows = "".join(f"{len(paths)}-{row}.wav,1,{cell}\n" for row, cell in enumerate(column))
        paths.append(write(corpus / f"{len(paths)}.csv", f"audio,duration,channel\n{rows}"))
    if channels is None:
        with pytest.raises(UserError, match=f"csv: {line}"):
            read_manifests(paths, measure=measure_nothing)
        return
    table, _, notes = read_manifests(paths, measure=measure_nothing)
    assert table["channel"].to_pylist() == sum(channels, [])
    assert [[row["channel"] for row in notes["samples"][path]] for path in map(str, paths)] == channels
    assert (line in notes["warnings"][0] and line in caplog.text) if line else not notes["warnings"]


def test_stray_quotes_never_swallow_rows(corpus):
    random, rows = np.random.default_rng(0), [f"clips/u{n}.flac,{n + 1},hello you" for n in range(6)]
    text, refused = "audio,duration,text\n" + "\n".join(rows) + "\n", 0
    for _ in range(300):
        content = text
        for place in random.integers(20, len(text), random.integers(1, 3)):
            content = content[:place] + '"' + content[place:]
        try:
            assert len(load(write(corpus / "a.csv", content))) == 6, content
        except UserError as error:
            refused += 1
            assert "line " in str(error)
    assert refused > 250


def write_parquet(path, cells):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pa.parquet.write_table(pa.table({"audio": pa.array(cells, kind), "text": ["HELLO", ""]}), path)
    return path


def test_audio_columns_of_datasets_give_their_paths(corpus):
    path = write_parquet(corpus / "a.parquet", [{"bytes": None, "path": name} for name in NAMES])
    data = load(path, measure=measure_length)
    assert data["audio"] == [f"{corpus}/{name}" for name in NAMES] and data["text"] == ["HELLO", ""]
    assert data["num_samples"] == list(LENGTHS.values())


def test_json_may_be_compressed(corpus):
    lines = "\n".join(map(json.dumps, NEMO)).encode()
    plain, packed = write(corpus / "a.jsonl", lines), write(corpus / "b.jsonl.gz", gzip.compress(lines))
    assert load(packed).to_list() == load(plain).to_list()
    write(packed, gzip.compress(lines)[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        load(packed)


def test_audio_of_two_manifests_is_told(tmp_path):
    for name, rows in (("a.csv", "x,f.wav,1\n"), ("b.csv", "y,f.wav,1\nz,g.wav,1\n")):
        (tmp_path / name).write_text("id,audio,duration\n" + rows)
    both = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    assert ["1 rows name audio" in line for line in read_manifests(both)[2]["warnings"]] == [True]
    assert read_manifests(both[1:])[2]["warnings"] == []
