"""`w2v2.manifests.lhotse_cuts`: what Lhotse writes is heard as Lhotse hears it, or refused."""

import json

import numpy as np
import pytest
import soundfile
from lhotse import AudioSource, CutSet, MonoCut, MultiCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet

from w2v2.audio.crops import SAMPLING_RATE, read_crop
from w2v2.errors import UserError
from w2v2.manifests.manifest import read_manifests


def make_recording(folder, name, rate=16_000, channels=1, seconds=4.0, kind="flac"):
    shape = (round(seconds * rate), channels)
    samples = np.random.default_rng(len(name)).uniform(-0.5, 0.5, shape)
    soundfile.write(folder / f"{name}.{kind}", samples, rate)
    return Recording.from_file(folder / f"{name}.{kind}")


def supervise(recording, start=0.0, duration=None, **told):
    duration = recording.duration - start if duration is None else duration
    return SupervisionSegment(f"{recording.id}-{start}", recording.id, start, duration, **told)


def cut(recording, name="cut", start=0.0, duration=None, channel=0, supervisions=()):
    kind = MonoCut if isinstance(channel, int) else MultiCut
    return kind(name, start, duration or recording.duration - start, channel, list(supervisions), recording=recording)


def load(path, cuts, **options):
    cuts.to_file(path)
    return read_manifests([path], **options)


def check(table, cuts):
    """Samples at 16 kHz are Lhotse's; several channels are mixed."""
    cuts = {own.id: own for own in cuts}
    assert table["id"].to_pylist() == list(cuts)
    for row in table.to_pylist():
        ours = read_crop(row["audio"], round(row["start"] * SAMPLING_RATE), row["num_samples"], row.get("channel"))
        theirs = cuts[row["id"]].load_audio().mean(axis=0, dtype=np.float32)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz", "cuts.json"])
def test_cuts_are_heard_as_lhotse_hears_them(tmp_path, name):
    mono, stereo = make_recording(tmp_path, "mono"), make_recording(tmp_path, "stereo", channels=2, kind="wav")
    cuts = CutSet.from_cuts(
        [
            cut(mono, "whole"),
            cut(mono, "part", 0.7513125, 1.25),
            cut(mono, "first", 0.0, 1.0),
            cut(stereo, "left", 1.0, 1.5, channel=0),
            cut(stereo, "right", 1.0, 1.5, channel=1),
            cut(stereo, "both", 1.0, 1.5, channel=[0, 1]),
        ]
    )
    table, skipped, notes = load(tmp_path / name, cuts)
    assert not skipped and not notes["warnings"]
    check(table, cuts)
    assert table["channel"].to_pylist() == [None, None, None, 0, 1, None]


def test_first_seconds_of_files_are_no_slip(tmp_path):
    """Cuts that all begin at 0 and end before their files are common: `CutSet.truncate`."""
    cuts = CutSet.from_cuts([cut(make_recording(tmp_path, f"a{'b' * n}"), f"{n}") for n in range(3)])
    cuts = cuts.truncate(max_duration=1.0, offset_type="start").to_eager()
    check(load(tmp_path / "cuts.jsonl", cuts)[0], cuts)


def test_what_supervisions_tell_is_kept(tmp_path):
    recording = make_recording(tmp_path, "a")
    two = [
        supervise(recording, 2.0, 1.0, text="B C", speaker="s2"),
        supervise(recording, 0.5, 1.0, text="A", speaker="s1"),
    ]
    one = supervise(recording, 0.0, 1.0, text="X", speaker="s1", language="sw", custom={"emotion": "joy", "start": 9})
    cuts = CutSet.from_cuts(
        [cut(recording, "two", supervisions=two), cut(recording, "one", duration=1.0, supervisions=[one])]
    )
    table, _, notes = load(tmp_path / "cuts.jsonl", cuts, further=["language"])
    told = [{name: row[name] for name in ("text", "speaker", "label", "language")} for row in table.to_pylist()]
    assert told[0] == {"text": "A B C", "speaker": "", "label": "", "language": ""}
    assert told[1] == {"text": "X", "speaker": "s1", "label": "joy", "language": "sw"}
    assert notes["warnings"] == []


def test_text_of_more_than_is_heard_is_told(tmp_path):
    recording = make_recording(tmp_path, "a")
    cuts = CutSet.from_cuts([cut(recording, "c", duration=1.0, supervisions=[supervise(recording, text="A B C")])])
    _, _, notes = load(tmp_path / "cuts.jsonl", cuts)
    assert "1 cuts hold supervisions that go beyond them" in notes["warnings"][0]


