"""`benchmarks/save.py` measures the real save, and leaves nothing behind."""

import json
import sys
from pathlib import Path

from conftest import tiny_config
from tiny_run import Run, contents

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import save


def test_a_row_a_stage_of_a_checkpoint_as_the_run_saves_it(tmp_path, monkeypatch, capsys):
    tiny_config().save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    flags = ["--config_name", str(tmp_path / "model"), "--folder", str(tmp_path / "disk"), "--saves", "2"]
    monkeypatch.setattr(sys, "argv", ["save.py", *flags])
    save.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["seconds"]) >= {"save", "write", "fsync", "sha256", "verify", "snapshot", "longest stop"}
    assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in found["seconds"].values())
    whole = sum(map(len, contents(Run().save(tmp_path / "run", 1)).values()))
    assert abs(found["bytes"] - whole) < 2_000  # extractor, state and names of parameter groups differ
    assert list((tmp_path / "disk").iterdir()) == []
