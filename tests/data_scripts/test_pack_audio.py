"""`pack_audio.py`: the same utterances from fewer files, whole after any interruption, and one line for a slip."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import soxr
from conftest import run_here, tiny_config, write_csv, write_tones

import pretrain
from w2v2.data import packed
from w2v2.data.audio import AudioError, probe, read_crop, read_pcm
from w2v2.data.manifest import load_manifest
from w2v2.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "data_scripts"))

import pack_audio  # noqa: E402
import pack_shards  # noqa: E402
from pack_shards import pack_all  # noqa: E402

SECONDS = [0.5, 0.25, 0.9, 1.3, 0.5, 1.0, 0.3]
SHARD_HOURS = 1.5 / 3600  # three shards: of 3, 2 and 2 utterances


@pytest.fixture(autouse=True)
def _nothing_is_open():
    packed._opened.cache_clear()


def write_noise(path: Path, seconds=0.5, rate=16_000, channels=1, loudness=0.1, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = loudness * np.random.default_rng(len(str(path))).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, samples.clip(-1, 1), rate, **options)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def manifest(tmp_path):
    """Seven FLAC files with text and speakers."""
    rows = []
    for number, seconds in enumerate(SECONDS):
        path = write_noise(tmp_path / "audio" / ("x" * number) / f"{number}.flac", seconds)
        rows.append(dict(id=f"u{number}", audio=str(path), duration=seconds, text=f"word {number}", speaker="s"))
    return write_rows(tmp_path / "train.jsonl", rows)


def pack(manifest, folder, *flags, status=0):
    argv = [str(manifest), "--output_dir", str(folder), "--shard_hours", str(SHARD_HOURS), "--num_workers", "1", *flags]
    assert pack_audio.main(argv) == status
    return folder


def rows_of(manifest):
    return load_manifest(str(manifest), probe=probe)[0].to_list()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


# What is packed


def test_a_packed_folder_holds_the_same_utterances_in_the_same_order(manifest, tmp_path, capsys):
    folder = pack(manifest, tmp_path / "packed")
    assert "7 utterances, 0.00 hours" in capsys.readouterr().out
    before, after = rows_of(manifest), rows_of(folder)
    assert rows_of(folder / "utterances.parquet") == after
    assert len(list(folder.glob("shard-*.arrow"))) == 3
    for name in ("id", "num_samples", "text", "speaker", "start"):
        assert [row[name] for row in before] == [row[name] for row in after]
    rng = np.random.default_rng(0)
    for old, new in zip(before, after, strict=True):
        whole, _ = soundfile.read(old["audio"], dtype="int16")
        np.testing.assert_array_equal(read_pcm(new["audio"]), whole)
        for _ in range(10):
            start = int(rng.integers(len(whole)))
            count = int(rng.integers(1, len(whole) - start + 1))
            np.testing.assert_array_equal(read_pcm(new["audio"], start, count), whole[start : start + count])
            np.testing.assert_array_equal(
                read_crop(new["audio"], start, count), soundfile.read(old["audio"], count, start, dtype="float32")[0]
            )


def test_a_folder_may_be_moved_and_be_given_with_a_data_root(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    ids = [row["id"] for row in rows_of(folder)]
    moved = tmp_path / "else where" / "it's #1"
    moved.parent.mkdir()
    folder.rename(moved)
    shutil.rmtree(tmp_path / "audio")
    for given in (moved, moved / "utterances.parquet", os.path.relpath(moved)):
        table, skipped = load_manifest([str(given)], data_root=str(tmp_path), probe=probe)
        assert table["id"] == ids and not skipped
        assert [len(read_pcm(audio)) for audio in table["audio"]] == list(table["num_samples"])


def test_the_index_is_read_without_a_shard(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    for path in folder.glob("*.arrow"):
        path.unlink()
    assert [row["num_samples"] for row in rows_of(folder)] == [row["num_samples"] for row in rows_of(manifest)]


def test_an_edited_index_is_checked_like_any_manifest_and_gives_the_same(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    untouched, _ = load_manifest(str(folder), probe=probe)
    index = folder / "utterances.parquet"
    table = pyarrow.parquet.read_table(index)
    pyarrow.parquet.write_table(table, index, compression="none")
    edited, _ = load_manifest(str(folder), data_root=str(tmp_path), probe=probe)
    assert edited.features == untouched.features and edited.to_list() == untouched.to_list()
    pyarrow.parquet.write_table(table.take([0, 1, 1]), index)
    with pytest.raises(UserError, match="make it unique"):
        load_manifest(str(folder), probe=probe)


def test_packed_and_other_manifests_are_given_together(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    both, _ = load_manifest([str(folder), str(manifest)], probe=probe)
    assert both["id"] == [f"packed/u{i}" for i in range(7)] + [f"train/u{i}" for i in range(7)]
    assert both["text"][:7] == both["text"][7:]


def test_odd_names_are_packed(tmp_path):
    names = [
        "a b.wav",
        "it's.flac",
        'say "x".wav',
        "take#2+3.flac",
        "ü 語.flac",
        "shard-00000.arrow#8+5.wav",
        "$(x).wav",
    ]
    folder = tmp_path / "odd # 'folder' ü"
    rows = [dict(audio=str(write_noise(folder / name, 0.1))) for name in names]
    output = pack(write_rows(tmp_path / "m.jsonl", rows), folder / "packed #1+1")
    for old, new in zip(rows, rows_of(output), strict=True):
        assert new["id"] == old["audio"]
        np.testing.assert_array_equal(read_pcm(new["audio"]), soundfile.read(old["audio"], dtype="int16")[0])


def test_other_audio_is_resampled_averaged_and_rounded(tmp_path, capsys):
    rate = 44_100
    path = write_noise(tmp_path / "cd.wav", 1.0, rate, 2)
    decoded, _ = soundfile.read(path, dtype="float32")
    expected = soxr.resample(decoded.mean(axis=1), rate, 16_000, quality="HQ") * 32_768
    folder = pack(write_csv(tmp_path / "m.csv", [path]), tmp_path / "packed")
    samples = read_pcm(rows_of(folder)[0]["audio"])
    assert samples.dtype == np.int16
    np.testing.assert_allclose(samples, expected, atol=0.51)
    assert "0 skipped, 1 rounded to 16 bits, 0 clipped (0 samples)" in capsys.readouterr().out


def test_clipping_is_counted(tmp_path, capsys):
    path = tmp_path / "loud.wav"
    soundfile.write(path, np.array([0.5, 1.5, -0.5, -1.5, 1.0] * 100), 16_000, subtype="FLOAT")
    exact = tmp_path / "exact.wav"
    soundfile.write(exact, np.array([0.5, -1.0] * 100), 16_000, subtype="FLOAT")
    folder = pack(write_csv(tmp_path / "m.csv", [path, exact]), tmp_path / "packed")
    assert "1 rounded to 16 bits, 1 clipped (300 samples)" in capsys.readouterr().out
    assert read_pcm(rows_of(folder)[0]["audio"])[:5].tolist() == [16_384, 32_767, -16_384, -32_768, 32_767]


def test_segments_of_a_recording_are_packed_from_their_start(tmp_path):
    path = write_noise(tmp_path / "long.flac", 3.0)
    whole, _ = soundfile.read(path, dtype="int16")
    rows = [dict(audio=str(path), start=start, duration=1.0) for start in (0.0, 0.5, 2.0)]
    folder = pack(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "packed")
    for row, begin in zip(rows_of(folder), (0, 8_000, 32_000), strict=True):
        assert row["start"] == 0.0
        np.testing.assert_array_equal(read_pcm(row["audio"]), whole[begin : begin + 16_000])


@pytest.mark.parametrize("overshoot", [0.005, 0.25])
def test_where_a_duration_was_rounded_up_every_crop_is_the_files(tmp_path, overshoot):
    path = write_noise(tmp_path / "a.flac", 2.0)
    manifest = write_csv(tmp_path / "m.csv", [path], [2.0 + overshoot])
    (old,), (new,) = rows_of(manifest), rows_of(pack(manifest, tmp_path / "packed"))
    assert old["num_samples"] == new["num_samples"] == round(16_000 * (2.0 + overshoot))
    for start in range(0, old["num_samples"] - 8_000 + 1, 500):
        np.testing.assert_array_equal(read_pcm(old["audio"], start, 8_000), read_pcm(new["audio"], start, 8_000))


def test_unreadable_utterances_are_left_out_and_the_rest_keep_their_order(tmp_path, capsys):
    good = [write_noise(tmp_path / f"{name}.flac") for name in "abc"]
    (tmp_path / "broken.flac").write_bytes(b"no audio")
    audio = [good[0], tmp_path / "broken.flac", good[1], tmp_path / "gone.wav", good[2]]
    folder = pack(write_csv(tmp_path / "m.csv", audio, [0.5, 0.5, 0.5, 0.5, 9.0]), tmp_path / "packed")
    assert [row["audio"].partition("#")[0] for row in rows_of(folder)] == [f"{folder}/shard-00000.arrow"] * 2
    assert [row["id"] for row in rows_of(folder)] == [str(good[0]), str(good[1])]
    np.testing.assert_array_equal(read_pcm(rows_of(folder)[1]["audio"]), soundfile.read(good[1], dtype="int16")[0])
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in skipped] == [str(audio[1]), str(audio[3]), str(audio[4])]
    assert ["not audio" in skipped[0]["reason"], skipped[1]["reason"]] == [True, "does not exist"]
    assert "shorter than its manifest" in skipped[2]["reason"]
    printed = capsys.readouterr()
    assert "2 utterances" in printed.out and "3 skipped" in printed.out and "3 utterances are left out" in printed.err


def test_packed_audio_can_be_packed_again(manifest, tmp_path):
    once = pack(manifest, tmp_path / "one")
    twice = pack(once, tmp_path / "two", "--shard_hours", "1")
    assert len(list(twice.glob("*.arrow"))) == 1
    for old, new in zip(rows_of(manifest), rows_of(twice), strict=True):
        np.testing.assert_array_equal(read_pcm(old["audio"]), read_pcm(new["audio"]))


# The same bytes


def test_any_number_of_workers_writes_the_same_bytes(manifest, tmp_path):
    assert content(pack(manifest, tmp_path / "one")) == content(pack(manifest, tmp_path / "two", "--num_workers", "2"))


@pytest.mark.parametrize("at", ["shard", "line", "index", "settings"])
def test_an_interruption_at_any_stage_costs_nothing_but_what_was_unfinished(manifest, tmp_path, monkeypatch, at):
    whole = content(pack(manifest, tmp_path / "whole"))
    folder = tmp_path / "packed"

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if at == "shard":  # in the middle of writing the third
            calls = iter(range(100))
            patch.setattr(pack_shards, "read_utterance", lambda *a: kill() if next(calls) == 6 else read_pcm(*a))
        elif at == "line":  # a shard is in its place, but not yet in the books
            patch.setattr(pack_audio, "pack_all", lambda *a: (kill() if i else r for i, r in enumerate(pack_all(*a))))
        elif at == "index":
            patch.setattr(pack_audio, "write_index", kill)
        else:
            patch.setattr(pack_audio, "sha256_of", kill)
        with pytest.raises(Killed):
            pack(manifest, folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    books = folder / "shards.jsonl"
    recorded = {json.loads(line)["shard"] for line in books.read_text().splitlines()} if books.exists() else set()
    (folder / "shard-00003.arrow.1.tmp").write_bytes(b"half-written")
    if at in ("shard", "line"):
        with open(books, "a") as file:
            file.write('{"shard": "shard-0000')
    assert at == "settings" or not (folder / "utterances.parquet").exists()
    assert content(pack(manifest, folder)) == whole
    assert {name for name in recorded if (folder / name).stat().st_mtime_ns != written[name]} == set()


def test_a_kill_in_the_middle_is_gone_on_from(manifest, tmp_path):
    whole = content(pack(manifest, tmp_path / "whole"))
    folder = tmp_path / "packed"
    slow = (  # every utterance takes a while
        "import sys, time; sys.path.insert(0, 'data_scripts'); import pack_audio, pack_shards; read = pack_shards.read_utterance\n"
        "def slowly(*a): time.sleep(0.3); return read(*a)\n"
        "pack_shards.read_utterance = slowly; pack_audio.main(sys.argv[1:])"
    )
    flags = [str(manifest), "--output_dir", str(folder), "--shard_hours", str(SHARD_HOURS), "--num_workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", slow, *flags], cwd=REPOSITORY, env=environment)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.arrow"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(folder.glob("*.arrow"))) in (1, 2) and not (folder / "utterances.parquet").exists()
    assert content(pack(manifest, folder)) == whole


def test_a_shard_that_is_not_as_it_was_recorded_is_packed_again(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    whole = content(folder)
    (folder / "shard-00000.arrow").unlink()
    os.truncate(folder / "shard-00002.arrow", 100)
    (folder / "utterances.parquet").write_bytes(b"damaged")
    assert content(pack(manifest, folder)) == whole


def test_a_failed_write_leaves_nothing_that_is_trusted(manifest, tmp_path):
    """The file size limit stands in for a full disk: both end a write with an OSError."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (56_000, 56_000))\n"
        "sys.path.insert(0, 'data_scripts'); import pack_audio; sys.exit(pack_audio.main(sys.argv[1:]))"
    )
    folder = tmp_path / "packed"
    flags = [str(manifest), "--output_dir", str(folder), "--shard_hours", str(SHARD_HOURS), "--num_workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", limited, *flags]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "shard-00001.arrow cannot be written" in last and "same command" in last
    assert "Traceback" not in result.stderr
    assert {path.name for path in folder.iterdir()} == {"packed.json", "shards.jsonl", "shard-00000.arrow"}
    assert content(pack(manifest, folder)) == content(pack(manifest, tmp_path / "whole"))


