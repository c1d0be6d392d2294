"""A run in numbers: where it stands, from which everything else follows, and the sums of an effective batch.

Shapes: G codebook groups, V entries of a group.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import Cursor, MicroBatchPlan
from w2v2.data.collate import PretrainBatch
from w2v2.data.cutting import CUT_VERSION
from w2v2.data.sampling import build_order
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.model import objective
from w2v2.model.loading import check_same_architecture
from w2v2.model.pretraining import PretrainSums
from w2v2.train.checkpoint import read_state
from w2v2.train.identity import compare, differences, hash_ids, hash_places, identity

VALIDATION_SEED = 42  # of its crops and masks, whatever `--seed` is: runs with other seeds can be compared
# Flags, and keys of the model's configuration, that change the course of a run but not its batches.
SETTINGS = (
    "max_steps learning_rate lr_scheduler_type warmup_steps adam_beta1 adam_beta2 adam_epsilon weight_decay "
    "decay_norms_and_biases max_grad_norm freeze_feature_encoder feature_grad_mult feature_penalty_weight "
    "max_gumbel_temperature min_gumbel_temperature gumbel_temperature_decay diversity_delay_steps "
    "diversity_warmup_steps diversity_scope validation_data dataset_name "
    "dataset_config_name audio_column_name cuda_graph fused_kernels"
).split()
MODEL_SETTINGS = (
    "hidden_dropout attention_dropout activation_dropout feat_proj_dropout feat_quantizer_dropout layerdrop "
    "num_negatives contrastive_logits_temperature diversity_loss_weight"
).split()


@dataclass
class RunState:
    """What `training_state/state.json` holds."""

    max_steps: int
    epoch_draws: int  # utterances that an epoch hears
    step: int = 0  # updates done
    epoch: int = 0
    position: int = 0  # in the epoch's order
    heard_samples: int = 0
    skipped_updates: int = 0  # updates whose loss or gradient was not finite
    identity: dict[str, Any] = field(default_factory=dict)  # what the effective batches depend on
    settings: dict[str, Any] = field(default_factory=dict)  # of optimisation, objective and model
    micro_batch_seconds: float | None = None  # their cut, which noise follows; None: not decided yet
    num_processes: int | None = None
    cut_version: int = CUT_VERSION
    notes: list[str] = field(default_factory=list)  # on what differs from the checkpoint's run; not saved

    @classmethod
    def start(
        cls, args, training: Utterances, config, checkpoint: Path | None, mixed_precision: str = "no"
    ) -> "RunState":
        """The state of a new run, or of one that goes on from `checkpoint`.

        With `accept_changed_batches` a run keeps its place in the epoch, even if other data or another seed give that
        epoch another order. If fewer data end before that place, the next epoch begins. Raises `UserError` for another
        architecture, a checkpoint beyond `max_steps`, and other batches that are not accepted.
        """
        settings = {name: getattr(args, name) for name in SETTINGS} | {n: getattr(config, n) for n in MODEL_SETTINGS}
        settings |= {"mixed_precision": mixed_precision, "validation_data": args.describe_sources()["validation_data"]}
        order = build_order(training, args)
        given = [name for source in training.sources for name in source.data] or args.train_data
        manifests = [name for name in given if isinstance(name, str) and not training.shards]
        hashes = {"ids_sha256": hash_ids(manifests, training.table), "places_sha256": hash_places(training.table)}
        batches = identity(args, training) | hashes | order.identity
        state = cls(args.max_steps, order.n, identity=batches, settings=settings)
        if checkpoint:
            check_same_architecture(config, checkpoint)
            saved = read_state(checkpoint)
            state._compare(saved, args)
            for name in ("step", "epoch", "position", "heard_samples"):
                setattr(state, name, saved[name])
            for name in ("skipped_updates", "micro_batch_seconds", "num_processes"):
                setattr(state, name, saved.get(name, getattr(state, name)))
            if state.step > state.max_steps:
                found = f"--max_steps {state.max_steps}: {checkpoint} has {state.step} updates already"
                raise UserError(f"{found}; give at least as many, or start from its weights with --model_name_or_path")
            if state.position >= state.epoch_draws:
                state.epoch, state.position = state.epoch + 1, 0
        return state

    def _compare(self, saved: dict[str, Any], args) -> None:
        """Note what differs from the checkpoint's run. Raises `UserError` for other batches that are not accepted."""
        self.notes += compare(saved["identity"], self.identity, args.accept_changed_batches)
        cut, found = args.micro_batch_seconds, saved.get("micro_batch_seconds")
        before = {"freeze_feature_encoder": False}  # no earlier version froze anything
        before |= saved.get("settings", {}) | {"micro_batch_seconds": found or cut}
        if changed := differences(before, self.settings | {"micro_batch_seconds": cut or found}):
            self.notes.append(f"other settings than the checkpoint's run had: {changed}")
        if (version := saved.get("cut_version", 1)) != CUT_VERSION:
            self.notes.append(
                f"the checkpoint's run cut the same effective batches in another way (cut_version {version}, now "
                f"{CUT_VERSION}): dropout and Gumbel noise follow the new cut"
            )
        if "ids_sha256" not in saved["identity"]:
            what = "neither the ids of the utterances nor the settings were compared with it"
            seed = "" if args.seed == VALIDATION_SEED else "; validation takes other crops and masks"
            self.notes.append(f"the checkpoint is of an earlier version: {what}{seed}")

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.epoch, self.position)

    def advance(self, cursor: Cursor, heard_samples: int) -> None:
        self.step += 1
        self.epoch, self.position = cursor
        self.heard_samples += heard_samples

    def is_due(self, every: int) -> bool:
        """Whether something done every so many updates, and after the last one, is due."""
        return self.step % every == 0 or self.step == self.max_steps

    def progress(self) -> dict[str, float]:
        """The first columns of every record."""
        return {
            "step": self.step,
            "epoch": self.epoch + self.position / self.epoch_draws,
            "audio_hours": self.heard_samples / SAMPLING_RATE / 3600,
        }

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "notes"}


