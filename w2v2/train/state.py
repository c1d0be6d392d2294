"""Where a run stands: a few numbers, from which everything else follows."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import Cursor
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.model.config import check_same_architecture
from w2v2.train.checkpoint import read_state
from w2v2.train.plan import check_identity, identity


@dataclass
class RunState:
    """What `training_state/state.json` holds."""

    max_steps: int
    num_utterances: int
    step: int = 0  # updates done
    epoch: int = 0
    position: int = 0  # in the epoch's order
    heard_samples: int = 0
    skipped_updates: int = 0  # updates whose loss or gradient was not finite
    identity: dict[str, Any] = field(default_factory=dict)  # what the effective batches depend on
    # The cut of the effective batches, which dropout and Gumbel noise follow. None: not decided yet.
    micro_batch_seconds: float | None = None
    num_processes: int | None = None
    # Settings of the batches that differ from the checkpoint's; not saved.
    changes: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, args, training: Utterances, config, checkpoint: Path | None) -> "RunState":
        """The state of a new run, or of one that goes on from `checkpoint`.

        With `accept_changed_batches` a run keeps its step and its place in the epoch, even if other data or another
        seed give that epoch another order; what the epoch has heard already may then come again. If fewer data end
        before that place, the next epoch begins.

        Raises `UserError` for a checkpoint of another architecture, one beyond `max_steps`, or, unless that is
        accepted, one whose run had other batches.
        """
        state = cls(args.max_steps, len(training.table), identity=identity(args, training))
        if checkpoint:
            check_same_architecture(config, checkpoint)
            saved = read_state(checkpoint)
            state.changes = check_identity(saved["identity"], state.identity, args.accept_changed_batches)
            state.skipped_updates = saved.get("skipped_updates", 0)
            for name in ("step", "epoch", "position", "heard_samples"):
                setattr(state, name, saved[name])
            for name in ("micro_batch_seconds", "num_processes"):
                setattr(state, name, saved.get(name))
            if state.step > state.max_steps:
                raise UserError(
                    f"--max_steps {state.max_steps}: {checkpoint} has {state.step} updates already; give as many at least, or start "
                    "from its weights (--model_name_or_path) in another --output_dir"
                )
            if state.position >= state.num_utterances:
                state.epoch, state.position = state.epoch + 1, 0
        return state

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
            "epoch": self.epoch + self.position / self.num_utterances,
            "audio_hours": self.heard_samples / SAMPLING_RATE / 3600,
        }

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "changes"}
