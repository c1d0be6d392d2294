"""Updates whose loss or gradient is not finite: not taken, listed with their utterances, and too many in a row end the run.

A line of `non_finite_updates.jsonl` is one such update: `step`, `loss`, `grad_norm` (null where that one is not finite) and `ids`, the
utterances of the micro-batches whose own loss was not finite; where each of them was, all that the update heard. Of these only one
may be to blame: a micro-batch is the smallest part that a loss is known of.

An overflow under fp16's loss scaler, which lowers its scale then, says nothing of the audio: it is counted and not listed.
"""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from w2v2.errors import UserError
from w2v2.train.line_file import LineFile
from w2v2.train.log import json_line, keep_steps_up_to
from w2v2.train.update import Heard

NON_FINITE_FILE = "non_finite_updates.jsonl"
NUM_NAMED = 5  # utterances that the error names


class NonFiniteUpdates:
    """Notes the updates that were not taken. A resumed run forgets those after its checkpoint, and meets them again."""

    def __init__(self, output_dir, table, most_in_a_row: int, accelerator: Accelerator, first_step: int = 0):
        """`table` gives the ids of utterances by their rows."""
        self.path = Path(output_dir) / NON_FINITE_FILE
        self.table, self.most_in_a_row, self.accelerator = table, most_in_a_row, accelerator
        self.row: list[int] = []  # the steps of the updates in a row that were not taken
        self.named: Counter[str] = Counter()  # utterances that were listed for them
        if accelerator.is_main_process:
            keep_steps_up_to(self.path, first_step)
        self.file = LineFile(self.path)

    def note(self, step: int, metrics: Mapping[str, float], heard: Heard) -> bool:
        """Whether update `step` was one of them. Call on all ranks, whose metrics are the same; only then do they exchange messages.

        Raises `UserError` when it was the last of too many in a row.
        """
        if not metrics["masked_frames"]:
            return False  # nothing could be read, which is another matter
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.row, self.named = [], Counter()
            return False
        self.row.append(step)
        if not (self.accelerator.scaler is not None and math.isfinite(metrics["loss"])):
            ids = self._suspects(heard)
            self.named.update(ids)
            self._write({"step": step, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"], "ids": ids})
        if len(self.row) >= self.most_in_a_row:
            raise UserError(self._advice())
        return True

    def flush(self) -> None:
        """Wait until the disk has all lines."""
        self.file.flush()

    def close(self) -> None:
        """The same, and say what could not be written."""
        self.file.close()

    def _suspects(self, heard: Heard) -> list[str]:
        """Ids of the update's utterances that may be to blame, over all ranks, in the order of the pieces."""
        unread = {entry["id"] for entry in heard.skipped}
        mine = [
            (plan.piece, math.isfinite(loss), [i for i in self.table[plan.crops.utterance]["id"] if i not in unread])
            for plan, loss in heard.losses
        ]
        pieces = sorted(gather_object(mine))
        is_told_apart = len({is_finite for _, is_finite, _ in pieces}) == 2
        return [i for _, is_finite, ids in pieces if not (is_told_apart and is_finite) for i in ids]

    def _write(self, entry: dict) -> None:
        if self.accelerator.is_main_process:
            self.file.append(json_line(entry))

    def _advice(self) -> str:
        found = f"{len(self.row)} updates in a row ({self.row[0]} to {self.row[-1]}) had no finite loss or gradient and were not taken"
        way_out = "lower --learning_rate or set --max_grad_norm"
        if self.accelerator.mixed_precision == "fp16":
            way_out += ", or use bf16 or fp32 in place of fp16"
        if not self.named:
            return f"{found}: fp16 overflowed at every loss scale; {way_out}"
        ids = [name for name, _ in self.named.most_common(NUM_NAMED)]
        more = f" and {len(self.named) - len(ids)} more" if len(self.named) > len(ids) else ""
        return (
            f"{found}; heard in them: {', '.join(ids)}{more} (all in {self.path}): look at these utterances and leave out what is broken; "
            f"if they are sound, {way_out}"
        )
