"""`Trainer` with the wav2vec 2.0 paper's way of fine-tuning (appendix B of the paper, fairseq's configurations).

It adds the tri-stage learning rate, an encoder frozen at first, an order that is a pure function of (seed, epoch),
effective batches in seconds with a gradient that no cut changes, and `metrics.jsonl`.
"""

import contextlib
import json
import math
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerState, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError
from w2v2.finetune.arguments import METRICS_FILE, SKIPPED_FILE, keep_trained_flags
from w2v2.finetune.batching import LengthSampler, MicroBatches, UpdateSampler, collate_update
from w2v2.finetune.ctc_data import check_skipped, num_hours, read_skipped
from w2v2.finetune.evaluation import Evaluator
from w2v2.train.durable import match_modes
from w2v2.train.identity import check_agreement, compare, identify_labelled
from w2v2.train.launch import leave_group
from w2v2.train.records import StepRecords
from w2v2.train.schedule import lr_factor

DATA_FILE = "training_data.json"  # in a checkpoint: what its batches depend on


class FineTuner(Evaluator):
    """`Trainer` for a head on a wav2vec 2.0. Data sets have `lengths` (in samples).

    Unreadable audio has no label and is not scored. Without `train_dataset` it only evaluates.

    With `batch_seconds` an update is a whole effective batch, cut into micro-batches of at most `micro_batch_seconds`,
    padding included; otherwise it is as `Trainer` has it.
    """

    dropped: dict[str, int] = {}  # how many utterances are left out of training, by reason
    identity: dict[str, Any] | None = None  # what the batches depend on, once `check_resume` has compared it

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # These models take **kwargs but ignore `num_items_in_batch`; without this, loss and gradient would be too
        # large by the accumulation steps and again by the number of processes.
        self.model_accepts_loss_kwargs = False
        if self.train_dataset is not None:
            self.sampler = self._build_sampler()
            self.add_callback(_AroundUpdates(self.sampler, self.train_dataset))
        transformers.utils.logging.disable_progress_bar()  # of writing a model's one shard

    def _build_sampler(self) -> Sampler:
        args, lengths = self.args, self.train_dataset.lengths
        if not args.batch_seconds:
            return LengthSampler(lengths, args.per_device_train_batch_size, args.seed)
        slowest = min([1, *args.speed_perturbation])  # which makes utterances longer
        batch, micro_batch = args.batch_seconds, args.micro_batch_seconds * slowest
        samples = [round(seconds * SAMPLING_RATE) for seconds in (batch, micro_batch)]
        return UpdateSampler(lengths, *samples, args.seed, rank=args.process_index, num_ranks=args.world_size)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return self.sampler

    def get_train_dataloader(self) -> DataLoader:
        """By seconds the loader is not prepared by Accelerate: the sampler deals to the ranks itself."""
        if not self.args.batch_seconds:
            return super().get_train_dataloader()
        return self.make_loader(MicroBatches(self.train_dataset, self.data_collator), self.sampler, collate_update)

    def describe(self, checkpoint: str | None) -> None:
        """What this run will do, on the console."""
        args, model = self.args, self.model
        start = args.model_name_or_path or f"random weights of {args.config_name}"
        num_all, num_learning = model.num_parameters() / 1e6, self.get_num_trainable_parameters() / 1e6
        frozen = f", the encoder after {args.freeze_encoder_steps} updates" if args.freeze_encoder_steps else ""
        args.print_once(f"       model: {start}, {num_all:.2f} M parameters, {num_learning:.2f} M learn{frozen}")
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        pieces, updates_per_epoch = f"{size} utterances", self.updates_per_epoch
        if args.batch_seconds:
            pieces = f"micro-batches of at most {args.micro_batch_seconds:g} s"
        elif size > len(self.train_dataset):
            pieces = f"all {len(self.train_dataset)} utterances"
        batch = f"{sum(self.train_dataset.lengths) / SAMPLING_RATE / updates_per_epoch:.0f} s ({pieces})"
        updates = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates_per_epoch)
        resumed = f", resumed from {checkpoint}" if checkpoint else ""
        args.print_once(f"     updates: {updates} of {batch}, {updates / updates_per_epoch:.1f} epochs{resumed}")

    @property
    def updates_per_epoch(self) -> int:
        """As `Trainer` counts them: the last batch of an epoch, and the last update, may be smaller."""
        args = self.args
        if args.batch_seconds:
            return len(self.sampler)
        batches = math.ceil(len(self.train_dataset) / args.per_device_train_batch_size)
        return math.ceil(math.ceil(batches / args.world_size) / args.gradient_accumulation_steps)

    def summary(self) -> dict[str, Any]:
        """What `results.json` says of the run."""
        args, train = self.args, self.train_dataset
        num_skipped = len(read_skipped(Path(args.output_dir, SKIPPED_FILE)))
        run = dict(model=args.model_name_or_path, config=args.config_name, seed=args.seed, skipped_audio=num_skipped)
        if train is None:
            return run
        run |= dict(updates=self.state.global_step, best_update=self.best_update, dropped=self.dropped)
        return run | dict(train_utterances=len(train), train_hours=round(num_hours(train.table), 4))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """The stock training, on the data of the checkpoint. A finished run is only loaded: `Trainer` would do an update more if it ended in an epoch."""
        if self.identity is None:
            self.check_resume(resume_from_checkpoint)
        if resume_from_checkpoint is None:
            return super().train(**kwargs)
        folder = Path(resume_from_checkpoint)
        if state := self._read_finished(folder):
            self.args.print_once(
                f"    finished: {state.global_step} updates; nothing more is trained, so flags of training change nothing"
            )
            best = folder.with_name(f"checkpoint-{state.best_global_step}")
            self.state = state
            return self._load_from_checkpoint(str(best if self.best_update and best.is_dir() else folder))
        try:  # torch reads the state with `weights_only`
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except UnpicklingError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{folder}: its training state is not one that Trainer wrote ({reason}), so it is not loaded: "
                            "start from its weights with --model_name_or_path") from None  # fmt: skip

    def _read_finished(self, checkpoint: Path) -> TrainerState | None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return state if 0 < self.args.max_steps <= state.global_step else None

    def check_resume(self, checkpoint: str | None) -> None:
        """Compare this run with the checkpoint's, before a file of it is written. A finished run keeps its flags of training.

        Raises UserError where a rank, or the checkpoint's run, has other utterances, labels or batches, or trains
        other parameters.
        """
        args, held_out = self.args, identify_labelled(self.args, self.eval_dataset)
        self.identity = identify_labelled(args, self.train_dataset)
        check_agreement([self.identity, held_out])
        self.identity["learning_parameters"] = self.get_num_trainable_parameters()
        # By it the best update is chosen, among those before a resume too.
        self.identity |= {f"validation_{name}": value for name, value in held_out.items() if name.endswith("_sha256")}
        if checkpoint and not (saved := Path(checkpoint, DATA_FILE)).is_file():
            args.print_once("     warning: the checkpoint is of an earlier version, whose data cannot be compared")
        elif checkpoint:
            before, learning = json.loads(saved.read_text(encoding="utf-8")), self.identity["learning_parameters"]
            if before.get("learning_parameters", learning) != learning:
                raise UserError(f"{checkpoint}: its run trains {before['learning_parameters']:,} parameters, this one {learning:,}: "
                                "give the flags that say what learns (--freeze_feature_encoder, --mode …) as they were")  # fmt: skip
            for note in compare(before, self.identity, args.accept_changed_batches):
                args.print_once(f"     resuming: {note}")
        if checkpoint and args.process_index == 0 and self._read_finished(Path(checkpoint)):  # it alone writes them
            keep_trained_flags(args, Path(checkpoint).parent)
            vars(self.model.config).update(args.model_changes())

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Raises UserError for a loss that is no number: its gradient spoils all weights, and `Trainer` would log 0."""
        train = self._train_effective_batch if "micro_batches" in inputs else super().training_step
        loss = train(model, inputs, num_items_in_batch)
        if self.accelerator.scaler is None and not torch.isfinite(loss):  # a loss scaler skips such updates
            raise UserError(
                f"update {self.state.global_step + 1}: the loss is NaN or infinite, so training ends; lower --learning_rate, "
                "raise --warmup_steps, and go on from a checkpoint with --resume_from_checkpoint auto, or anew"
            )
        return loss

    def _train_effective_batch(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """This rank's micro-batches of one update, accumulated and divided once, by the effective batch.

        Returns this rank's part of the loss times the ranks, whose mean is the effective batch's loss.
        """
        model.train()
        micro_batches = self._prepare_inputs(inputs)["micro_batches"]
        # 1. Weigh each micro-batch's loss: a dummy counts for nothing; the total is over all ranks.
        weights = [micro["weight"] * self.loss_weight(micro["inputs"]) for micro in micro_batches]
        total = self.accelerator.reduce(torch.tensor(sum(weights), device=self.args.device), "sum")
        heard = torch.zeros((), device=self.args.device)
        for index, (micro, weight) in enumerate(zip(micro_batches, weights, strict=True)):
            # 2. Accumulate: the ranks exchange gradients with the last micro-batch alone.
            is_last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model=model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, micro["inputs"])
                # 3. Divide: DDP takes the mean over the ranks, so each rank's part counts world_size times.
                loss = loss * weight * self.args.world_size / total
                self.accelerator.backward(loss)
            heard += loss.detach()
        return heard

    def loss_weight(self, inputs: dict[str, torch.Tensor]) -> float:
        """How much a micro-batch's loss counts for: its utterances, where the loss is their mean."""
        return float(len(inputs["labels"]))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
        shape = dict(kind=args.lr_scheduler_type, hold=args.hold_fraction, final_scale=args.final_lr_scale)
        factor = partial(lr_factor, total_steps=num_training_steps, warmup_steps=args.warmup_steps, **shape)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's moments, under the learning rate, decay and betas of this run's flags, as in pretraining."""
        groups = self.optimizer.param_groups
        flags = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        changed = {}
        for group, mine in zip(self.optimizer.param_groups, flags, strict=True):
            changed |= {name: f"{mine[name]} (was {group.get(name)})" for name in mine if group.get(name) != mine[name]}
            if group["initial_lr"] != mine["initial_lr"]:
                group["lr"] *= mine["initial_lr"] / group["initial_lr"]
            group.update(mine)
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        for name, values in changed.items():
            self.args.print_once(f"    resuming: {'learning_rate' if name == 'initial_lr' else name} {values}")

    def end(self) -> None:
        leave_group()
        super().end()

    @property
    def best_update(self) -> int | None:
        """The update whose weights were chosen by validation and loaded at the end; None: the last ones stayed."""
        return self.state.best_global_step if self.args.load_best_model_at_end else None

    def _save(self, output_dir: str | None = None, state_dict=None):
        if not self.args.should_save:  # the stock class lets all ranks write into one folder
            return
        super()._save(output_dir, state_dict=state_dict)
        folder = Path(output_dir or self.args.output_dir)
        # A processor writes another file alone.
        getattr(self.processing_class, "feature_extractor", self.processing_class).save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; the flags are in finetune_config.yaml
        if self.train_dataset is not None and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            (folder / DATA_FILE).write_text(json.dumps(self.identity, indent=2), encoding="utf-8")
        match_modes(folder)


class _AroundUpdates(TrainerCallback):
    """Tells sampler and data set the epoch, freezes the encoder at first, and writes `metrics.jsonl`.

    Stops the run where decoding meets more unreadable files than allowed; headers were looked at before it began.
    """

    def __init__(self, sampler: Sampler, train_dataset: Dataset):
        self.sampler, self.train_dataset = sampler, train_dataset
        self._frozen = []

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index > 0:  # ranks draw masks of their own
            set_seed(args.seed + args.process_index)
        known = [dict(sorted(entry.items())) for entry in state.log_history]  # of a run that is resumed
        path = Path(args.output_dir, METRICS_FILE)
        self._records = StepRecords(path, head=known, is_main=state.is_world_process_zero)

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Before the workers start; accelerate's loaders sometimes do not tell the sampler."""
        self.sampler.epoch = self.train_dataset.epoch = int(state.epoch or 0)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Freezing starts after the optimizer took all parameters in; it skips those without a gradient."""
        is_frozen = state.global_step < args.freeze_encoder_steps
        if is_frozen and not self._frozen:
            self._frozen = [p for p in model.wav2vec2.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(not is_frozen)

    def on_log(self, args, state, control, logs=None, **kwargs):
        check_skipped(self.train_dataset, args.max_skipped_fraction)
        if "train_runtime" not in logs:  # the summary at the end
            self._records.append(dict(sorted(state.log_history[-1].items())))

    def on_save(self, args, state, control, **kwargs):
        self._records.sync()
