"""Records: what a run writes line by line, JSON objects with a `step`.

    metrics.jsonl               the losses and measures of an update          `log.RunLog`
    skipped_audio.jsonl         training audio that cannot be read            `SkippedAudio`
    skipped_validation.jsonl    validation audio that cannot be read          `SkippedValidation`
    non_finite_updates.jsonl    updates whose loss or gradient is not finite  `SkippedUpdates`
    codebook_use.jsonl          how often each codebook entry was used        `CodebookUse`

A resumed run cuts the files back to its checkpoint and meets again what came after it: its lines are those of an
uninterrupted run.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from w2v2.errors import UserError
from w2v2.train.durable import write_file
from w2v2.train.state import Totals

logger = logging.getLogger(__name__)

NON_FINITE_FILE = "non_finite_updates.jsonl"
NUM_NAMED = 5  # utterances that the error names


class Lines:
    """A file that records are added to. Those that a full disk refuses wait in memory for the next try.

    Other processes than the main one never write.
    """

    def __init__(self, path: Path, *, is_main: bool = True):
        self.path, self.is_main = Path(path), is_main
        self.waiting, self._is_failing = b"", False  # lines that the disk has not taken yet

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record at once. A full or failing disk is a warning, once, and the line is tried again later."""
        if self.is_main:
            self.waiting += json_line(record)
            self._write()

    def sync(self) -> None:
        """Wait until the disk has all lines, so that no checkpoint outlives the lines before it."""
        if self.is_main and (self.waiting or self.path.exists()):
            self._write(sync=True)

    def _write(self, sync: bool = False) -> None:
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:  # a line that the disk cut short goes on where it was cut
                    self.waiting = self.waiting[file.write(self.waiting) :]
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            was_failing, self._is_failing = self._is_failing, True  # first: the warning may be a line of this file
            if not was_failing:
                logger.warning("%s cannot be written (%s): its lines are kept for later", self.path, error.strerror)
        else:
            self._is_failing = False


class StepRecords(Lines):
    """Records in the order of their steps.

    A run resumed at `first_step` keeps the records of steps 1 to `first_step`, byte for byte (0: it starts afresh).
    """

    def __init__(
        self, path: Path, first_step: int = 0, *, is_main: bool = True, head: Sequence[Mapping[str, Any]] = ()
    ):
        """Cut the file back. `head` comes before all other records, and in place of those with the same `id`."""
        super().__init__(path, is_main=is_main)
        self.kept = list(head)
        before = self.path.read_bytes() if self.path.exists() else b""
        content, ids = b"".join(map(json_line, head)), {record.get("id", "") for record in head}
        for line in before.splitlines():
            record = parse_record(line)
            if record and 0 < record["step"] <= first_step and record.get("id") not in ids:
                self.kept.append(record)
                content += line + b"\n"
        if is_main and content != before:
            write_file(self.path, content)


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as one line of JSON. JSON has no word for a number that is not finite: it becomes `null`."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a line that a kill cut short, and for anything else without a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) in (int, float) else None


class CodebookUse:
    """How often each codebook entry was a masked frame's most likely code.

    A line is of a validation; without one, of the updates since the last line, at each save.
    """

    file = "codebook_use.jsonl"

    def __init__(self, args, accelerator: Accelerator, first_step: int = 0):
        self.records = StepRecords(Path(args.output_dir) / self.file, first_step, is_main=accelerator.is_main_process)
        self._counts = 0  # (G, V), all ranks'

    def add(self, totals: Totals) -> None:
        self._counts = self._counts + totals.sums.codes_hard

    def write(self, progress: Mapping[str, float]) -> None:
        """Write what was added as a line, unless a run that was killed here has written it; then count anew."""
        is_known = any(record["step"] == progress["step"] for record in self.records.kept)
        if torch.is_tensor(self._counts) and not is_known:
            counts = {"counts": self._counts.long().tolist()}
            self.records.append({name: progress[name] for name in ("step", "audio_hours")} | counts)
        self._counts = 0


