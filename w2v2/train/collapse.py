"""Whether a run has collapsed, told from its records alone, and what the run does then.

| criterion | a record is bad where | counted after |
|---|---|---|
| codes | the most likely codes' perplexity is below 2 a group (1: one code) | half the diversity loss is there |
| distractors | below a tenth of a frame's distractors carry another code than the positive | the same |
| accuracy | it is below 3 / (1 + distractors left) | warm-up, at least a window |
| loss | the contrastive loss stays within 0.1 % of itself | the same |

The plateau that runs begin on has up to 2.5 times chance, and in a run that learns, batches alone vary the loss by 0.5 %.
Bad records without a gap over half a window are a warning, over a whole one a collapse. All of it is a function of the
records: a resumed run reads them again. Records without finite figures count neither way.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from w2v2.data.utterances import Utterances, silent_share
from w2v2.errors import UserError
from w2v2.train.collapse_causes import FEW_CODES, NO_LEARNING, likely_causes
from w2v2.train.launch import on_main_process
from w2v2.train.log import METRICS_FILE, read_metrics
from w2v2.train.resume import checkpoints, step_of
from w2v2.train.schedule import num_warmup_steps

logger = logging.getLogger(__name__)

CODES_PER_GROUP = 2.0
LEAST_DISTRACTORS = 0.1  # of those drawn
TIMES_CHANCE = 3.0
LOSS_SPREAD = 1e-3  # (greatest − least) / greatest
FEWEST_RECORDS = 4  # in a window, however rarely a run logs
MEASURES = ("codebook_perplexity_hard", "distractors_left", "accuracy", "contrastive_loss")


@dataclass(frozen=True)
class Limits:
    """What the criteria need to know of a run."""

    window_steps: int
    num_groups: int
    num_distractors: int
    codes_after: int  # updates before which few codes mean nothing
    learning_after: int  # updates before which nothing needs to be learned

    @classmethod
    def of(cls, args, config) -> "Limits":
        """From the flags and the model's configuration."""
        window = args.collapse_window_steps or min(2_000, max(500, args.max_steps // 10))
        has_diversity = config.diversity_loss_weight > 0
        return cls(
            window_steps=window,
            num_groups=config.num_codevector_groups,
            num_distractors=config.num_negatives,
            codes_after=args.diversity_delay_steps + args.diversity_warmup_steps // 2 if has_diversity else 0,
            learning_after=max(window, num_warmup_steps(args.warmup_steps, args.max_steps)),
        )


class Finding(NamedTuple):
    """A collapse that may be under way, or (`is_sure`) that has lasted for the whole window."""

    is_sure: bool
    since: int  # update of the first bad record
    criteria: frozenset[str]
    text: str  # the criteria with their figures and thresholds


class _Stretch(NamedTuple):
    """Bad records without a gap, up to the newest."""

    since: int
    num_counted: int
    text: str  # the newest figure and its threshold


class Criteria:
    """Fed with training records in order; says once each when a collapse is suspected and when it is sure."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.counted_after = dict.fromkeys(FEW_CODES, limits.codes_after)
        self.counted_after |= dict.fromkeys(NO_LEARNING, limits.learning_after)
        self.first: int | None = None  # update of the first record
        self.stretches: dict[str, _Stretch] = {}
        self.losses: list[tuple[int, float]] = []  # (step, contrastive loss) of the newest records that are alike
        self.level = 0  # 1: warned of, 2: sure

    @property
    def is_suspicious(self) -> bool:
        """Whether the newest record is bad, earlier ones were not, and the collapse is not sure yet."""
        return self.level < 2 and any(stretch.since != self.first for stretch in self.stretches.values())

    def add(self, record: Mapping[str, Any]) -> Finding | None:
        """Take the next training record; a finding where this one makes it a suspicion, or a certainty."""
        if not all(isinstance(record.get(name), int | float) and math.isfinite(record[name]) for name in MEASURES):
            return None
        step = int(record["step"])
        self.first = step if self.first is None else self.first
        self.stretches = {name: self._longer(name, step, text) for name, text in self._bad(record).items()}
        self.stretches |= self._flat_loss(step, record["contrastive_loss"])
        if not self.stretches:
            self.level = 0
        for level, share in ((2, 1.0), (1, 0.5)):
            lasting = {name: s for name, s in self.stretches.items() if self._lasts(name, s, step, share)}
            if lasting and level > self.level:
                self.level = level
                text = "; ".join(f"{s.text}, since update {s.since:,}" for s in lasting.values())
                return Finding(level == 2, min(s.since for s in lasting.values()), frozenset(lasting), text)
        return None

    def _longer(self, name: str, step: int, text: str) -> _Stretch:
        """The criterion's stretch with one more record."""
        old = self.stretches.get(name, _Stretch(step, 0, text))
        return _Stretch(old.since, old.num_counted + (step > self.counted_after[name]), text)

    def _lasts(self, name: str, stretch: _Stretch, step: int, share: float) -> bool:
        num_updates = step - max(stretch.since, self.counted_after[name])
        return num_updates >= share * self.limits.window_steps and stretch.num_counted >= share * FEWEST_RECORDS

    def _bad(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Criterion → what is bad about this record, but for the loss, which one record does not show."""
        bad, limits, (perplexity, left, accuracy, _) = {}, self.limits, (record[name] for name in MEASURES)
        if perplexity < (least := CODES_PER_GROUP * limits.num_groups):
            of = f"{CODES_PER_GROUP:g} for each of {limits.num_groups} groups"
            bad["codes"] = f"codebook_perplexity_hard is {perplexity:.2f}, below {least:g} ({of})"
        if left < (least := LEAST_DISTRACTORS * limits.num_distractors):
            own = f"of {limits.num_distractors}: the others carry the positive's own code"
            bad["distractors"] = f"distractors_left is {left:.2f}, below {least:g} ({own})"
        elif accuracy < (least := TIMES_CHANCE / (1.0 + left)):
            bad["accuracy"] = f"accuracy is {accuracy:.4f}, below {least:.4f} ({TIMES_CHANCE:g} times chance)"
        return bad

    def _flat_loss(self, step: int, loss: float) -> dict[str, _Stretch]:
        """The newest records, at most a window of them, whose losses are alike."""
        losses = self.losses
        losses.append((step, loss))
        while (spread := _spread([loss for _, loss in losses])) > LOSS_SPREAD:
            losses.pop(0)
        while len(losses) > FEWEST_RECORDS and losses[1][0] <= step - self.limits.window_steps:
            losses.pop(0)
        if len(losses) < FEWEST_RECORDS:
            return {}
        num_counted = sum(step > self.limits.learning_after for step, _ in losses)
        text = f"contrastive_loss is {loss:.4f} and moved by {spread:.3%}, not more than {LOSS_SPREAD:.1%}"
        return {"loss": _Stretch(losses[0][0], num_counted, text)}


def _spread(values: list[float]) -> float:
    greatest = max(map(abs, values))
    return (max(values) - min(values)) / greatest if greatest else 0.0


class CollapseWatch:
    """Warns of a run's collapse, then ends the run, and keeps the last checkpoint from before. Every rank has one."""

    def __init__(self, args, config, utterances: Utterances, accelerator: Accelerator, first_step: int = 0):
        """`metrics.jsonl` holds what an earlier part of the run logged, up to `first_step`. Call on all ranks."""
        self.args, self.config, self.utterances, self.accelerator = args, config, utterances, accelerator
        self.criteria = Criteria(Limits.of(args, config))
        if args.collapse_action != "none" and first_step:
            for record in on_main_process(accelerator, self._read_earlier):
                self.criteria.add(record)
            # What was sure is said once more: whoever heard it is no more, or had other flags.
            self.criteria.level = min(self.criteria.level, 1)

    def _read_earlier(self) -> list[dict[str, Any]]:
        path = Path(self.args.output_dir) / METRICS_FILE
        records = read_metrics(path) if path.exists() else []
        return [{name: r[name] for name in ("step", *MEASURES)} for r in records if r.keys() >= set(MEASURES)]

    def see(self, record: Mapping[str, Any]) -> None:
        """Take the next training record. Raises `UserError` if a collapse has lasted for a window and is to stop the run."""
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
        what = "the codes have collapsed" if finding.criteria & FEW_CODES else "the run learns nothing"
        ending = "" if finding.is_sure else "; the run stops at its end"
        if not finding.is_sure and self.args.collapse_action != "stop":
            ending = "; the run goes on"
        share = "all" if finding.is_sure else "half"
        lasted = f"for {share} of --collapse_window_steps {self.criteria.limits.window_steps}{ending}"

        causes = likely_causes(finding.criteria, finding.since, record, self.args, self.config)
        if self.accelerator.mixed_precision == "fp16":
            skipped = record.get("skipped_updates", 0)
            causes.append(f"fp16, with {skipped} updates skipped (bf16 and fp32 do not overflow)")
        if (silent := silent_share(self.utterances)) >= 0.25:
            causes.append(f"{silent:.0%} of the utterances looked at are silence")
        why = f"Likely here: {'; '.join(causes)}" if causes else "No setting of this run is unusual: listen to its data"

        before = [folder for folder in checkpoints(self.args.output_dir) if step_of(folder) < finding.since]
        way_out = "No checkpoint is from before it: start anew with other settings"
        if before:
            advice = "start from its weights with other settings (--model_name_or_path)"
            way_out = f"{before[-1]} is from before it: {advice}"
        way_out += "; --collapse_action warn would go on" if finding.is_sure else ""
        return f"{what}: {finding.text} ({lasted}). {why}. {way_out}"