# Verification


def test_a_whole_folder_is_verified(manifest, tmp_path, capsys):
    folder = pack(manifest, tmp_path / "packed")
    assert pack_audio.main(["--verify", str(folder)]) == 0
    assert "3 shards and the index are as they were written" in capsys.readouterr().out


def flip(path: Path, byte: int):
    damaged = bytearray(path.read_bytes())
    damaged[byte] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("byte", [0, 700, -1, "middle"])
def test_one_flipped_bit_is_found(manifest, tmp_path, capsys, byte):
    folder = pack(manifest, tmp_path / "packed")
    path = folder / "shard-00002.arrow"
    flip(path, path.stat().st_size // 2 if byte == "middle" else byte)
    capsys.readouterr()
    assert pack_audio.main(["--verify", str(folder)]) == 2
    assert "shard-00002.arrow is damaged" in (line := one_line(capsys)) and "delete" in line and "00001" not in line
    path.unlink()
    pack(manifest, folder)
    assert pack_audio.main(["--verify", str(folder)]) == 0


def test_what_is_missing_cut_or_not_finished_is_found(manifest, tmp_path, capsys):
    whole = pack(manifest, tmp_path / "whole")
    for number, (damage, complaint) in enumerate(
        [
            (lambda folder: (folder / "shard-00001.arrow").unlink(), "shard-00001.arrow is missing"),
            (lambda folder: os.truncate(folder / "shard-00001.arrow", 1_000), "shard-00001.arrow has 1000 bytes"),
            (lambda folder: flip(folder / "utterances.parquet", 100), "utterances.parquet is missing or damaged"),
            (lambda folder: (folder / "utterances.parquet").unlink(), "utterances.parquet is missing or damaged"),
            (lambda folder: (folder / "shards.jsonl").write_text(""), "lists 0 shards of 3"),
            (lambda folder: (folder / "packed.json").unlink(), "no packed folder"),
            (lambda folder: (folder / "packed.json").write_text("{"), "packed.json is damaged"),
            (lambda folder: (folder / "packed.json").write_text('{"format": 1}'), "not finished"),
        ]
    ):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(whole, folder)
        damage(folder)
        capsys.readouterr()
        assert pack_audio.main(["--verify", str(folder)]) == 2
        assert complaint in one_line(capsys)


# Slips


def test_a_folder_packed_from_something_else_is_not_gone_on_with(manifest, tmp_path, capsys):
    folder = pack(manifest, tmp_path / "packed")
    before = content(folder)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    other = write_rows(tmp_path / "other.jsonl", [*rows[:-1], rows[-1] | {"text": "another word"}])
    capsys.readouterr()
    for argv in ([other], [manifest, "--shard_hours", "1"]):
        pack(argv[0], folder, *argv[1:], status=2)
        assert "--overwrite" in one_line(capsys)
    assert content(folder) == before
    pack(other, folder, "--overwrite", "--shard_hours", "1")
    assert rows_of(folder)[-1]["text"] == "another word"
    assert sorted(path.name for path in folder.glob("*.arrow")) == ["shard-00000.arrow"]


def test_slips_end_with_status_2_and_one_line(manifest, tmp_path, capsys):
    packed_folder = pack(manifest, tmp_path / "packed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "orphans").mkdir()
    shutil.copy(packed_folder / "shard-00000.arrow", tmp_path / "orphans")
    (tmp_path / "bad.flac").write_bytes(b"no audio")
    bad = write_csv(tmp_path / "bad.csv", [tmp_path / "bad.flac"], [1.0])
    capsys.readouterr()
    for source, folder, flags, complaint in [
        (manifest, tmp_path / "mine", [], "holds other files, such as thesis.tex"),
        (manifest, tmp_path / "mine", ["--overwrite"], "holds other files"),
        (manifest, tmp_path / "orphans", [], "holds shards but no packed.json"),
        (manifest, manifest, [], "is a file"),
        (packed_folder, packed_folder, ["--overwrite"], "is --output_dir itself"),
        (manifest, tmp_path / "new", ["--shard_hours", "0"], "--shard_hours 0"),
        (tmp_path / "none.csv", tmp_path / "new", [], "does not exist"),
        (bad, tmp_path / "new", [], "none of 1 utterances could be read"),
    ]:
        pack(source, folder, *flags, status=2)
        assert complaint in one_line(capsys)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    for argv in ([], ["--output_dir", "x"], [str(manifest)], [str(manifest), "--verify", "x"]):
        with pytest.raises(SystemExit, match="2"):
            pack_audio.main(argv)
        assert "--verify FOLDER alone" in one_line(capsys)


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_killed_worker_is_one_line_not_a_wait():
    with pytest.raises(UserError, match="a worker was killed"):
        list(pack_all([Deadly()], 2))


def test_two_packings_do_not_work_in_one_folder(manifest, tmp_path, capsys):
    folder = pack(manifest, tmp_path / "packed")
    capsys.readouterr()
    with pack_audio.alone_in(folder):
        pack(manifest, folder, status=2)
        assert "another pack_audio.py is at work" in one_line(capsys)


def test_the_digest_follows_content_not_memory(manifest, tmp_path):
    import pyarrow as pa

    table = load_manifest(str(manifest), probe=probe)[0].with_format("arrow")[:]
    scattered = pa.concat_tables([table.slice(0, 3), table.slice(3, 1), table.slice(4)])
    assert pack_audio.digest(scattered) == pack_audio.digest(table)
    assert pack_audio.digest(table.slice(1)) != pack_audio.digest(table)
    changed = table.set_column(1, "audio", pa.array([path + "x" for path in table["audio"].to_pylist()]))
    assert pack_audio.digest(changed) != pack_audio.digest(table)


@pytest.mark.parametrize("num_samples", [[10], [5] * 7, [100, 1, 1, 1], [1, 100, 100, 1], [3, 3, 4, 10, 1]])
def test_shards_partition_the_rows(num_samples):
    shard_samples = 10
    bounds = pack_audio.cut_shards(np.array(num_samples), shard_samples / 16_000 / 3600)
    assert [row for first, last in bounds for row in range(first, last)] == list(range(len(num_samples)))
    for first, last in bounds:
        assert first < last and sum(num_samples[first : last - 1]) < shard_samples


# Training on it


def test_pretraining_makes_the_same_run_from_the_packed_folder_and_may_change_over_to_it(tmp_path, capsys):
    seconds = [1.5, 2.0, 1.25, 1.75]
    manifest = write_csv(tmp_path / "train.csv", write_tones(tmp_path / "audio", seconds), seconds)
    folder = pack(manifest, tmp_path / "packed")
    tiny_config().save_pretrained(tmp_path / "model")
    flags = ["--config_name", tmp_path / "model", "--min_seconds", "0.5", "--batch_hours", "0.002", "--use_cpu", "true"]
    flags += ["--micro_batch_seconds", "4", "--max_steps", "2", "--report_to", "none", "--dataloader_num_workers", "0"]
    flags += ["--save_steps", "1"]
    plans, weights = {}, {}
    for name, data in (("files", manifest), ("packed", folder)):
        output = ["--train_data", data, "--output_dir", tmp_path / name]
        assert run_here(pretrain.main, *flags, *output, "--dry_run") == 0
        plans[name] = json.loads((tmp_path / name / "plan.json").read_text())
        assert run_here(pretrain.main, *flags, *output, "--overwrite_output_dir") == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert plans["files"] == plans["packed"] and plans["files"]["utterances"] == 4
    assert weights["files"] == weights["packed"]
    resumed = tmp_path / "files"
    shutil.rmtree(resumed / "checkpoint-2")
    (resumed / "model.safetensors").unlink()
    change_over = ["--train_data", folder, "--output_dir", resumed, "--resume_from_checkpoint", "auto"]
    assert run_here(pretrain.main, *flags, *change_over) == 0
    assert "checkpoint-1, after 1 updates" in capsys.readouterr().out
    assert (resumed / "model.safetensors").read_bytes() == weights["files"]


def test_a_damaged_shard_is_skipped_audio(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    os.truncate(folder / "shard-00000.arrow", 2_000)
    found = []
    for row in rows_of(folder):
        try:
            found.append(len(read_pcm(row["audio"], 0, row["num_samples"])) == row["num_samples"])
        except AudioError as error:
            found.append(error.reason.split(":")[0])
    in_first = pyarrow.parquet.read_table(folder / "utterances.parquet")["audio"].to_pylist()
    expected = ["is truncated or damaged" if audio.startswith("shard-00000") else True for audio in in_first]
    assert found == expected and len(set(map(str, found))) == 2