class SkippedAudio:
    """Unreadable files: listed once each, and too many of them end the run.

    The `step` of a line is the update that met the file, 0 if it was met before the first update.
    """

    flag, file = "--train_data", "skipped_audio.jsonl"

    def __init__(self, args, accelerator: Accelerator, num_utterances: int, found: Sequence[dict], first_step: int = 0):
        """`found` are the files met before the first update. Raises `UserError` beyond `max_skipped_fraction`."""
        self.num_utterances, self.max_fraction = num_utterances, args.max_skipped_fraction
        path, met = Path(args.output_dir) / self.file, {}
        for entry in found:
            met.setdefault(entry["id"], entry | {"step": 0})
        self.records = StepRecords(path, first_step, is_main=accelerator.is_main_process, head=[*met.values()])
        self.ids = {entry["id"] for entry in self.records.kept}
        self._told = 0  # how many files were told of
        self._check(found)

    def add(self, skipped: Sequence[dict[str, Any]], step: int) -> None:
        """Note utterances that update `step` could not read. Raises `UserError` beyond `max_skipped_fraction`."""
        for entry in skipped:
            if entry["id"] not in self.ids:
                self.ids.add(entry["id"])
                self.records.append(entry | {"step": step})
        self._check(skipped)

    def _check(self, skipped: Sequence[dict[str, Any]]) -> None:
        share = f"{len(self.ids)} of {self.num_utterances} files cannot be read"
        if skipped and len(self.ids) > self.max_fraction * self.num_utterances:
            first = skipped[0]
            raise UserError(
                f"{self.flag}: {first['audio']}: {first['reason']}; {share}, more than --max_skipped_fraction {self.max_fraction:g} allows: "
                f"mend or remove them (listed in {self.records.path})"
            )
        if self.records.is_main and len(self.ids) > 10 * self._told:  # the first, and whenever they are ten times more
            logger.warning("%s: %s so far and are skipped (listed in %s)", self.flag, share, self.records.path)
            self._told = len(self.ids)


class SkippedValidation(SkippedAudio):
    """The same of validation audio, whose figures would mislead without it."""

    flag, file = "--validation_data", "skipped_validation.jsonl"


class SkippedUpdates:
    """Updates whose loss or gradient is not finite: not taken, listed, told of, and too many in a row end the run.

    The `ids` of a line are the utterances of the micro-batches whose own loss was not finite, or of all where that does
    not tell them apart. An overflow under fp16's loss scaler says nothing of the audio: it is counted, not listed.
    """

    def __init__(self, args, accelerator: Accelerator, table, first_step: int = 0):
        """`table` gives the ids of utterances by their rows."""
        self.table, self.most_in_a_row, self.accelerator = table, args.max_non_finite_updates, accelerator
        self.row: list[int] = []  # the steps of the updates in a row that were not taken
        self.named: Counter[str] = Counter()  # utterances that were listed for them
        self._met = self._told = 0  # skipped updates since the start or resume, and how many of them were told of
        path = Path(args.output_dir) / NON_FINITE_FILE
        self.records = StepRecords(path, first_step, is_main=accelerator.is_main_process)

    def note(self, step: int, metrics: Mapping[str, float], totals: Totals) -> bool:
        """Whether update `step` was skipped. Call on all ranks. Raises `UserError` after too many in a row."""
        if not metrics["masked_frames"]:
            return False  # nothing could be read, which `SkippedAudio` counts
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.row, self.named = [], Counter()
            return False
        self.row.append(step)
        is_overflow = self.accelerator.scaler is not None and math.isfinite(metrics["loss"])
        if not is_overflow:
            ids = self._suspects(totals)
            self.named.update(ids)
            self.records.append({"step": step, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "ids": ids})
        self._tell(f"fp16 overflowed at update {step}" if is_overflow else f"listed in {self.records.path}")
        if len(self.row) >= self.most_in_a_row:
            raise UserError(self._advice())
        return True

    def _tell(self, detail: str) -> None:
        self._met += 1
        if self.records.is_main and self._met > 10 * self._told:  # the first, and whenever they are ten times more
            text = "updates without a finite loss or gradient so far, which were not taken: %s (%s)"
            logger.warning(text, f"{self._met:,}", detail, extra={"event": "skipped_updates"})
            self._told = self._met

    def _suspects(self, totals: Totals) -> list[str]:
        """Ids of the update's utterances that may be to blame, over all ranks, in the order of the pieces."""
        unread = {entry["id"] for entry in totals.skipped}
        mine = [
            (plan.piece, math.isfinite(loss), [i for i in self.table[plan.crops.utterance]["id"] if i not in unread])
            for plan, loss in totals.losses
        ]
        pieces = sorted(gather_object(mine))
        is_told_apart = len({is_finite for _, is_finite, _ in pieces}) == 2
        return [i for _, is_finite, ids in pieces if not (is_told_apart and is_finite) for i in ids]

    def _advice(self) -> str:
        rows = f"{len(self.row)} updates in a row ({self.row[0]} to {self.row[-1]})"
        found = f"{rows} had no finite loss or gradient and were not taken"
        is_half = self.accelerator.mixed_precision == "fp16"
        way_out = "lower --learning_rate or set --max_grad_norm" + ", or use bf16 or fp32 in place of fp16" * is_half
        if not self.named:
            return f"{found}: fp16 overflowed at every loss scale; {way_out}"
        ids = [name for name, _ in self.named.most_common(NUM_NAMED)]
        more = f" and {len(self.named) - len(ids)} more" if len(self.named) > len(ids) else ""
        return (
            f"{found}; heard in them: {', '.join(ids)}{more} (all in {self.records.path}): look at these utterances and leave "
            f"out what is broken; if they are sound, {way_out}"
        )
