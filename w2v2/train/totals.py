"""What is summed and counted of an effective batch: over micro-batches, then over ranks.

Shapes: G codebook groups, V entries of a group.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import MicroBatchPlan
from w2v2.data.collate import PretrainBatch
from w2v2.model import objective
from w2v2.model.pretraining import PretrainSums


class Counts(NamedTuple):
    """What is counted of micro-batches on the host."""

    heard_samples: float = 0.0  # after cropping
    original_samples: float = 0.0  # before cropping
    padded_samples: float = 0.0  # with padding
    num_skipped: float = 0.0  # utterances that could not be read
    stops_asked: float = 0.0  # ranks that were asked to stop


@dataclass
class Totals:
    """Sums over micro-batches, then over ranks: everything that is reported of an effective batch."""

    sums: PretrainSums | None = None
    counts: Counts = Counts()

    def add(self, sums: PretrainSums, batch: PretrainBatch) -> None:
        """One micro-batch more. A dummy counts nothing."""
        is_real = batch.weight > 0
        counts = Counts(
            heard_samples=batch.heard_samples if is_real else 0,
            original_samples=batch.original_samples,
            padded_samples=batch.waveforms.numel() if is_real else 0,
            num_skipped=len(batch.skipped),
        )
        sums = PretrainSums(*(x.detach() for x in sums))
        self.sums = sums if self.sums is None else PretrainSums(*(a + b for a, b in zip(self.sums, sums, strict=True)))
        self.counts = Counts(*(a + b for a, b in zip(self.counts, counts, strict=True)))

    def reduced(self, accelerator: Accelerator) -> "Totals":
        """Summed over all ranks, on the CPU, in one message of float64."""
        counts = torch.tensor(self.counts, dtype=torch.float64, device=self.sums.loss.device)
        flat = torch.cat([x.reshape(-1).double() for x in self.sums] + [counts])
        flat = accelerator.reduce(flat, reduction="sum").cpu()
        *parts, counts = flat.split([x.numel() for x in self.sums] + [len(counts)])
        sums = PretrainSums(*(part.view(x.shape) for part, x in zip(parts, self.sums, strict=True)))
        return Totals(sums, Counts(*counts.tolist()))

    def with_diversity(self, weight: float) -> "Totals":
        """With the diversity loss of the whole batch in place of the pieces', added to the loss: independent of the
        cut.
        """
        sums = self.sums
        statistics = objective.CodeStatistics(sums.codes_soft, sums.codes_hard, sums.code_entropy)
        diversity = objective.diversity_loss(statistics, sums.num_masked)
        return Totals(sums._replace(diversity=diversity, loss=sums.loss + weight * diversity), self.counts)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Means over masked frames, and the batch's composition."""
        sums, counts, masked = self.sums, self.counts, max(float(self.sums.num_masked), 1.0)
        soft, hard = (objective.perplexity(codes / masked).item() for codes in (sums.codes_soft, sums.codes_hard))
        values = {
            "loss": float(sums.loss) / masked,
            "contrastive_loss": float(sums.contrastive) / masked,
            "diversity_loss": float(sums.diversity) / masked,
            "feature_penalty": float(sums.penalty) / masked,
            "accuracy": float(sums.correct) / masked,
            "codebook_perplexity": soft,
            "codebook_perplexity_hard": hard,
            "code_entropy": float(sums.code_entropy) / masked,
            "distractors_left": float(sums.distractors_left) / masked,
            "masked_frames": int(sums.num_masked),
            "batch_hours": counts.heard_samples / SAMPLING_RATE / 3600,
            "cropped_fraction": 1.0 - counts.heard_samples / max(counts.original_samples, 1.0),
            "padded_fraction": 1.0 - counts.heard_samples / max(counts.padded_samples, 1.0),
        }
        return {prefix + name: value for name, value in values.items()}


@dataclass
class Heard:
    """What this rank heard in one update: looked at only when something went wrong with it."""

    skipped: list[dict] = field(default_factory=list)  # utterances that could not be read
    # Each real micro-batch with its own loss, (), on the device; without the diversity term, which may be the whole
    # batch's.
    losses: list[tuple[MicroBatchPlan, torch.Tensor]] = field(default_factory=list)

    def add(self, sums: PretrainSums, batch: PretrainBatch) -> None:
        self.skipped += batch.skipped
        if batch.weight > 0:
            self.losses.append((batch.plan, sums.contrastive.detach() + sums.penalty.detach()))
