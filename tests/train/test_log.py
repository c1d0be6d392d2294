"""A run's records come back as they were written, as numbers that strict JSON holds, and the console has a line of
them.
"""

import io
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest

from w2v2.errors import UserError
from w2v2.train.log import RunLog, read_metrics

RECORD = dict(step=120, audio_hours=2.1, loss=3.9124, accuracy=0.1834, codebook_perplexity=41.23)
RECORD |= dict(audio_seconds_per_second=38.2)
VALIDATION = {"step": 120, "audio_hours": 2.1, "eval_loss": 3.5, "eval_accuracy": 0.25}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Tracker:
    name = "one"

    def __init__(self, dies_at=None):
        self.seen, self.dies_at = [], dies_at

    def log(self, values, step):
        if step == self.dies_at:
            raise OSError(28, "No space left on device")
        self.seen.append((step, values))


def build(folder, *trackers, first_step=0, **flags):
    accelerator = SimpleNamespace(is_main_process=True, trackers=trackers)
    values = dict(output_dir=folder, max_steps=400, disable_tqdm=False, eval_steps=50, save_steps=100) | flags
    return RunLog(SimpleNamespace(**values), accelerator, first_step)


def lines_of(*steps):
    return "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in steps)


def test_records_are_on_disk_at_once_and_come_back(tmp_path):
    log = build(tmp_path)
    for count, record in enumerate([RECORD, VALIDATION], start=1):
        log.write(record)
        assert read_metrics(tmp_path / "metrics.jsonl") == [RECORD, VALIDATION][:count]
    log.close()


def test_a_tracker_that_dies_harms_no_other(tmp_path, caplog):
    trackers = Tracker(), Tracker(dies_at=2), Tracker()
    log = build(tmp_path, *trackers)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    assert [[step for step, _ in tracker.seen] for tracker in trackers] == [[1, 2, 3], [1], [1, 2, 3]]
    assert caplog.messages == ["tracker one cannot write (No space left on device): it gets nothing from step 2 on"]


def test_trackers_get_every_flat_number(tmp_path):
    tracker = Tracker()
    log = build(tmp_path, tracker)
    log.write({"step": 3, "loss": 0.5, "accuracy": 0.25, "grad_norm": np.inf})
    log.write({"step": 4, "loss": np.nan, "note": "x", "flag": True, "none": None, "deep": {"a": 1}})
    log.close()
    (_, numbers), (_, others) = tracker.seen
    assert numbers == {"loss": 0.5, "accuracy": 0.25, "grad_norm": np.inf} and others.keys() == {"loss"}


def test_reading_passes_over_a_torn_end_but_names_a_broken_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines_of(1, 2) + '{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text(lines_of(1) + "nonsense\n" + lines_of(3))
    with pytest.raises(UserError, match=r"metrics\.jsonl: row 2"):
        read_metrics(path)
    with pytest.raises(UserError, match="absent"):
        read_metrics(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_without_a_bar_a_logged_step_is_one_line(tmp_path, monkeypatch, disable_tqdm):
    console, clock = Terminal() if disable_tqdm else io.StringIO(), [1000.0]
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setattr("w2v2.train.log.time.monotonic", lambda: clock[0])
    log = build(tmp_path, first_step=100, disable_tqdm=disable_tqdm)
    clock[0] += 20
    log.update(RECORD)
    log.write(RECORD)
    log.write(VALIDATION)
    log.close()
    step, validation = console.getvalue().splitlines()
    assert step == "step 120/400 | loss 3.912 | acc 0.183 | ppl 41.2 | 2.1 h heard | 38 x real time | 04:40 left"
    assert validation == "step 120/400 | eval_loss 3.500 | eval_acc 0.250 | 2.1 h heard"


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 160])
def test_the_bar_fits_a_terminal_and_validation_has_a_line(tmp_path, monkeypatch, columns):
    """The time that is left is always there, and no part is cut."""
    console = Terminal()
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 24))
    log = build(tmp_path, first_step=119, max_steps=400_000)
    log.update({**RECORD, "audio_hours": 12_345.6, "audio_seconds_per_second": 3_800.0})
    log._bar.refresh()
    shown = re.split("[\r\n]", console.getvalue())[-1].strip()
    log.write(VALIDATION)
    log.close()
    (described,) = re.fullmatch(r"120/400000 \|.{10}\| (.*)", shown).groups()
    left, *parts = described.split(" | ")
    assert left.endswith(" left") and len(shown) <= columns
    every = ["loss 3.912", "acc 0.183", "ppl 41.2", "12346 h heard", "3800 x real time"]
    assert parts == every[: len(parts)] and (len(parts) == 5) == (columns >= 120) and len(parts) >= (columns > 40)
    assert any("eval_loss 3.500" in line for line in re.split("[\r\n]", console.getvalue()))


def test_a_warning_beside_the_bar_has_a_line_of_its_own(tmp_path, monkeypatch):
    console = Terminal()
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(console)])
    log = build(tmp_path)
    log.update(RECORD)
    log._bar.refresh()
    logging.getLogger("w2v2").warning("a tracker died")
    log.close()
    logging.getLogger("w2v2").warning("after the bar")
    lines = [re.split("\r", line)[-1] for line in console.getvalue().split("\n")]
    assert "a tracker died" in lines and "after the bar" in lines


def test_the_time_left_is_that_of_a_steady_pace(tmp_path, monkeypatch):
    """A resumed run: a slow first update, then 1 s each, a validation of 10 s every 50, a save of 30 s every 100."""
    console, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setattr("w2v2.train.log.time.monotonic", lambda: clock[0])
    log, ends = build(tmp_path, first_step=100, max_steps=1_000), {}
    for step in range(101, 1_001):
        clock[0] += 50.0 if step == 101 else 1.0
        log.update({"step": step, "loss": 0.5})
        if step % 10 == 0 or step == 101:
            log.write({"step": step, "loss": 0.5})
            text = re.search(r"([\d:]+) left\n$", console.getvalue())[1]
            ends[step] = clock[0] + sum(int(x) * 60**i for i, x in enumerate(reversed(text.split(":"))))
        clock[0] += 10.0 * (step % 50 == 0) + 30.0 * (step % 100 == 0)
    assert ends[101] == 50 * 900  # nothing but the first update is known
    assert ends[150] == 50 + 899  # neither a validation nor a save is known
    last = clock[0] - 40  # what follows the last update is no part of it
    assert all(abs(end - last) <= 40 for step, end in ends.items() if step > 200)


def test_days_that_are_left_are_no_minutes(tmp_path, monkeypatch):
    console, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("sys.stderr", console)
    monkeypatch.setattr("w2v2.train.log.time.monotonic", lambda: clock[0])
    log = build(tmp_path, max_steps=100_001)
    clock[0] = 4.5
    log.update({"step": 1})
    log.write({"step": 1})
    assert console.getvalue() == "step 1/100001 | 5 d 5 h left\n"
