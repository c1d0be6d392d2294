"""What a run does about a collapse: a warning, then an end, with the last checkpoint from before it left in place."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from w2v2.data.utterances import Utterances, silent_share
from w2v2.errors import UserError
from w2v2.train.causes import likely_causes
from w2v2.train.collapse import MEASURES, CollapseWatch, Finding, Limits
from w2v2.train.log import METRICS_FILE, read_metrics
from w2v2.train.resume import checkpoints

logger = logging.getLogger(__name__)


class Watch:
    """Shows a run's training records to the criteria. Every rank has one, sees the same records and ends alike."""

    def __init__(self, args, config, utterances: Utterances, accelerator: Accelerator, first_step: int = 0):
        """`metrics.jsonl` holds what an earlier part of the run logged, up to `first_step`. Call on all ranks."""
        self.args, self.config, self.utterances, self.accelerator = args, config, utterances, accelerator
        self.limits = Limits.of(args, config)
        self.criteria = CollapseWatch(self.limits)
        if args.collapse_action != "none" and first_step:
            for record in self._earlier(Path(args.output_dir) / METRICS_FILE):
                self.criteria.add(record)
            self.criteria.unsettle()

    def _earlier(self, path: Path) -> list[dict[str, Any]]:
        """What the criteria look at, as the main process reads it."""
        found = [None]
        if self.accelerator.is_main_process:
            records = read_metrics(path) if path.exists() else []
            found = [[{name: r[name] for name in ("step", *MEASURES)} for r in records if r.keys() >= set(MEASURES)]]
        return broadcast_object_list(found)[0]

    def see(self, record: Mapping[str, Any]) -> None:
        """Take the next training record. Raises `UserError` when a collapse has lasted for the whole window, if it is to stop the run."""
        if self.args.collapse_action == "none" or (finding := self.criteria.add(record)) is None:
            return
        if finding.is_sure and self.args.collapse_action == "stop":
            raise UserError(self._message(finding, record))
        if self.accelerator.is_main_process:
            logger.warning("%s", self._message(finding, record))

    def keep(self, save_total_limit: int) -> int:
        """Checkpoints to keep: all of them (0) as long as the next ones may be of a collapsed model."""
        return 0 if self.criteria.is_suspicious else save_total_limit

    def _message(self, finding: Finding, record: Mapping[str, Any]) -> str:
        what = "the codes have collapsed" if finding.criteria & {"codes", "distractors"} else "the run learns nothing"
        window = f"--collapse_window_steps {self.limits.window_steps}"
        lasted = f"for all of {window}" if finding.is_sure else f"for half of {window}; the run "
        if not finding.is_sure:
            lasted += "stops at its end" if self.args.collapse_action == "stop" else "goes on"
        causes = likely_causes(
            finding, record, self.args, self.config, self.accelerator.mixed_precision, silent_share(self.utterances)
        )
        why = f"Likely here: {'; '.join(causes)}" if causes else "No setting of this run is unusual: listen to its data"
        return f"{what}: {finding.text} ({lasted}). {why}. {self._way_out(finding)}"

    def _way_out(self, finding: Finding) -> str:
        before = [f for f in checkpoints(self.args.output_dir) if int(f.name.rpartition("-")[2]) < finding.since]
        if not before:
            advice = "No checkpoint is from before it: start anew with other settings"
        else:
            advice = (
                f"{before[-1]} is from before it: start from its weights with other settings (--model_name_or_path)"
            )
        return advice + ("; --collapse_action warn would go on" if finding.is_sure else "")
