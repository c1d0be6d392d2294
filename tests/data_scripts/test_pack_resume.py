"""An interrupted packing: the same command goes on with the missing shards, to the same bytes."""

import os
import signal
import subprocess
import sys
import time

from test_pack_audio import ROOT, contents, flags_for, manifest, pack

__all__ = ["manifest"]  # a fixture


def run_program(program: str, *arguments) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'data_scripts'}"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_packing_goes_on_where_it_was(manifest, tmp_path):
    whole, folder = contents(pack(manifest, tmp_path / "whole")), tmp_path / "packed"
    slowly = (
        "import sys, time, pack_audio; read = pack_audio.read_pcm\n"
        "pack_audio.read_pcm = lambda *a, **k: (time.sleep(0.3), read(*a, **k))[1]; pack_audio.main(sys.argv[1:])"
    )
    process = run_program(slowly, *flags_for(manifest, folder))
    deadline = time.monotonic() + 60
    while not (folder / "packing.jsonl").exists() or len((folder / "packing.jsonl").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = folder / "shard-00000.wav"
    before = finished.stat().st_mtime_ns
    assert not (folder / "manifest.parquet").exists()
    with open(folder / "packing.jsonl", "a") as file:
        file.write('{"shard": "shard-0000')  # a line that the kill cut short
    assert contents(pack(manifest, folder)) == whole and finished.stat().st_mtime_ns == before


def test_a_lost_or_cut_shard_is_packed_again(manifest, tmp_path):
    folder = pack(manifest, tmp_path / "packed")
    whole = contents(folder)
    (folder / "shard-00000.wav").unlink()
    os.truncate(folder / "shard-00002.wav", 100)
    (folder / "manifest.parquet").write_bytes(b"damaged")
    assert contents(pack(manifest, folder)) == whole


def test_a_full_disk_leaves_only_whole_shards(manifest, tmp_path):
    """The file size limit stands in for a full disk: both end a write with an OSError."""
    limited = (
        "import resource, sys, pack_audio; resource.setrlimit(resource.RLIMIT_FSIZE, (56_000, 56_000))\n"
        "sys.exit(pack_audio.main(sys.argv[1:]))"
    )
    folder = tmp_path / "packed"
    process = run_program(limited, *flags_for(manifest, folder))
    error = process.communicate()[1]
    assert process.returncode == 2 and "cannot be written: File too large" in error.splitlines()[-1]
    assert "Traceback" not in error and not (folder / "manifest.parquet").exists()
    assert {path.name for path in folder.glob("shard*")} <= {"shard-00000.wav", "shard-00002.wav"}  # which fit
    assert contents(pack(manifest, folder)) == contents(pack(manifest, tmp_path / "whole"))
