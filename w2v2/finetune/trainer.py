"""`Trainer` with the wav2vec 2.0 paper's way of fine-tuning (appendix B of the paper, fairseq's configurations).

To the stock one it adds: the tri-stage learning rate, an encoder that stays frozen at first, batches of like length drawn as a
pure function of (seed, epoch), effective batches in seconds with a gradient that no cut changes, the feature extractor in every
saved folder, readable lines and `metrics.jsonl`.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from w2v2.data.audio import SAMPLING_RATE
from w2v2.errors import UserError, one_line
from w2v2.finetune.batching import MicroBatches, UpdateSampler, collate_update
from w2v2.finetune.ctc_data import SpeechDataset, read_skipped
from w2v2.train.folder_swap import open_to_others
from w2v2.train.launch import leave_group
from w2v2.train.log import METRICS_FILE, say_in_a_line
from w2v2.train.records import StepRecords
from w2v2.train.schedule import lr_factor


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
    """`Trainer` for a head on a wav2vec 2.0. Data sets have `lengths` (in samples); evaluation keeps their order.

    Without `train_dataset` it only evaluates. With `batch_seconds` an update is a whole effective batch, cut into micro-batches of at
    most `micro_batch_seconds`, padding included (`update_batches.py`); otherwise it is as `Trainer` has it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # These models take **kwargs but ignore `num_items_in_batch`; without this, loss and gradient would be too
        # large by the accumulation steps and again by the number of processes.
        self.model_accepts_loss_kwargs = False
        log_harmlessly(self)
        if self.train_dataset is not None:
            self.sampler = self._build_sampler()
            self.add_callback(_DrawEpoch(self.sampler))
            self.add_callback(_FreezeEncoder(self.args.freeze_encoder_steps))
            self.add_callback(_WatchSkippedAudio(self.train_dataset, self.args.max_skipped_fraction))
        transformers.utils.logging.disable_progress_bar()  # of writing a model's one shard

    def _build_sampler(self) -> Sampler:
        args, lengths = self.args, self.train_dataset.lengths
        if not args.batch_seconds:
            return LengthGroupedSampler(lengths, args.per_device_train_batch_size, args.seed)
        samples = [round(seconds * SAMPLING_RATE) for seconds in (args.batch_seconds, args.micro_batch_seconds)]
        return UpdateSampler(lengths, *samples, args.seed, rank=args.process_index, num_ranks=args.world_size)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """The stock training. A finished run is only loaded: where it had ended inside an epoch, `Trainer` would do one more update."""
        if resume_from_checkpoint is None:
            return super().train(**kwargs)
        folder = Path(resume_from_checkpoint)
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        best = folder.with_name(f"checkpoint-{state.best_global_step}")
        self.state = state
        self._load_from_checkpoint(str(best if self.args.load_best_model_at_end and best.is_dir() else folder))

    def get_train_dataloader(self) -> DataLoader:
        """By seconds the loader is not prepared by Accelerate: the sampler deals to the ranks itself."""
        if not self.args.batch_seconds:
            return super().get_train_dataloader()
        num_workers = self.args.dataloader_num_workers
        return DataLoader(
            MicroBatches(self.train_dataset, self.data_collator),
            batch_sampler=self.sampler,
            collate_fn=collate_update,
            num_workers=num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """By seconds: this rank's micro-batches of one update, accumulated; the gradient is divided once, by the whole effective batch.

        Each micro-batch's loss counts for as much as `loss_weight` says, over the sum of that on all ranks. DDP's mean over the ranks is
        undone. Returns this rank's part of the loss times the ranks, whose mean is the effective batch's loss.
        """
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        micro_batches = self._prepare_inputs(inputs)["micro_batches"]
        weights = [micro["weight"] * self.loss_weight(micro["inputs"]) for micro in micro_batches]
        total = self.accelerator.reduce(torch.tensor(sum(weights), device=self.args.device), "sum")
        heard = torch.zeros((), device=self.args.device)
        for index, (micro, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            is_last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model=model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, micro["inputs"])
                loss = loss * weight * self.args.world_size / total
                self.accelerator.backward(loss)
            heard += loss.detach()
        return heard

    def loss_weight(self, inputs: dict[str, torch.Tensor]) -> float:
        """How much a micro-batch's loss counts for: its utterances, where the loss is their mean."""
        return float(len(inputs["labels"]))

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Only an update that is saved can be the best: validations may be more frequent than saves."""
        if self.args.save_strategy != SaveStrategy.BEST and not self.control.should_save:
            return False
        return super()._determine_best_metric(metrics, trial)

    @property
    def best_update(self) -> int | None:
        """The update whose weights were chosen by validation and loaded at the end; None: the last ones stayed."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def end(self) -> None:
        leave_group()
        super().end()

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

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _read_safely(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _read_safely(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict=state_dict)
        folder = output_dir or self.args.output_dir
        # A processor writes another file alone.
        getattr(self.processing_class, "feature_extractor", self.processing_class).save_pretrained(folder)
        Path(folder, "training_args.bin").unlink(missing_ok=True)  # a pickle; the flags are in finetune_config.yaml
        open_to_others(Path(folder))

    def create_model_card(self, *args, **kwargs):
        """The stock card, which reads the schedule's name from an enumeration that has no `tri_stage`."""
        schedule = self.args.lr_scheduler_type
        self.args.lr_scheduler_type = SimpleNamespace(value=schedule)
        try:
            super().create_model_card(*args, **kwargs)
        finally:
            self.args.lr_scheduler_type = schedule


def describe_best(update: int | None) -> str:
    """For the last line on the console."""
    return "" if update is None else f"        best: update {update}; "


@contextlib.contextmanager
def _read_safely(checkpoint: str | None) -> Iterator[None]:
    """torch reads these files with `weights_only`: what is no plain tensor in them, or torn, becomes a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{checkpoint}: its training state is not loaded, being torn or none that Trainer wrote ({reason}): resume from "
            "another checkpoint, or start from its weights with --model_name_or_path"
        ) from None


class _DrawEpoch(TrainerCallback):
    """Tells the sampler which epoch it draws; accelerate's loaders do not on every path. Ranks get masks and dropout of their own."""

    def __init__(self, sampler: LengthGroupedSampler | UpdateSampler):
        self.sampler = sampler

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:
            set_seed(args.seed + args.process_index)

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
        check_skipped(skipped, len(self.train_audio), self.max_fraction)


def check_skipped(skipped: Sequence[dict[str, str]], num_files: int, max_fraction: float) -> None:
    if len(skipped) > max_fraction * num_files:
        raise UserError(
            f"{len(skipped)} of {num_files} audio files cannot be decoded, such as {skipped[0]['audio']}: "
            f"{skipped[0]['reason']}; mend or leave out what skipped_audio.jsonl lists, or raise --max_skipped_fraction"
        )


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
        # Resumed: what the checkpoint knows, no more.
        history = [dict(sorted(entry.items())) for entry in state.log_history]
        self._records = StepRecords(Path(args.output_dir) / METRICS_FILE, head=history)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not state.log_history or "train_runtime" in logs:
            return
        entry = state.log_history[-1]
        self._records.append(dict(sorted(entry.items())))
        tqdm.write(f"update {state.global_step}/{state.max_steps} · " + _line(entry))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._records.sync()

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self._records.close()


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