class Counts(NamedTuple):
    """What is counted of micro-batches on the host."""

    heard_samples: float = 0.0
    original_samples: float = 0.0  # before cropping
    padded_samples: float = 0.0
    num_skipped: float = 0.0  # utterances that could not be read
    stops_asked: float = 0.0  # ranks that were asked to stop


@dataclass
class Totals:
    """Sums over micro-batches, then over ranks: everything that is reported of an effective batch."""

    sums: PretrainSums | None = None
    counts: Counts = Counts()
    # This rank's: what could not be read, and each real micro-batch with its own loss, (), without the diversity term.
    skipped: list[dict] = field(default_factory=list)
    losses: list[tuple[MicroBatchPlan, torch.Tensor]] = field(default_factory=list)

    def add(self, sums: PretrainSums, batch: PretrainBatch) -> None:
        """One micro-batch more. A dummy counts nothing."""
        sums, heard, padded = PretrainSums(*(x.detach() for x in sums)), 0, 0
        self.skipped += batch.skipped
        if batch.weight > 0:
            heard, padded = batch.heard_samples, len(batch.samples)
            self.losses.append((batch.plan, sums.contrastive + sums.penalty))
        counts = Counts(heard, batch.original_samples, padded, len(batch.skipped))
        self.sums = sums if self.sums is None else PretrainSums(*(a + b for a, b in zip(self.sums, sums, strict=True)))
        self.counts = Counts(*(a + b for a, b in zip(self.counts, counts, strict=True)))

    def reduced(self, accelerator: Accelerator) -> "Totals":
        """Summed over all ranks, on the CPU, in one message of float64."""
        counts = torch.tensor(self.counts, dtype=torch.float64, device=self.sums.loss.device)
        flat = torch.cat([x.reshape(-1).double() for x in self.sums] + [counts])
        flat = accelerator.reduce(flat, reduction="sum").cpu()
        *parts, counts = flat.split([x.numel() for x in self.sums] + [len(counts)])
        sums = PretrainSums(*(part.view(x.shape) for part, x in zip(parts, self.sums, strict=True)))
        return Totals(sums, Counts(*counts.tolist()), self.skipped, self.losses)

    def with_diversity(self, weight: float) -> "Totals":
        """With the whole batch's diversity loss in place of the pieces', added to the loss: independent of the cut."""
        sums = self.sums
        diversity = objective.diversity_loss(sums.codes_soft, sums.num_masked)
        return replace(self, sums=sums._replace(diversity=diversity, loss=sums.loss + weight * diversity))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Means over masked frames, and the batch's composition."""
        sums, counts, masked = self.sums, self.counts, max(float(self.sums.num_masked), 1.0)
        coverage = (sums.codes_hard > 0).double().mean(-1).tolist()  # (G,)
        entropy = objective.entropy(sums.codes_hard / masked)  # (G,)
        values = {
            "loss": float(sums.loss) / masked,
            "contrastive_loss": float(sums.contrastive) / masked,
            "diversity_loss": float(sums.diversity) / masked,
            "feature_penalty": float(sums.penalty) / masked,
            "accuracy": float(sums.correct) / masked,
            "constant_guess_accuracy": float(sums.commonest) / masked,
            "codebook_perplexity": objective.perplexity(sums.codes_soft / masked).item(),
            "codebook_perplexity_hard": entropy.exp().sum().item(),
            "code_entropy": float(sums.code_entropy) / masked,
            "distractors_left": float(sums.distractors_left) / masked,
            "masked_frames": int(sums.num_masked),
            "batch_hours": counts.heard_samples / SAMPLING_RATE / 3600,
            "cropped_fraction": 1.0 - counts.heard_samples / max(counts.original_samples, 1.0),
            "padded_fraction": 1.0 - counts.heard_samples / max(counts.padded_samples, 1.0),
        }
        values |= {f"codebook_coverage_{g}": share for g, share in enumerate(coverage, start=1)}
        values |= {f"codebook_entropy_{g}": nats for g, nats in enumerate(entropy.tolist(), start=1)}
        return {prefix + name: value for name, value in values.items()}
