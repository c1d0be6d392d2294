"""What a run says of itself: the console line, `metrics.jsonl` and the trackers.

A record is one flat dictionary for one step. Names in training records, all over the whole effective batch
(validation: the first three and the measures, under `eval_`):

| name | meaning |
|---|---|
| `step`, `epoch` | updates done; passes over the training data, as a fraction |
| `audio_hours` | hours of audio heard so far, after cropping: the x axis of every curve |
| `loss`, `contrastive_loss`, `diversity_loss`, `feature_penalty` | means over masked frames |
| `accuracy` | share of masked frames whose own code beats every distractor |
| `constant_guess_accuracy` | the share that always guessing the utterance's commonest codes would earn |
| `codebook_perplexity`, `codebook_perplexity_hard` | exp of the entropy of the mean code, summed over groups |
| `codebook_coverage_1` … `_G` | share of a group's entries that are any masked frame's most likely code |
| `codebook_entropy_1` … `_G` | entropy of these codes' histogram in a group, in nats: log V where all are used alike |
| `code_entropy` | mean entropy of one frame's code distribution, in nats, averaged over groups |
| `distractors_left` | mean distractors of a frame that are not the positive's own code |
| `gumbel_temperature`, `learning_rate`, `grad_norm` | as used in this update; the norm before clipping |
| `masked_frames`, `batch_hours` | size of the effective batch |
| `audio_seconds_per_second`, `data_wait_fraction` | throughput; share of the time spent waiting for data |
| `cropped_fraction`, `padded_fraction` | share of audio cropped away; share of the micro-batches that is no audio |
| `skipped_audio` | unreadable files met so far |
| `num_processes` | devices at work: with hours heard and throughput, the device-hours |
| `skipped_updates` | updates so far that were not taken, because loss or gradient was not finite |
"""

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from w2v2.errors import UserError, hide_secrets, one_line
from w2v2.train.records import StepRecords, parse_record

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# Around writing to a terminal, which a run outlives: closed, on a full disk, or a pipe without a reader.
STREAM_MAY_DIE = contextlib.suppress(OSError, ValueError)
_BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar:10}| {desc}"
_LONGEST_WINDOW = 10_000  # updates whose pace is looked at


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, in order, without a last line that a kill tore.

    Raises `UserError` where the file cannot be read, or a line before the last is no record.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the metrics.jsonl of a run") from None
    records = [(row, parse_record(line)) for row, line in enumerate(lines, start=1) if line.strip()]
    for row, record in records:
        if record is None and row < len(lines):
            raise UserError(f"{path}: row {row} is not a record with a step; remove that line")
    return [record for _, record in records if record is not None]


class Pace:
    """How long a run takes yet."""

    def __init__(self, total_steps: int, first_step: int, *cycles: float):
        """`cycles` are the updates between two validations, and between two saves."""
        self.total_steps, self._started = total_steps, (first_step, time.monotonic())
        # (updates done, when) of a window that holds as many validations and saves as are due within it.
        self._marks = deque(maxlen=min(int(max(cycles)), _LONGEST_WINDOW) + 1)

    def mark(self, step: int) -> None:
        """An update is done."""
        self._marks.append((step, time.monotonic()))

    def time_left(self, step: int) -> str:
        """At the pace of the newest updates, with the validations and saves among them.

        The first update, which compiles and fills caches, counts only as long as there is no other.
        """
        since, started = self._marks[0] if len(self._marks) > 1 else self._started
        seconds = (time.monotonic() - started) / max(step - since, 1) * max(self.total_steps - step, 0)
        days, rest = divmod(round(seconds), 86_400)
        return (f"{days} d {rest // 3600} h" if days else tqdm.format_interval(rest)) + " left"