def test_channels_may_be_files(tmp_path):
    paths = [make_recording(tmp_path, name).sources[0].source for name in ("a", "bb")]
    sources = [AudioSource("file", [channel], path) for channel, path in enumerate(paths)]
    recording = Recording("r", sources, 16_000, 64_000, 4.0)
    cuts = CutSet.from_cuts([cut(recording, f"c{channel}", 1.0, 2.0, channel) for channel in (0, 1)])
    check(load(tmp_path / "cuts.jsonl", cuts)[0], cuts)
    with pytest.raises(UserError, match=r"row 1 \(line 1\)|row 1 .*channels 0, 1, which are not one file"):
        load(tmp_path / "both.jsonl", CutSet.from_cuts([cut(recording, channel=[0, 1])]))


def test_resampling_moves_no_cut(tmp_path):
    """Lhotse resamples by another filter, so white noise agrees in place, not to the bit."""
    recording = make_recording(tmp_path, "a", rate=24_000).resample(16_000)
    own = cut(recording, "c", 1.0, 2.0)
    row = load(tmp_path / "cuts.jsonl", CutSet.from_cuts([own]))[0].to_pylist()[0]
    ours, theirs = read_crop(row["audio"], round(row["start"] * 16_000), row["num_samples"]), own.load_audio()[0]
    assert len(ours) == len(theirs) and np.corrcoef(ours, theirs)[0, 1] > 0.98


def test_recordings_and_supervisions_are_manifests(tmp_path):
    recordings = [make_recording(tmp_path, "a"), make_recording(tmp_path, "bb", channels=2)]
    segments = [supervise(recordings[0], 1.0, 2.0, text="A"), supervise(recordings[1], 0.0, 4.0, text="B", channel=1)]
    RecordingSet.from_recordings(recordings).to_file(tmp_path / "x_recordings_train.jsonl.gz")
    SupervisionSet.from_segments(segments).to_file(tmp_path / "x_supervisions_train.jsonl.gz")
    table, _, _ = read_manifests([tmp_path / "x_recordings_train.jsonl.gz"])
    check(table, [cut(own, own.id, channel=own.channel_ids) for own in recordings])
    table, _, _ = read_manifests([tmp_path / "x_supervisions_train.jsonl.gz"])
    check(table, [cut(own, s.id, s.start, s.duration, s.channel) for own, s in zip(recordings, segments, strict=True)])
    assert table["text"].to_pylist() == ["A", "B"] and table["channel"].to_pylist() == [None, 1]
    (tmp_path / "x_recordings_train.jsonl.gz").unlink()
    with pytest.raises(UserError, match="have x_recordings_train.jsonl.gz beside it"):
        read_manifests([tmp_path / "x_supervisions_train.jsonl.gz"])


def test_a_row_with_its_own_audio_is_no_supervision(tmp_path):
    row = {"audio_filepath": "a.wav", "recording_id": "r", "start": 1.0, "duration": 2.0, "text": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    table, _, _ = read_manifests([tmp_path / "a.jsonl"])
    assert table.select(["start", "num_samples", "text"]).to_pylist() == [
        {"start": 1.0, "num_samples": 32_000, "text": "x"}
    ]


def replace_source(recording, kind, source="x"):
    return Recording(recording.id, [AudioSource(kind, [0], source)], 16_000, 64_000, 4.0)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda own: own.perturb_speed(1.1), "changes its recording by Speed: write the audio to files"),
        (lambda own: own.perturb_volume(2.0), "changes its recording by Volume"),
        (lambda own: own.resample(8_000), "changes its recording by Resample"),
        (lambda own: own.mix(own, offset_other_by=1.0), "is a MixedCut"),
        (lambda own: own.pad(6.0), "is a MixedCut"),
        (lambda own: cut(replace_source(own.recording, "url", "https://x/a.wav")), "type 'url': download the file"),
        (lambda own: cut(replace_source(own.recording, "command", "cat a.wav")), "type 'command': write the audio"),
        (lambda own: cut(replace_source(own.recording, "shar", "")), "type 'shar': give the recording.*.tar files"),
        (lambda own: cut(replace_source(own.recording, "memory")), "type 'memory': write the audio"),
        (lambda own: MonoCut("c", 0.0, 4.0, 0), "has no recording, only features"),
    ],
)
def test_what_is_in_no_file_is_refused(tmp_path, change, reason):
    plain = cut(make_recording(tmp_path, "a"), "plain")
    changed = change(plain)
    changed.id = "changed"
    with pytest.raises(UserError, match=rf"cuts.jsonl: row 2 \(line 2\) .*({reason})") as caught:
        load(tmp_path / "cuts.jsonl", CutSet.from_cuts([plain, changed]))
    assert "\n" not in str(caught.value)


def test_tars_of_shar_are_heard(tmp_path):
    """Their audio lies in recording.*.tar, with a manifest beside each member."""
    cuts = CutSet.from_cuts([cut(make_recording(tmp_path, "a"), f"c{n}", n / 2, 1.5) for n in range(3)])
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2)
    table, _, _ = read_manifests([tmp_path / "shar" / "recording.*.tar"])
    check(table, cuts)
