"""Whether a run has collapsed, told from its records alone, and which of its settings are known for it.

| criterion | a record is bad where | counted after |
|---|---|---|
| codes | the perplexity of the most likely codes is below 2 a group (1: a single code, V: all alike) | the diversity loss has half its weight |
| distractors | fewer than a tenth of a frame's distractors carry another code than the positive: nothing is left to tell apart | the same |
| accuracy | it is below 3 / (1 + distractors left); the plateau that runs begin on has up to 2.5 times chance | warm-up, and a window at least |
| loss | the contrastive loss has stayed within 0.1 % of itself; batches alone make that of a run that learns vary by 0.5 % and more | the same |

Bad records without a gap over half a window are a warning, over a whole one a collapse. All of it is a function of the records, so a
resumed run, which reads them again, has nothing to restore. Records without finite figures count neither way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from w2v2.train.schedule import num_warmup_steps

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


class CollapseWatch:
    """Fed with training records in order; says once each when a collapse is suspected and when it is sure."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.counted_after = dict.fromkeys(("codes", "distractors"), limits.codes_after)
        self.counted_after |= dict.fromkeys(("accuracy", "loss"), limits.learning_after)
        self.first: int | None = None  # update of the first record
        self.stretches: dict[str, _Stretch] = {}
        self.losses: list[tuple[int, float]] = []  # (step, contrastive loss) of the newest records that are alike
        self.level = 0  # 1: warned of, 2: sure

    @property
    def is_suspicious(self) -> bool:
        """Whether the newest record is bad, earlier ones were not, and the collapse is not settled yet."""
        return self.level < 2 and any(stretch.since != self.first for stretch in self.stretches.values())

    def unsettle(self) -> None:
        """What was sure is to be said once more, at the next bad record: whoever heard it is no more, or had it otherwise."""
        self.level = min(self.level, 1)

    def add(self, record: Mapping[str, Any]) -> Finding | None:
        """Take the next training record; a finding where this one makes it a suspicion, or a certainty."""
        if not all(isinstance(record.get(name), int | float) and math.isfinite(record[name]) for name in MEASURES):
            return None
        step = int(record["step"])
        self.first = step if self.first is None else self.first
        bad = self._bad_codes(record) | self._bad_accuracy(record)
        self.stretches = {name: self._longer(name, step, text) for name, text in bad.items()} | self._alike(record)
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

    def _bad_codes(self, record) -> dict[str, str]:
        """Criterion → what is bad about this record's codes."""
        bad, limits = {}, self.limits
        least = CODES_PER_GROUP * limits.num_groups
        if (perplexity := record["codebook_perplexity_hard"]) < least:
            of = f"{CODES_PER_GROUP:g} for each of {limits.num_groups} groups"
            bad["codes"] = f"codebook_perplexity_hard is {perplexity:.2f}, below {least:g} ({of})"
        least = LEAST_DISTRACTORS * limits.num_distractors
        if (left := record["distractors_left"]) < least:
            own = f"of {limits.num_distractors}: the others carry the positive's own code"
            bad["distractors"] = f"distractors_left is {left:.2f}, below {least:g} ({own})"
        return bad

    def _bad_accuracy(self, record) -> dict[str, str]:
        left, accuracy = record["distractors_left"], record["accuracy"]
        least = TIMES_CHANCE / (1.0 + left)
        if left < LEAST_DISTRACTORS * self.limits.num_distractors or accuracy >= least:
            return {}
        return {"accuracy": f"accuracy is {accuracy:.4f}, below {least:.4f} ({TIMES_CHANCE:g} times chance)"}

    def _alike(self, record) -> dict[str, _Stretch]:
        """The newest records whose contrastive losses are alike, where chance does not explain it; no more of them than the window has."""
        step, loss, losses = int(record["step"]), record["contrastive_loss"], self.losses
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