class RunLog:
    """Console, `metrics.jsonl` and trackers of one run; on processes other than the main one it does nothing.

    A bar is drawn where standard error is a terminal; elsewhere, and with `disable_tqdm`, a logged step is a line.
    """

    def __init__(self, args, accelerator: Accelerator, first_step: int = 0):
        """A resumed run's file is cut back to `first_step`."""
        self._first_step, self._pace = first_step, Pace(args.max_steps, first_step, args.eval_steps, args.save_steps)
        self._is_main, self._trackers = accelerator.is_main_process, list(accelerator.trackers)
        self._bar, self._redirection = None, contextlib.ExitStack()
        self.records = StepRecords(Path(args.output_dir) / METRICS_FILE, first_step, is_main=self._is_main)
        if self._is_main and not args.disable_tqdm and sys.stderr.isatty():
            options = dict(bar_format=_BAR_FORMAT, dynamic_ncols=True, mininterval=0.5, file=sys.stderr)
            self._bar = tqdm(total=args.max_steps, initial=first_step, **options)
            self._redirection.enter_context(logging_redirect_tqdm())  # a warning has a line of its own

    def update(self, record: Mapping[str, Any]) -> None:
        """Advance the clock and the bar to this update. What a narrow terminal has no room for is left out."""
        self._pace.mark(record["step"])
        if self._bar is not None:
            with STREAM_MAY_DIE:
                parts = [self._pace.time_left(record["step"]), *_describe(record)]
                bar = self._bar.format_dict
                room = (bar["ncols"] or 80) - len(f"{bar['total']}/{bar['total']} |{'':10}| ")
                while len(parts) > 1 and len(" | ".join(parts)) > room:
                    parts.pop()
                self._bar.set_description_str(" | ".join(parts), refresh=False)
                self._bar.update(record["step"] - self._bar.n)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one record: a line of `metrics.jsonl`, the trackers, and the console."""
        if not self._is_main:
            return
        self.records.append(record)
        numbers = {name: value for name, value in record.items() if name != "step" and _is_number(value)}
        for tracker in [*self._trackers]:
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:  # as what TensorBoard's writing thread met; it is dead from then on
                note = "tracker %s cannot write (%s): it gets nothing from step %d on"
                logger.warning(note, tracker.name, one_line(error), record["step"])
                self._trackers.remove(tracker)
        if self._bar is None or "eval_loss" in record:
            with STREAM_MAY_DIE:
                tqdm.write(self._line(record), file=sys.stderr)

    def lacks_validation(self) -> bool:
        """Whether the step that the run resumed at has no validation yet."""
        return not any(r["step"] == self._first_step and "eval_loss" in r for r in self.records.kept)

    def close(self) -> None:
        self._redirection.close()
        if self._bar is not None:
            with STREAM_MAY_DIE:
                self._bar.close()

    def _line(self, record: Mapping[str, Any]) -> str:
        is_validation = "eval_loss" in record
        parts = _describe(record, prefix="eval_" if is_validation else "")
        end = [] if is_validation else [self._pace.time_left(record["step"])]
        return " | ".join([f"step {record['step']}/{self._pace.total_steps}", *parts, *end])


def announce(accelerator: Accelerator, text: str) -> None:
    """Print a line for people, once for all ranks. A dead stream ends no run."""
    if accelerator.is_main_process:
        with STREAM_MAY_DIE:
            print(hide_secrets(text), flush=True)


def _describe(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    """loss 3.912, acc 0.183, guess 0.071, ppl 41.2, 2.1 h heard, 38 x real time: of the values that are there."""
    parts = {
        prefix + "loss": prefix + "loss {:.3f}",
        prefix + "accuracy": prefix + "acc {:.3f}",
        prefix + "constant_guess_accuracy": prefix + "guess {:.3f}",
        prefix + "codebook_perplexity": prefix + "ppl {:.1f}",
        "audio_hours": "{:.1f} h heard" if (record.get("audio_hours") or 0) < 1000 else "{:.0f} h heard",
        "audio_seconds_per_second": "{:.0f} x real time",
    }
    return [form.format(record[name]) for name, form in parts.items() if _is_number(record.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
