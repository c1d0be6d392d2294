"""`w2v2.manifests.segments`: which part of a recording a row says, in the names and units of many tools, and what is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import torch

from w2v2.audio.crops import measure_rate
from w2v2.errors import UserError
from w2v2.manifests import segments
from w2v2.manifests.manifest import read_manifests
from w2v2.manifests.segments import read_name

# Recordings of 20 s at several rates.
RATES = {"episode.wav": 16_000, "call.wav": 8_000, "cd.wav": 44_100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for name, rate in RATES.items():
        soundfile.write(folder / name, np.zeros((20 * rate, 2)), rate, subtype="PCM_U8")
    return folder


def read(folder, text, name="a.csv"):
    (folder / name).write_text(text)
    table, skipped, notes = read_manifests([folder / name])
    assert skipped == []
    rows = table.to_pylist()
    return [
        (row["start"], row["num_samples"] / 16_000, *([row["channel"]] if "channel" in row else [])) for row in rows
    ], notes


def test_names_are_read_word_by_word():
    starts = "start begin begin_time startTime start_timestamp segment_start offset t_start onset".lower().split()
    assert {read_name(name) for name in starts} == {("start", "")}
    assert {read_name(name) for name in "start_sec begin_seconds start(s) offset_in_s".split()} == {("start", "s")}
    assert {read_name(name) for name in "start_ms begin_milliseconds offset[ms]".split()} == {("start", "ms")}
    assert {read_name(name) for name in "frame_offset start_sample begin_frame".split()} == {("start", "frames")}
    assert {read_name(name) for name in "stop end endtime segment_end".split()} == {("stop", "")}
    assert {read_name(name) for name in "num_frames n_frames nframes frames num_samples length_samples".split()} == {
        ("frames", "frames")
    }
    others = "gender sentence text_length time speech id utterance sample frame weekend number end_start".split()
    assert {read_name(name) for name in others} == {None}


@pytest.mark.parametrize(
    "header, rows, expected",
    [
        ("audio,start,end", "episode.wav,1,3", [(1.0, 2.0)]),  # seconds
        ("audio_filepath,offset,duration", "episode.wav,3.5,2.5", [(3.5, 2.5)]),  # NeMo
        ("ID,audio_path,begin_time,end_time,duration", "u,episode.wav,3.0,8.0,5.0", [(3.0, 5.0)]),  # GigaSpeech
        ("path,frame_offset,num_frames", "call.wav,16000,20000", [(2.0, 2.5)]),  # torchaudio: the file's own frames
        ("path,frame_offset,num_frames", "cd.wav,44100,88200\ncall.wav,8000,4000", [(1.0, 2.0), (1.0, 0.5)]),
        ("path,start_frame,end_frame,sample_rate", "call.wav,16000,32000,16000", [(1.0, 1.0)]),  # as the manifest says
        ("path,num_frames", "cd.wav,882000", [(0.0, 20.0)]),
        ("audio,start_ms,end_ms", "episode.wav,1500,4000", [(1.5, 2.5)]),
        ("audio,start,end,duration", "episode.wav,1500,4000,2.5", [(1.5, 2.5)]),  # milliseconds, as the duration tells
        ("audio,start,end", "call.wav,120000,140000", [(15.0, 2.5)]),  # frames: no seconds, no milliseconds
        ("audio,onset,offset", "episode.wav,2.5,4.5", [(2.5, 2.0)]),
        ("audio,start", "episode.wav,12.5", [(12.5, 7.5)]),  # the rest of the file
        ("audio,end", "episode.wav,12.5", [(0.0, 12.5)]),
        # Without a unit: as the durations or the files tell.
        ("audio,start,end", "cd.wav,16000,56000", [(16 / 44.1, 40 / 44.1)]),
        ("audio,start,end,duration", "call.wav,16000,56000,2.5", [(1.0, 2.5)]),  # at 16,000 a second
        ("audio,start,end,duration", "cd.wav,16000,56000,20", [(16 / 44.1, 40 / 44.1)]),  # the whole file's duration
        ("audio,start,duration", "call.wav,120000,2.5", [(15.0, 2.5)]),
        ("audio,start,num_frames", "episode.wav,160000,16000", [(10.0, 1.0)]),
        ("ID,wav,start,stop", "u,episode.wav,16000,18000", [(1.0, 0.125)]),  # SpeechBrain's: never milliseconds
        ("ID,wav,start,stop", "u,episode.wav,2,12", [(2.0, 10.0)]),
        ("audio,start,end", "episode.wav,0,\nepisode.wav,16,", [(0.0, 20.0), (16.0, 4.0)]),
        # SpeechBrain: samples, of VoxCeleb with the duration of the whole file, of Switchboard at 8 kHz
        ("ID,duration,wav,start,stop,spk_id", "u,20.0,episode.wav,16000,56000,s", [(1.0, 2.5)]),
        ("ID,wav,start,stop", "u,call.wav,16000,56000", [(2.0, 5.0)]),
        ("ID,duration,start,stop,channel,wav", "u,4.5,16000,52000,A,call.wav\nv,4.5,64000,100000,B,call.wav",
         [(2.0, 4.5, 0), (8.0, 4.5, 1)]),
        ("ID,duration,wav,start,stop", "u,10,episode.wav,2,12", [(2.0, 10.0)]),  # the duration tells seconds
        ("ID,duration,wav,start,stop", "u,20.0,episode.wav,1.5,4", [(1.5, 2.5)]),  # not whole: seconds
        ("audio,duration,channel", "call.wav,20,1\ncall.wav,20,2\ncall.wav,20,", [(0.0, 20.0, 0), (0.0, 20.0, 1), (0.0, 20.0, None)]),
        ("audio,duration,channel", "call.wav,20,0\ncall.wav,20,right", [(0.0, 20.0, 0), (0.0, 20.0, 1)]),
    ],
)  # fmt: skip
def test_segments_of_many_tools(folder, header, rows, expected):
    found = read(folder, f"{header}\n{rows}\n")[0]
    assert [row[2:] for row in found] == [row[2:] for row in expected]
    assert np.allclose([row[:2] for row in found], [row[:2] for row in expected], rtol=0, atol=0.5 / 16_000)


def test_fairseq_counts_the_frames_of_the_file(folder):
    assert read(folder, ".\ncall.wav\t160000\ncd.wav\t882000\n", "a.tsv")[0] == [(0.0, 20.0), (0.0, 20.0)]


def test_parquet_holds_segments_as_numbers(folder):
    columns = {
        "audio": ["call.wav"] * 2,
        "begin": [1.5, 4.0],
        "end": [3.0, 9.0],
        "channel": pa.array([0, None], pa.int8()),
    }
    pyarrow.parquet.write_table(pa.table(columns), folder / "a.parquet")
    table = read_manifests([folder / "a.parquet"])[0]
    assert table["start"].to_pylist() == [1.5, 4.0] and table["num_samples"].to_pylist() == [24_000, 80_000]
    assert table["channel"].to_pylist() == [0, None] and str(table["channel"].type) == "int32"


@pytest.mark.parametrize(
    "header, rows, message",
    [
        ("audio,duration", "episode.wav,5\ncall.wav,20", None),  # one of two: told alone
        ("audio,duration", "episode.wav,5\ncall.wav,20\ncd.wav,5",
         "2 of 3 rows that were compared are shorter than their files, with no start .row 1 .line 2.: 5 s, the file holds 20 s"),
        ("audio,duration", "episode.wav,20000", "go beyond the end .*: 20000 s, the file holds 20 s; are they milliseconds"),
        ("audio,start,end,duration", "episode.wav,1500,4000,2500", "4000 s, the file holds 20 s; are they milliseconds"),
        ("audio,duration", "episode.wav,320000", "320000 s, the file holds 20 s; are they frames"),
        ("audio,num_samples", "call.wav,160000", "10 s, the file holds 20 s; is num_samples at the file's 8,000 a second"),
        ("audio,num_samples", "episode.wav,320000\nepisode.wav,320000\ncall.wav,160000",  # rates are mixed
         "1 of 3 rows .*10 s, the file holds 20 s; is num_samples at the file's 8,000 a second"),
        ("audio,offset,duration", "episode.wav,18.5,3", "go beyond the end of their files .*: 21.5 s, the file holds 20 s"),
        ("audio,start,end", "episode.wav,3000,8000\nepisode.wav,9000,12000", "may be milliseconds or frames .*12000 in a file of 20 s"),
        ("audio,start,end,duration", "episode.wav,300,305,20", "go beyond the end of their files .*: 305 s"),
        ("audio,start,end", "episode.wav,100,300", "go beyond the end of their files .*: 300 s"),  # too short for frames
        ("audio,start,end", "episode.wav,300,305", "go beyond the end of their files .*: 305 s, the file holds 20 s"),
        ("audio,begin_stamp,end_stamp", "episode.wav,1,3\nepisode.wav,4,6", "begin_stamp .2 rows. is '1': it looks like a segment"),
        ("audio,t0,t1", "episode.wav,1,3", "t0 .1 rows. is '1': it looks like a segment and is not used"),
        ("audio,from,to", "episode.wav,1,3", "from .1 rows. is '1': it looks like a segment and is not used"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_files(folder, header, rows, message):
    text = f"{header}\n{rows}\n"
    if message:
        with pytest.raises(UserError, match=message):
            read(folder, text)
    else:
        (line,) = read(folder, text)[1]["warnings"]
        assert (
            "1 of 2 rows that were compared are shorter than their files" in line and "5 s, the file holds 20 s" in line
        )


def test_rates_of_files_are_remembered(folder, tmp_path, monkeypatch):
    opened = tmp_path / "opened"

    def counting(path):  # in a worker
        with open(opened, "a") as file:
            file.write(f"{path}\n")
        return measure_rate(path)

    monkeypatch.setitem(segments.RATES, "measure", counting)
    (folder / "a.csv").write_text("path,frame_offset,num_frames\ncd.wav,44100,88200\ncall.wav,8000,4000\n")
    tables = [read_manifests([folder / "a.csv"], cache_dir=tmp_path / "cache")[0].to_pylist() for _ in range(2)]
    assert tables[0] == tables[1] and [row["start"] for row in tables[0]] == [1.0, 1.0]
    assert sorted(opened.read_text().split()) == [str(folder / "call.wav"), str(folder / "cd.wav")]


def test_reading_draws_no_random_number(folder):
    before = torch.get_rng_state()
    read(folder, "audio,num_frames\ncd.wav,882000\ncall.wav,160000\nepisode.wav,\n")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_found_out_is_told(folder, caplog):
    notes = read(folder, "audio,start,end,duration\nepisode.wav,1500,4000,2.5\n")[1]
    assert notes["warnings"] == [f"{folder}/a.csv: start is read as milliseconds, which fits the durations"]
    notes = read(folder, "audio,start_frame,end_frame,sample_rate\ncall.wav,16000,32000,16000\n")[1]
    assert (
        "sample_rate, which counts frames, differs from the files' sampling rate (row 1 (line 2): 16000, the file has 8000)"
        in str(notes)
    )
    notes = read(folder, "audio,start,end,duration\nepisode.wav,1.5,4,20\n")[1]
    assert (
        "1 rows have a duration other than stop − start, which is used (row 1 (line 2): 2.5 s, not 20 s)"
        in notes["warnings"][0]
    )
    assert notes["warnings"][0] in caplog.text
