"""What a fine-tuning says of itself: a bar, readable lines, `metrics.jsonl` and the trackers. None of them ends it."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from w2v2.errors import one_line
from w2v2.train.line_file import LineFile, rewrite
from w2v2.train.log import METRICS_FILE, json_line, say_in_a_line

logger = logging.getLogger(__name__)


def log_harmlessly(trainer: Trainer) -> None:
    """Ours in the place of the stock bars, and trackers that cannot end the run."""
    for stock in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(stock)
    reporters = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    handler = trainer.callback_handler
    handler.callbacks = [Harmless(c) if isinstance(c, reporters) else c for c in handler.callbacks]
    trainer.add_callback(RunLog())


class Harmless:
    """A tracker's callback that gets no more events after the first one in which it fails; only its start may still end the run."""

    # A tracker that is not installed or not logged in is a slip of the user's.
    _START = ("on_init_end", "on_train_begin")

    def __init__(self, callback: TrainerCallback):
        self._callback, self._has_failed = callback, False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._callback, name)
        return self._guarded(found) if name.startswith("on_") and name not in self._START else found

    def _guarded(self, handle: Callable) -> Callable:
        def handled(args, state, control, **kwargs):
            if self._has_failed:
                return None
            try:
                return handle(args, state, control, **kwargs)
            except Exception as error:  # as what TensorBoard's writing thread met; it is dead from then on
                self._has_failed = True
                name = type(self._callback).__name__
                logger.warning("%s: %s; it gets nothing from update %d on", name, one_line(error), state.global_step)
                return None

        return handled


class RunLog(ProgressCallback):
    """A bar, one readable line for each logged step, and the same as JSON in `metrics.jsonl`."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if not state.is_world_process_zero:
            return
        threading.excepthook = say_in_a_line
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            dynamic_ncols=True,
            unit="update",
            disable=args.disable_tqdm,
        )
        lines = map(_json, state.log_history)  # resumed: what the checkpoint knows, no more
        rewrite(Path(args.output_dir) / METRICS_FILE, "".join(lines).encode())

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not state.log_history or "train_runtime" in logs:
            return
        entry = state.log_history[-1]
        self._file(args).append(_json(entry))
        tqdm.write(f"update {state.global_step}/{state.max_steps} · " + _line(entry))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._file(args).flush()

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._file(args).close()

    def _file(self, args) -> LineFile:
        if not hasattr(self, "_lines"):
            self._lines = LineFile(Path(args.output_dir) / METRICS_FILE)
        return self._lines


def _json(entry: dict[str, Any]) -> str:
    return json_line(dict(sorted(entry.items())))


def _line(entry: dict[str, Any]) -> str:
    parts = [
        ("epoch", "epoch {:.2f}"),
        ("loss", "loss {:.3f}"),
        ("learning_rate", "learning rate {:.2e}"),
        ("eval_loss", "validation loss {:.3f}"),
        ("eval_wer", "WER {:.1%}"),
        ("eval_cer", "CER {:.1%}"),
        ("eval_per", "PER {:.1%}"),
        ("eval_accuracy", "accuracy {:.1%}"),
        ("eval_uar", "UAR {:.1%}"),
    ]
    return " · ".join(form.format(entry[name]) for name, form in parts if name in entry)
