"""`Trainer` with the wav2vec 2.0 paper's way of fine-tuning (appendix B of the paper, fairseq's configurations).

To the stock one it adds: the tri-stage learning rate, an encoder that stays frozen at first, batches of like length drawn as a
pure function of (seed, epoch), the feature extractor in every saved folder, readable lines and `metrics.jsonl`; for CTC, error
rates that the batch size does not move.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from w2v2.ctc import SpeechDataset, error_rates, greedy_decode, read_skipped
from w2v2.errors import UserError
from w2v2.metrics import json_line
from w2v2.schedule import lr_factor


class LengthGroupedSampler(Sampler[int]):
    """Batches of like length in random order, a pure function of (seed, epoch), so that a resumed run goes on with its batches.

    A random permutation is cut into windows of many batches, each window sorted by length and cut into batches, and the batches
    shuffled; a last batch that is not full stays last. Lengths come from the manifest: nothing is decoded.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, batches_per_window: int = 50):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.window = batch_size * batches_per_window
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        order = [row for window in windows for row in sorted(window, key=self.lengths.__getitem__)]
        full = len(order) // self.batch_size
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(full)]
        for i in torch.randperm(full, generator=generator).tolist():
            yield from batches[i]
        yield from order[full * self.batch_size :]


class FineTuner(Trainer):
    """`Trainer` for a head on a wav2vec 2.0. Data sets have `lengths` (in samples); evaluation keeps their order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # These models take **kwargs but ignore `num_items_in_batch`; without this, loss and gradient would be too
        # large by the accumulation steps and again by the number of processes.
        self.model_accepts_loss_kwargs = False
        self.sampler = LengthGroupedSampler(
            self.train_dataset.lengths, self.args.per_device_train_batch_size, self.args.seed
        )
        for stock in (ProgressCallback, PrinterCallback):
            self.remove_callback(stock)
        self.add_callback(_DrawEpoch(self.sampler))
        self.add_callback(_FreezeEncoder(self.args.freeze_encoder_steps))
        self.add_callback(_WatchSkippedAudio(self.train_dataset, self.args.max_skipped_fraction))
        self.add_callback(_RunLog())
        transformers.utils.logging.disable_progress_bar()  # of writing a model's one shard

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return self.sampler

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        return SequentialSampler(eval_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        factor = partial(
            lr_factor,
            total_steps=num_training_steps,
            warmup_steps=self.args.warmup_steps,
            kind=self.args.lr_scheduler_type,
            hold=self.args.hold_fraction,
            final_scale=self.args.final_lr_scale,
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict=state_dict)
        folder = output_dir or self.args.output_dir
        # A processor writes another file alone.
        getattr(self.processing_class, "feature_extractor", self.processing_class).save_pretrained(folder)


class CTCTrainer(FineTuner):
    """Scores by greedy decoding: `predict` gives texts, and metrics hold WER and CER."""

    def __init__(self, *args, vocabulary: dict[str, int], **kwargs):
        super().__init__(*args, **kwargs)
        self.vocabulary = vocabulary

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, best path (B, T) with -1 past each utterance's end, and labels (B, U)."""
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        best_path = logits.argmax(-1)
        if "attention_mask" in inputs:
            ends = self.model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1)).to(best_path.device)
            past_end = torch.arange(best_path.shape[1], device=best_path.device) >= ends[:, None]
            best_path = best_path.masked_fill(past_end, -1)
        return loss, best_path, labels

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only=None, ignore_keys=None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """The stock loop; then `predictions` are texts, None where the audio was unreadable: those are not scored."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        texts = [
            greedy_decode(path, self.vocabulary) if readable else None
            for path, readable in zip(output.predictions, (output.label_ids >= 0).any(1), strict=True)
        ]
        data = dataloader.dataset
        unread = {audio for audio, text in zip(data.table["audio"], texts, strict=True) if text is None}
        skipped = [entry for entry in read_skipped(data.skip_log).values() if entry["audio"] in unread]
        _check_skipped(skipped, len(set(data.table["audio"])), self.args.max_skipped_fraction)
        scored = [pair for pair in zip(data.table["text"], texts, strict=True) if pair[1] is not None]
        for name, value in error_rates(*zip(*scored, strict=True)).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        output.metrics[f"{metric_key_prefix}_utterances"] = len(scored)
        return output._replace(predictions=texts)


class _DrawEpoch(TrainerCallback):
    """Tells the sampler which epoch it draws; accelerate's loaders do not on every path."""

    def __init__(self, sampler: LengthGroupedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int(state.epoch or 0)


class _FreezeEncoder(TrainerCallback):
    """In the first updates only the head learns; the convs keep whatever they were.

    Freezing starts after the optimizer took all parameters in. It skips those without a gradient.
    """

    def __init__(self, num_steps: int):
        self.num_steps, self._frozen = num_steps, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step < self.num_steps and not self._frozen:
            self._frozen = [p for p in model.wav2vec2.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad = False
        elif state.global_step >= self.num_steps and self._frozen:
            for parameter in self._frozen:
                parameter.requires_grad = True
            self._frozen = []


class _WatchSkippedAudio(TrainerCallback):
    """Stops the run where decoding meets more unreadable files than allowed; headers were looked at before it began."""

    def __init__(self, train_dataset: SpeechDataset, max_fraction: float):
        self.path, self.max_fraction = train_dataset.skip_log, max_fraction
        self.train_audio = set(train_dataset.table["audio"])

    def on_log(self, args, state, control, **kwargs):
        skipped = [entry for entry in read_skipped(self.path).values() if entry["audio"] in self.train_audio]
        _check_skipped(skipped, len(self.train_audio), self.max_fraction)


def _check_skipped(skipped: Sequence[dict[str, str]], num_files: int, max_fraction: float) -> None:
    if len(skipped) > max_fraction * num_files:
        raise UserError(
            f"{len(skipped)} of {num_files} audio files cannot be decoded, such as {skipped[0]['audio']}: "
            f"{skipped[0]['reason']}; mend or leave out what skipped_audio.jsonl lists, or raise --max_skipped_fraction"
        )


class _RunLog(ProgressCallback):
    """A bar, one readable line for each logged step, and the same as JSON in `metrics.jsonl`."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if not state.is_world_process_zero:
            return
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            dynamic_ncols=True,
            unit="update",
            disable=args.disable_tqdm,
        )
        with open(self._path(args), "w", encoding="utf-8") as file:  # resumed: what the checkpoint knows, no more
            file.writelines(json_line(dict(sorted(entry.items()))) for entry in state.log_history)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not state.log_history or "train_runtime" in logs:
            return
        entry = state.log_history[-1]
        with open(self._path(args), "a", encoding="utf-8") as file:
            file.write(json_line(dict(sorted(entry.items()))))
        tqdm.write(f"update {state.global_step}/{state.max_steps} · " + _line(entry))

    @staticmethod
    def _path(args) -> Path:
        return Path(args.output_dir) / "metrics.jsonl"


def _line(entry: dict[str, Any]) -> str:
    parts = [
        ("epoch", "epoch {:.2f}"),
        ("loss", "loss {:.3f}"),
        ("learning_rate", "learning rate {:.2e}"),
        ("eval_loss", "validation loss {:.3f}"),
        ("eval_wer", "WER {:.1%}"),
        ("eval_cer", "CER {:.1%}"),
        ("eval_accuracy", "accuracy {:.1%}"),
        ("eval_uar", "UAR {:.1%}"),
    ]
    return " · ".join(form.format(entry[name]) for name, form in parts if name in entry)
