"""Evaluation in `Trainer`: every utterance once, in batches by seconds; the best of the saved updates; files of scores.

Shapes: B utterances of a batch, N of the set.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.evaluate.scores import MEASURES, SHOWN
from w2v2.finetune.arguments import PREDICTIONS_FILE, RESULTS_FILE
from w2v2.finetune.batching import cut_evaluation
from w2v2.finetune.ctc_data import SpeechDataset, check_skipped
from w2v2.train.log import STREAM_MAY_DIE, Pace


def check_metric(name: str | None, measures: Iterable[str]) -> None:
    """Raises UserError where no validation has a measure of that name."""
    known = [*measures, "loss"]
    if name and name.removeprefix("eval_") not in known:
        raise UserError(f"--metric_for_best_model {name}: not measured here; give one of {', '.join(known)}")


class _Console(TrainerCallback):
    """A line a record, as pretraining prints it, in place of the library's dictionaries."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # of the flags; a resumed run has its checkpoint's
        self.pace = Pace(state.max_steps, state.global_step, state.eval_steps, state.save_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.pace.mark(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & logs.keys():
            return  # the summary at the end
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.3f}", f"rate {logs['learning_rate']:.2e}", f"epoch {logs['epoch']:.2f}"]
            parts.append(self.pace.time_left(state.global_step))
        else:
            found = {name.removeprefix("eval_"): value for name, value in logs.items()}
            parts = [f"{SHOWN[name]} {found[name]:.1%}" for name in SHOWN if name in found]
            parts[0:0] = [f"validation loss {found['loss']:.3f}"] if found["loss"] is not None else ["validation"]
        with STREAM_MAY_DIE:
            tqdm.write(" | ".join([f"step {state.global_step}/{state.max_steps}", *parts]), file=sys.stderr)


class _Bar(ProgressCallback):
    """The library's bar of progress alone."""

    on_log = TrainerCallback.on_log


class Evaluator(Trainer):
    """`Trainer` whose evaluation goes by seconds. Predictions keep the data set's order.

    A subclass has `prediction_step`, with a loss for each utterance that counts (one for the batch where the scores
    hold the loss), and `score_output`: an output of the loop and its data set → predictions, scores by name. Its
    `tie_breakers` are the measures that choose between updates which are equal by `metric_for_best_model`.
    """

    tie_breakers: tuple[str, ...] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(_Bar)
        self.add_callback(_Console)
        self.measure = self.args.metric_for_best_model.removeprefix("eval_")  # that says which update is the best

    def make_loader(self, data, batch_sampler, collate_fn) -> DataLoader:
        """A loader that Accelerate does not prepare: its batches are this rank's own."""
        args, options = self.args, {}
        if args.dataloader_num_workers:
            options = dict(prefetch_factor=args.dataloader_prefetch_factor)
            options |= dict(multiprocessing_context=args.dataloader_multiprocessing_context)
        return DataLoader(
            data, batch_sampler=batch_sampler, collate_fn=collate_fn, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory, **options,
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: SpeechDataset | None = None) -> DataLoader:
        """This rank's batches. Every rank has as many: the last one is repeated where they do not come out even."""
        data, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        budget = round(args.eval_micro_batch_seconds * SAMPLING_RATE)
        batches = cut_evaluation(data.table["num_samples"], budget, args.per_device_eval_batch_size)
        batches += batches[-1:] * (-len(batches) % args.world_size)
        return self.make_loader(data, batches[args.process_index :: args.world_size], self.data_collator)

    def get_test_dataloader(self, test_dataset: SpeechDataset) -> DataLoader:
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None,
                        metric_key_prefix="eval") -> EvalLoopOutput:  # fmt: skip
        """Outputs of the set on every rank, in its order; the loss is the mean over utterances, NaN where none counts."""
        data, model = dataloader.dataset, self.model
        if not self.accelerator._models:  # an evaluation without a training
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader  # for the bar of progress
        found = []
        for rows, inputs in zip(dataloader.batch_sampler, dataloader, strict=True):
            loss, outputs, labels = self.prediction_step(model, inputs, False, ignore_keys)
            found.append((rows, loss.flatten().tolist(), nested_numpify(outputs), nested_numpify(labels)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        every = {rows: rest for rows, *rest in gather_object(found)}  # without repetitions
        losses, outputs, labels = zip(*(every[rows] for rows in sorted(every)), strict=True)
        check_skipped(data, self.args.max_skipped_fraction)

        losses = [loss for some in losses for loss in some]
        metrics = {f"{metric_key_prefix}_loss": float(np.mean(losses)) if losses else math.nan}
        joined = tuple(map(join, zip(*outputs, strict=True))) if isinstance(outputs[0], tuple) else join(outputs)
        output = EvalLoopOutput(predictions=joined, label_ids=join(labels), metrics=metrics, num_samples=len(data))
        predictions, scores = self.score_output(output, data)
        metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output._replace(predictions=predictions)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Whether this update is the best so far; of two equal ones the later is (the stock class keeps the older).

        Only an update that is saved can be the best: validations may be more frequent than saves.
        """
        args, state, key = self.args, self.state, f"eval_{self.measure}"
        if not self.measure or (args.save_strategy != SaveStrategy.BEST and not self.control.should_save):
            return False
        validations = [entry for entry in state.log_history if key in entry]
        best = next((entry for entry in validations if entry["step"] == state.best_global_step), None)
        if best is not None and self.rank(metrics) > self.rank(best):
            return False
        state.best_metric, state.best_global_step = metrics[key], state.global_step
        return True

    def rank(self, metrics: Mapping[str, Any]) -> list[float]:
        """What a validation is compared by, less being better; NaN is worse than anything."""
        names = [
            name for name in dict.fromkeys((self.measure, *self.tie_breakers, "loss")) if f"eval_{name}" in metrics
        ]
        is_greater = {name: name in MEASURES for name in names} | {self.measure: self.args.greater_is_better}
        values = [-metrics[f"eval_{name}"] if is_greater[name] else metrics[f"eval_{name}"] for name in names]
        return [math.inf if math.isnan(value) else value for value in values]


def join(batches: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Arrays (B, …) of every batch → (N, …), or a list of N rows where these differ in length.

    One long recording among many short ones would make an array of its length for all.
    """
    if len({batch.shape[1:] for batch in batches}) > 1:
        return [row for batch in batches for row in batch]
    return np.concatenate(batches)


def write_results(output_dir: str, results: Mapping, lines: Iterable[Mapping]) -> None:
    """`results.json`, and `predictions.jsonl` with a line an utterance; null stands for what is no finite number."""

    def encode(value: Mapping, **options: Any) -> str:
        finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False, allow_nan=False, **options) + "\n"

    with open(Path(output_dir, PREDICTIONS_FILE), "w", encoding="utf-8") as file:
        file.writelines(map(encode, lines))
    Path(output_dir, RESULTS_FILE).write_text(encode(results, indent=2), encoding="utf-8")
