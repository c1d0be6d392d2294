"""What befell a run: `events.jsonl`, a line an event. It is history, so no resume cuts it back.

| event | when |
|---|---|
| `start`, `resume` | before the first update; with command, versions, device, processes and precision |
| `warning` | what the program itself logs as a warning, and what a resumed run does differently |
| `skipped_updates` | the first update without finite loss or gradient, and whenever they are ten times more |
| `collapse` | the codes have collapsed, or nothing is learned |
| `stop` | the run ends before its last update, and why; after a kill there is no line, and a resume says so |
| `finish` | the last update is done, and the model is saved |

Every line has `time` (UTC), `step` (updates done), `event` and `message`. A disk that refuses lines ends no run.
Fine-tunings and probes tell `start`, `resume` and `finish` alone.
"""

import contextlib
import json
import logging
import os
import platform
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import w2v2
from w2v2.errors import UserError, hide_secrets, printable
from w2v2.train.collapse import Collapsed
from w2v2.train.launch import Stopped
from w2v2.train.log import METRICS_FILE, announce
from w2v2.train.records import Lines, parse_record
from w2v2.train.state import RunState

EVENTS_FILE = "events.jsonl"
PACKAGES = ("torch", "transformers", "accelerate", "datasets")


class EventLog(logging.Handler):
    """Notes the warnings that are logged while it is entered, and how the run ends. The main process alone writes.

    What is met before `begin` waits for it: until then it is not known whether the folder's run goes on or is deleted.
    """

    def __init__(self, args, accelerator: Accelerator):
        super().__init__(logging.WARNING)
        self.path, self.accelerator = Path(args.output_dir) / EVENTS_FILE, accelerator
        self._lines: Lines | None = None
        self._state: RunState | None = None
        self._early: list[dict] = []

    def __enter__(self) -> "EventLog":
        if self.accelerator.is_main_process:
            logging.getLogger("w2v2").addHandler(self)
        return self

    @property
    def has_begun(self) -> bool:
        """Whether this process has written into the run's folder."""
        return self._lines is not None and self.accelerator.is_main_process

    def begin(self, state: RunState, checkpoint: Path | None) -> None:
        """The run starts, or goes on from `checkpoint`; what differs from the checkpoint's run is a warning each."""
        self._state, self._lines = state, Lines(self.path, is_main=self.accelerator.is_main_process)
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            self._lines.waiting = b"" if file.read(1) == b"\n" else b"\n"  # a kill cut the last line short
        for entry in self._early:
            self._lines.append(entry | {"step": state.step})
        where, details = describe_process(
            self.accelerator.device, self.accelerator.num_processes, self.accelerator.mixed_precision
        )
        done, ending = "from the first update", ""
        if checkpoint:
            done, ending = f"from {checkpoint}, update {state.step:,}", _tell_kill(self.path, state.step)
            notes = "".join(f"\nwarning       {note}" for note in state.notes)
            announce(self.accelerator, f"resuming      {checkpoint}, after {state.step:,} updates{ending}{notes}")
        self.add("resume" if checkpoint else "start", f"{done} of {state.max_steps:,}, {where}{ending}", **details)
        for note in state.notes:
            self.add("warning", note)

    def emit(self, record: logging.LogRecord) -> None:
        self.add(getattr(record, "event", "warning"), record.getMessage())

    def add(self, event: str, message: str, **more) -> None:
        """Write one event at the step at hand."""
        entry = make_event(event, message, self._state.step if self._state else 0) | more
        with self.lock:
            self._lines.append(entry) if self._lines else self._early.append(entry)

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        logging.getLogger("w2v2").removeHandler(self)
        if self._lines is None:
            return  # it was a dry run, or ended before it began
        if error is None:
            self.add("finish", f"{self._state.step:,} updates, {self._state.progress()['audio_hours']:,.1f} h heard")
        if isinstance(error, Collapsed):
            self.add("collapse", str(error))
        if error is not None:
            self.add("stop", "the run collapsed" if isinstance(error, Collapsed) else _describe(error))
        self._lines.sync()


def _tell_kill(path: Path, step: int) -> str:
    """What a resume at `step` says of a run that wrote no end, with its last event or record; else nothing."""
    files = [file for file in (path, path.with_name(METRICS_FILE)) if file.is_file()]
    last = [next(filter(None, map(parse_record, reversed(file.read_bytes().splitlines()))), {}) for file in files]
    if path not in files or last[0].get("event") in ("stop", "finish"):
        return ""
    step = max(step, *(record.get("step", 0) for record in last))
    when = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat(timespec="seconds")
    return f"; the run before ended without a word after update {step:,} at {when}: killed, or out of memory?"


def make_event(event: str, message: str, step: int) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": now, "step": step, "event": event, "message": printable(hide_secrets(" ".join(message.split())))}


def describe_process(device: torch.device, num_processes: int, precision: str) -> tuple[str, dict[str, Any]]:
    """The devices in words, and what a start or resume tells beside its message; `precision` as accelerate names it."""
    precision = "fp32" if precision == "no" else precision
    details = {
        "command": [printable(hide_secrets(word)) for word in sys.argv],
        "versions": {"python": platform.python_version(), "w2v2": w2v2.__version__}
        | {name: version(name) for name in PACKAGES},
        "device": name_device(device),
        "num_processes": num_processes,
        "precision": precision,
    }
    return f"on {num_processes} × {details['device']}, {precision}", details


def note_start(args, checkpoint: str | None = None) -> None:
    """The start of a fine-tuning or probe, or that it goes on. Call on the main process, when the folder is ready."""
    path, step = Path(args.output_dir, EVENTS_FILE), 0
    if checkpoint:
        step = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    precision = getattr(args, "mixed_precision", "no")  # of Trainer's arguments: of --bf16, or the launcher's
    where, details = describe_process(torch.device(args.device), getattr(args, "world_size", 1), precision)
    event, since = ("resume", f"from {checkpoint}, ") if checkpoint else ("resume" if path.exists() else "start", "")
    Lines(path).append(make_event(event, f"{since}{where}", step) | details)


def note_finish(args, step: int = 0) -> None:
    """The end of such a run, after so many updates. Call on the main process."""
    Lines(Path(args.output_dir, EVENTS_FILE)).append(
        make_event("finish", f"{step:,} updates" if step else "done", step)
    )


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _describe(error: BaseException) -> str:
    """The last line of an error, without the traceback that a loader's worker sends along."""
    last = (str(error).strip().splitlines() or [""])[-1]
    if isinstance(error, UserError | Stopped):
        return re.sub(r"^w2v2\.errors\.\w+: ", "", last)
    return f"{type(error).__name__}: {last}".removesuffix(": ")
