"""Whether a run has collapsed, told from its records alone, what may be the cause, and what the run does then.

| criterion | a record is bad where | counted after |
|---|---|---|
| codes | the most likely codes' perplexity is below 2 a group (1: one code) | half the diversity loss is there |
| distractors | below a tenth of a frame's distractors carry another code than the positive | the same |
| accuracy | it is below 1.1 times a constant guess's, or 3 / (1 + distractors left) | warm-up, at least a window |
| loss | the contrastive loss stays within 0.1 % of itself | the same |

A context that ignores the audio earns what always guessing the utterance's commonest codes does; where all codes are
rare, up to 2.5 times chance, as on the plateau that runs begin on. Batches alone vary a learning run's loss by 0.5 %.
Bad records without a gap over half a window are a warning, over a whole one a collapse. Records without finite figures
count neither way. Likely causes are settings unlike the paper's and fairseq's recipes (small models: configs/pretrain).
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from w2v2.data.utterances import Utterances, silent_share
from w2v2.errors import UserError, tell
from w2v2.train.checkpoint import checkpoints, step_of
from w2v2.train.launch import on_main_process
from w2v2.train.log import METRICS_FILE, read_metrics
from w2v2.train.recipes import SMALL_WIDTH, Recipe
from w2v2.train.schedule import num_warmup_steps, ramp

logger = logging.getLogger(__name__)

FEW_CODES, NO_LEARNING = {"codes", "distractors"}, {"accuracy", "loss"}  # the criteria
CODES_PER_GROUP, TIMES_CHANCE, TIMES_GUESS = 2, 3, 1.1
LEAST_DISTRACTORS = 0.1  # of those drawn
LOSS_SPREAD = 1e-3  # (greatest − least) / greatest
MOST_SILENCE = 0.25  # of the utterances looked at, and
MOST_RATE = 1.5  # times the usual learning rate: beyond them, a plan warns too
FEWEST_RECORDS = 4  # in a window, however rarely a run logs
MEASURES = ("codebook_perplexity_hard", "distractors_left", "accuracy", "contrastive_loss")


class Limits(NamedTuple):
    """What the criteria need to know of a run."""

    window_steps: int
    num_groups: int
    num_distractors: int
    codes_after: int  # updates before which few codes mean nothing
    learning_after: int  # updates before which nothing needs to be learned

    @classmethod
    def of(cls, args, config) -> "Limits":
        window = args.collapse_window_steps or min(2_000, max(500, args.max_steps // 10))
        has_diversity = config.diversity_loss_weight > 0
        codes_after = args.diversity_delay_steps + args.diversity_warmup_steps // 2 if has_diversity else 0
        learning_after = max(window, num_warmup_steps(args.warmup_steps, args.max_steps))
        return cls(window, config.num_codevector_groups, config.num_negatives, codes_after, learning_after)


class Finding(NamedTuple):
    """A collapse that may be under way."""

    is_sure: bool  # it has lasted for the whole window
    since: int  # update of the first bad record
    criteria: frozenset[str]
    text: str  # the criteria with their figures and thresholds


class Criteria:
    """Fed with training records in order; says once each when a collapse is suspected and when it is sure."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.counted_after = dict.fromkeys(FEW_CODES, limits.codes_after)
        self.counted_after |= dict.fromkeys(NO_LEARNING, limits.learning_after)
        self.first: int | None = None  # update of the first record
        # Criterion → (first update, number that count) of the bad records without a gap, up to the newest.
        self.bad: dict[str, tuple[int, int]] = {}
        self.losses: list[tuple[int, float]] = []  # (update, contrastive loss) of the newest records that are alike
        self.level = 0  # 1: warned of, 2: sure

    @property
    def is_suspicious(self) -> bool:
        """Whether the newest record is bad, earlier ones were not, and the collapse is not sure yet."""
        return self.level < 2 and any(since != self.first for since, _ in self.bad.values())

    def add(self, record: Mapping[str, Any]) -> Finding | None:
        """Take the next training record; a finding where this one makes it a suspicion, or a certainty."""
        if not all(isinstance(record.get(name), int | float) and math.isfinite(record[name]) for name in MEASURES):
            return None
        step = int(record["step"])
        self.first = self.first or step
        texts = self._judge(record)
        self.bad = {name: self._lengthen(name, step) for name in texts}
        if text := self._judge_loss(step, record["contrastive_loss"]):
            steps, texts["loss"] = [step for step, _ in self.losses], text
            self.bad["loss"] = (steps[0], sum(step > self.counted_after["loss"] for step in steps))
        if not self.bad:
            self.level = 0
        for level, share in ((2, 1.0), (1, 0.5)):  # of the window, and of the records that it holds at least
            lasting = [
                name
                for name, (since, num_counted) in self.bad.items()
                if step - max(since, self.counted_after[name]) >= share * self.limits.window_steps
                and num_counted >= share * FEWEST_RECORDS
            ]
            if lasting and level > self.level:
                self.level = level
                text = "; ".join(f"{texts[name]}, since update {self.bad[name][0]:,}" for name in lasting)
                return Finding(level == 2, min(self.bad[name][0] for name in lasting), frozenset(lasting), text)
        return None

    def _judge(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Criterion → what is bad about this record, but for the loss, which one record does not show."""
        G, K = self.limits.num_groups, self.limits.num_distractors
        guess = record.get("constant_guess_accuracy") or 0.0  # records of earlier versions have none
        chance = TIMES_CHANCE / (1 + record["distractors_left"]), f"{TIMES_CHANCE} times chance"
        constant = TIMES_GUESS * guess, f"{TIMES_GUESS} times what a constant guess earns"
        criteria = {
            "codes": (MEASURES[0], CODES_PER_GROUP * G, f"{CODES_PER_GROUP} for each of {G} groups"),
            "distractors": (MEASURES[1], LEAST_DISTRACTORS * K, f"of {K}: the others carry the same code"),
            "accuracy": (MEASURES[2], *max(chance, constant)),
        }
        bad = {
            criterion: f"{measure} is {record[measure]:#.3g}, below {least:.3g} ({why})"
            for criterion, (measure, least, why) in criteria.items()
            if record[measure] < least
        }
        if "distractors" in bad:
            bad.pop("accuracy", None)  # among so few distractors it says nothing
        return bad

    def _judge_loss(self, step: int, loss: float) -> str | None:
        """How little the loss moved over the newest records, at most a window of them; None: it moves."""
        losses = self.losses
        losses.append((step, loss))
        while np.ptp(values := [loss for _, loss in losses]) > LOSS_SPREAD * max(map(abs, values)):
            losses.pop(0)
        while len(losses) > FEWEST_RECORDS and losses[1][0] <= step - self.limits.window_steps:
            losses.pop(0)
        if len(losses) < FEWEST_RECORDS:
            return None
        spread = np.ptp(values) / (max(map(abs, values)) or 1.0)
        return f"contrastive_loss is {loss:.4f} and moved by {spread:.3%}, not more than {LOSS_SPREAD:.1%}"

    def _lengthen(self, name: str, step: int) -> tuple[int, int]:
        since, num_counted = self.bad.get(name, (step, 0))
        return since, num_counted + (step > self.counted_after[name])


class Collapsed(UserError):
    """The run has collapsed and is to stop."""


class CollapseWatch:
    """Warns of a run's collapse, then ends the run, and keeps the last checkpoint from before. Every rank has one."""

    def __init__(self, args, config, utterances: Utterances, accelerator: Accelerator, first_step: int = 0):
        """`metrics.jsonl` holds what an earlier part of the run logged, up to `first_step`. Call on all ranks."""
        self.args, self.config, self.utterances, self.accelerator = args, config, utterances, accelerator
        self.criteria, self._keeps_more = Criteria(Limits.of(args, config)), False
        if args.collapse_action != "none" and first_step:
            path = Path(args.output_dir) / METRICS_FILE
            for record in on_main_process(accelerator, lambda: read_metrics(path) if path.exists() else []):
                self.criteria.add(record)
            # What was sure is said once more.
            self.criteria.level = min(self.criteria.level, 1)

    def see(self, record: Mapping[str, Any]) -> None:
        """Take the next record. Raises `Collapsed` if a collapse has lasted for a window and is to stop the run."""
        if self.args.collapse_action == "none" or (finding := self.criteria.add(record)) is None:
            return
        if finding.is_sure and self.args.collapse_action == "stop":
            raise Collapsed(self._message(finding, record))
        if self.accelerator.is_main_process:
            extra = {"event": "collapse" if finding.is_sure else "warning"}  # in events.jsonl
            logger.warning("%s", self._message(finding, record), extra=extra)

    def keep(self, save_total_limit: int) -> int:
        """Checkpoints to keep: all of them (0) as long as the next ones may be of a collapsed model."""
        if not self.criteria.is_suspicious:
            return save_total_limit
        if 0 < save_total_limit <= len(checkpoints(self.args.output_dir)) and not self._keeps_more:
            self._keeps_more = True
            tell(f"more checkpoints than --save_total_limit {save_total_limit} are kept while the run looks collapsed")
        return 0

    def _message(self, finding: Finding, record: Mapping[str, Any]) -> str:
        what = "the codes have collapsed" if finding.criteria & FEW_CODES else "the run learns nothing"
        window = f"--collapse_window_steps {self.criteria.limits.window_steps}"
        ending = "stops at its end" if self.args.collapse_action == "stop" else "goes on"
        lasted = f"all of {window}" if finding.is_sure else f"half of {window}; the run {ending}"
        causes = likely_causes(finding.criteria, finding.since, record, self.args, self.config)
        if self.accelerator.mixed_precision == "fp16":
            causes.append(f"fp16, with {record['skipped_updates']} updates skipped (bf16 and fp32 do not overflow)")
        if (silent := silent_share(self.utterances)) >= MOST_SILENCE:
            causes.append(f"{silent:.0%} of the utterances looked at are silence")
        why = f"Likely here: {'; '.join(causes)}" if causes else "No setting of this run is unusual: listen to its data"
        before = [folder for folder in checkpoints(self.args.output_dir) if step_of(folder) < finding.since]
        way_out = "No checkpoint is from before it: start anew"
        if before:
            way_out = f"{before[-1]} is from before it: start from its weights (--model_name_or_path)"
        more = "; --collapse_action warn would go on" if finding.is_sure else ""
        return f"{what}: {finding.text} (for {lasted}). {why}. {way_out} with other settings{more}"


def likely_causes(criteria: frozenset[str], since: int, record: Mapping[str, Any], args, config) -> list[str]:
    """Settings to blame for the `criteria` met `since` that update, with what is usual; `record` is the newest."""
    few_codes, no_learning, is_small = criteria & FEW_CODES, criteria & NO_LEARNING, config.hidden_size < SMALL_WIDTH
    hours, temperature = min(args.batch_hours, record["batch_hours"]), record["gumbel_temperature"]
    rate, mult, weight = args.learning_rate, args.feature_grad_mult, config.diversity_loss_weight
    delay, ramp_steps = args.diversity_delay_steps, args.diversity_warmup_steps
    share, warmup = ramp(since, delay, ramp_steps), num_warmup_steps(args.warmup_steps, args.max_steps)

    # 1. What is usual for a model of this size, such an effective batch and a run of this length.
    usual = Recipe.of(config, hours, args.max_steps)
    has_short_warmup = (
        usual.warmup_steps >= 10 and warmup < 0.9 * usual.warmup_steps and since <= 4 * usual.warmup_steps
    )
    # A small model whose codes are all used alike: nothing is left for the contrastive loss to learn from.
    entries = config.num_codevector_groups * config.num_codevectors_per_group
    is_blurred = no_learning and is_small and weight > 0 and record["codebook_perplexity_hard"] > entries / 2

    # 2. The settings as the user gave them.
    batch = f"an effective batch of {hours:.4g} h (--batch_hours {args.batch_hours:g})"
    peak = f"--learning_rate {rate:g}, where {usual.learning_rate:g} is usual"
    gumbel = f"a Gumbel temperature of {temperature:.3g}"
    diversity = f"--diversity_loss_weight {weight:g}, where 0.1 is usual"
    delayed = f"--diversity_delay_steps {delay}, --diversity_warmup_steps {ramp_steps}"

    # 3. Whether each of them is a cause.
    causes = {
        f"{batch}, where {usual.batch_hours:g} h are usual": hours < 0.9 * usual.batch_hours,
        f"{peak} for such a model and batch": rate > MOST_RATE * usual.learning_rate,
        f"a warm-up of {warmup:,} updates (--warmup_steps), where {usual.warmup_steps:,} are usual": has_short_warmup,
        f"--feature_grad_mult {mult:g}, where {usual.feature_grad_mult:g} is usual": mult > 2 * usual.feature_grad_mult,
        f"{diversity}: little keeps the codes apart": few_codes and weight < 0.05,
        f"a diversity loss with {share:.0%} of its weight ({delayed})": few_codes and weight >= 0.05 and share < 1,
        f"{gumbel} (--min_gumbel_temperature), where {usual.coldest:g} is usual": few_codes
        and temperature < 0.99 * usual.coldest,
        peak: no_learning and rate < usual.learning_rate / 20,
        f"{diversity}: it outweighs the contrastive loss": no_learning and weight > 0.5,
        f"--feature_grad_mult {mult:g}: the convolutions do not learn": no_learning and mult == 0,
        "no --diversity_delay_steps in so small a model": is_blurred and not delay,
        f"{gumbel} in so small a model (--max_gumbel_temperature 0.5)": is_blurred and temperature > 1,
    }
    return [text for text, is_met in causes.items() if is_met]
