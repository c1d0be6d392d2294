import io
import json
import re
import threading

import numpy as np
import pytest
import torch

from w2v2.errors import UserError
from w2v2.train.log import RunLog, read_metrics

RECORD = {
    "step": 120,
    "audio_hours": 2.1,
    "loss": 3.9124,
    "accuracy": 0.1834,
    "codebook_perplexity": 41.23,
    "audio_seconds_per_second": 38.2,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Trackers:
    def __init__(self):
        self.seen = []

    def log(self, values, step):
        self.seen.append((step, values))


def written(output_dir):
    return (output_dir / "metrics.jsonl").read_text()


def lines_of(*steps):
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


def test_records_are_read_back_as_they_were_written(tmp_path):
    log = RunLog(tmp_path, total_steps=400)
    log.write(RECORD)
    log.write({"step": 121, "eval_loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [RECORD, {"step": 121, "eval_loss": 2.0}]
    log.close()


def test_each_record_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path, total_steps=400)
    log.write({"step": 1, "loss": 0.5})
    assert written(tmp_path) == '{"step": 1, "loss": 0.5}\n'
    log.close()


def test_tensors_and_numpy_scalars_become_numbers(tmp_path):
    log = RunLog(tmp_path, total_steps=4)
    log.write({"step": np.int64(3), "loss": torch.tensor(0.5), "accuracy": np.float32(0.25)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": 0.5, "accuracy": 0.25}]
    log.close()


def test_what_is_not_finite_leaves_strict_json(tmp_path):
    log = RunLog(tmp_path, total_steps=4)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert written(tmp_path) == '{"step": 1, "loss": null, "grad_norm": null}\n'


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', "\x00\x00\x00"])
def test_a_resumed_run_keeps_exactly_the_lines_up_to_its_first_step(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text(lines_of(1, 2, 2, 3, 4) + torn)
    log = RunLog(tmp_path, total_steps=9, first_step=2)
    assert written(tmp_path) == lines_of(1, 2, 2)
    log.write({"step": 3, "loss": 3 / 7})
    log.close()
    assert written(tmp_path) == lines_of(1, 2, 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_kept_line_without_its_newline_gets_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines_of(1, 2)[:-1])
    RunLog(tmp_path, total_steps=9, first_step=2).close()
    assert written(tmp_path) == lines_of(1, 2)


def test_a_fresh_run_starts_the_file_afresh(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines_of(0, 1))
    RunLog(tmp_path, total_steps=9).close()
    assert written(tmp_path) == ""


def test_reading_leaves_a_torn_last_line_out_and_names_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(1, 2) + '{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text(lines_of(1) + "nonsense\n" + lines_of(3))
    with pytest.raises(UserError, match=r"metrics\.jsonl: row 2"):
        read_metrics(path)
    with pytest.raises(UserError, match="absent"):
        read_metrics(tmp_path / "absent.jsonl")


def test_trackers_get_flat_numbers_alone(tmp_path):
    trackers = Trackers()
    log = RunLog(tmp_path, total_steps=4, trackers=trackers)
    log.write({"step": 2, "loss": torch.tensor(0.5), "note": "x", "flag": True, "none": None, "nested": {"a": 1}})
    log.close()
    assert trackers.seen == [(2, {"loss": 0.5})]


def test_other_processes_write_nothing(tmp_path, capsys):
    trackers = Trackers()
    log = RunLog(tmp_path / "run", total_steps=4, trackers=trackers, is_main=False)
    log.update(RECORD)
    log.write(RECORD)
    log.close()
    assert not (tmp_path / "run").exists() and trackers.seen == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_without_a_terminal_or_a_bar_a_logged_step_is_one_plain_line(tmp_path, monkeypatch, disable_tqdm):
    console = Terminal() if disable_tqdm else io.StringIO()
    monkeypatch.setattr("sys.stderr", console)
    log = RunLog(tmp_path, total_steps=400, disable_tqdm=disable_tqdm)
    log.update(RECORD)
    assert console.getvalue() == ""
    log.write(RECORD)
    log.close()
    line = (
        r"step 120/400 \| loss 3\.912 \| acc 0\.183 \| ppl 41\.2 \| 2\.1 h heard \| 38 x real time \| 0:00:\d\d left\n"
    )
    assert re.fullmatch(line, console.getvalue())


def test_time_left_is_what_the_steps_of_this_run_took(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr("w2v2.train.log.time.monotonic", lambda: clock[0])
    log = RunLog(tmp_path, total_steps=400, first_step=100)
    clock[0] += 50
    log.write({"step": 150, "loss": 1.0})
    log.close()
    assert capsys.readouterr().err == "step 150/400 | loss 1.000 | 0:04:10 left\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_validation_prints_a_line_with_and_without_a_bar(tmp_path, monkeypatch, terminal):
    console = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", console)
    log = RunLog(tmp_path, total_steps=400)
    log.write({"step": 120, "audio_hours": 2.1, "eval_loss": 3.5, "eval_accuracy": 0.25})
    log.close()
    line = "step 120/400 | eval_loss 3.500 | eval_acc 0.250 | 2.1 h heard"
    assert line in re.split("[\r\n]", console.getvalue())


def test_the_bar_shows_loss_accuracy_perplexity_hours_and_speed_within_100_columns(tmp_path, monkeypatch):
    console = Terminal()
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (100, 24))
    log = RunLog(tmp_path, total_steps=400_000, first_step=119)
    log.update({**RECORD, "audio_hours": 12_345.6, "audio_seconds_per_second": 3_800.0})
    log._bar.refresh()
    shown = re.split("[\r\n]", console.getvalue())[-1].strip()
    log.close()
    for part in ("120/400000", "loss 3.912", "acc 0.183", "ppl 41.2", "12346 h heard", "3800 x real time", "left"):
        assert part in shown
    assert len(shown) <= 100


def test_a_thread_that_meets_a_full_disk_says_so(tmp_path, caplog, capsys, monkeypatch):
    """As TensorBoard's does; a bug keeps its traceback."""

    def run(error):
        def fail():
            raise error

        thread = threading.Thread(target=fail, name="writer")
        thread.start()
        thread.join()

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    RunLog(tmp_path, total_steps=4).close()
    run(OSError(28, "No space left on device", "events"))
    assert capsys.readouterr().err == ""
    (record,) = caplog.records
    assert record.getMessage() == "writer has ended: events: No space left on device"
    run(ZeroDivisionError())
    assert "Traceback" in capsys.readouterr().err
