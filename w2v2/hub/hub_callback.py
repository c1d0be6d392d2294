"""What a fine-tuned folder is handed over with: card, curves, and a push that can neither hold up nor end the run.

`Trainer`'s own push creates the repository when the `Trainer` is built, where a refused token ends the run, and waits
without limit for what is under way when training ends.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from w2v2.hub.curves import FINETUNING_PICTURES, draw_plots
from w2v2.hub.finetuned_card import write_finetuned_card
from w2v2.hub.push import HubPusher
from w2v2.train.log import read_metrics

logger = logging.getLogger(__name__)


class HubCallback(TrainerCallback):
    """Pushes checkpoints as they are saved (`hub_strategy` other than `end`), and the folder at the end (`hand_over`).

    Make it before the `Trainer`: it switches `args.push_to_hub` off, so that `Trainer` does not push as well.
    """

    def __init__(self, args: TrainingArguments):
        """Raises UserError where `hub_model_id` cannot be a repository's name."""
        self.pusher: HubPusher | None = None
        self._started: float | None = None
        self._device_hours: float | None = None
        if args.push_to_hub and args.process_index == 0:
            self.pusher = HubPusher(
                args.output_dir,
                repo_id=args.hub_model_id,
                private=args.hub_private_repo,
                token=args.hub_token,
                every_save=args.hub_strategy != HubStrategy.END,
            )
        args.push_to_hub = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter() if state.global_step == 0 else None  # resumed: the rest was not measured

    def on_train_end(self, args, state, control, **kwargs):
        if self._started is not None:
            self._device_hours = (time.perf_counter() - self._started) / 3600 * args.world_size

    def on_save(self, args, state, control, **kwargs):
        if self.pusher:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.pusher.push(folder, f"Weights after {state.global_step} updates")

    def hand_over(self, args: TrainingArguments) -> None:
        """Card and curves from what `output_dir` holds (`results.json`, `metrics.jsonl`), then the last push. On every rank."""
        if args.process_index != 0:
            return
        folder = Path(args.output_dir)
        log = folder / "metrics.jsonl"
        metrics = read_metrics(log) if log.exists() else []
        draw_plots(folder, metrics, FINETUNING_PICTURES, over=("step", "update"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        config: dict[str, Any] = {**vars(args), "batch": _batch(args)}
        write_finetuned_card(folder, config=config, results=results, device_hours=self._device_hours)
        if self.pusher:
            self.pusher.push(folder, "Fine-tuned model")
            print(f"   pushed to: {self.pusher.finish() or 'nowhere: see the warnings above'}", flush=True)


def _batch(args: TrainingArguments) -> str:
    """The effective batch in words: in seconds where the flags say so."""
    if seconds := getattr(args, "batch_seconds", None):
        return f"{seconds:g} s of audio"
    return f"{args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size} utterances"
