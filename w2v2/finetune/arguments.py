"""The flags that both fine-tuning scripts share, and the output folder that they ask for.

They are `transformers.TrainingArguments`, with fairseq's fine-tuning recipe as defaults, and ours beside them.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import cached_file

from w2v2.errors import UserError, check_ranges, flag, make_output_dir, refuse, take_back
from w2v2.finetune.stock_flags import check_stock_flags, default_of
from w2v2.manifests.dataset_loading import LabelledDatasetArguments
from w2v2.model.loading import locate
from w2v2.train.schedule import SCHEDULES
from w2v2.train.trackers import check_trackers

METRICS_FILE, SKIPPED_FILE, RESULTS_FILE = "metrics.jsonl", "skipped_audio.jsonl", "results.json"
PREDICTIONS_FILE, CONFIG_FILE = "predictions.jsonl", "finetune_config.yaml"
CACHE_FOLDER = "_cache"  # tables of the manifests that were read
_STATE_FILE = "trainer_state.json"  # what `Trainer` writes last into a checkpoint
_CHECKPOINT_FILES = (_STATE_FILE, "model.safetensors", "optimizer.pt", "scheduler.pt")
_RUN_FILES = (METRICS_FILE, SKIPPED_FILE, RESULTS_FILE, PREDICTIONS_FILE, CONFIG_FILE, "config.json",
              "model.safetensors", "vocab.json", _STATE_FILE, "training_args.bin", "preprocessor_config.json",
              "processor_config.json", "tokenizer_config.json", "runs", "plots", "subtitles",
              "report.html", "events.jsonl")  # fmt: skip
_NOT_IN_CONFIG = {"overwrite_output_dir", "resume_from_checkpoint", "do_eval", "debug", "disable_tqdm", "hub_token",
                  "gradient_checkpointing", "dataloader_pin_memory", "accept_changed_batches"}  # fmt: skip
_MODEL_FLAGS = ("mask_time_prob mask_time_length mask_feature_prob mask_feature_length layerdrop final_dropout "
                "activation_dropout hidden_dropout attention_dropout feat_proj_dropout").split()  # fmt: skip
_TRAINED_FLAGS = (*_MODEL_FLAGS, *("learning_rate lr_scheduler_type warmup_steps hold_fraction final_lr_scale adam_beta1 adam_beta2 "
                  "adam_epsilon weight_decay max_grad_norm freeze_encoder_steps").split())  # fmt: skip


@dataclass
class FineTuningArguments(LabelledDatasetArguments, TrainingArguments):
    """`TrainingArguments` plus data and model. Defaults: BASE on 100 h of labels (fairseq's base_100h).

    Its effective batch of 1,600 s is 128 utterances of LibriSpeech, which are counted unless `micro_batch_seconds` is
    given. Raises UserError for flags that do not go together, or are out of range.
    """

    recipes = "finetune"  # the folder of configs/ that a configuration's bare name stands for

    train_data: list[str] = flag([], "Training manifests.", heading="Data")
    validation_data: list[str] = flag([], "Validation manifests: all together choose the best checkpoint.")
    test_data: list[str] = flag([], "Test manifests, each scored by itself at the end with the best checkpoint.")
    data_root: str | None = flag(None, "What `$data_root` and relative paths in the manifests stand for.")
    min_seconds: float = flag(0.2, "Shorter utterances are left out of training.", min=0)
    max_seconds: float | None = flag(35.0, "Longer utterances are left out of training.", above=0)
    max_skipped_fraction: float = flag(0.01, "Unreadable fraction of a set that stops the run.", min=0, max=1)
    dataloader_num_workers: int = flag(2, "Processes that decode audio; 0: the main process.", min=0, max=1000)
    remove_unused_columns: bool = flag(False, "Not used: the data set holds nothing else.")
    model_name_or_path: str | None = flag(None, "Pretrained wav2vec 2.0: a folder or Hub id.", heading="Model")
    config_name: str | None = flag(None, "Random weights of this configuration instead: the baseline.")
    do_train: bool = flag(True, "false: only evaluate the fine-tuned model that model_name_or_path names.")
    freeze_feature_encoder: bool = flag(True, "Keep the convs as they were pretrained.")
    freeze_encoder_steps: int = flag(0, "First updates in which only the new head learns.", min=0)
    speed_perturbation: list[float] = flag(
        [], "Training speech is played at one of these speeds, drawn anew each epoch: 0.9 1 1.1.", min=0.5, max=2
    )
    mask_time_prob: float = flag(0.65, "Time mask: masked frames over frames, overlaps counted twice.", min=0)
    mask_time_length: int = flag(10, "Latent frames in a time mask.", min=1)
    mask_feature_prob: float = flag(0.5, "Channel mask: the same over channels.", min=0)
    mask_feature_length: int = flag(64, "Channels in a channel mask.", min=1)
    layerdrop: float = flag(0.1, "Probability that a transformer layer is left out.", min=0, max=1)
    activation_dropout: float = flag(0.1, "Dropout inside the feed-forward blocks.", min=0, max=1)
    hidden_dropout: float = flag(0.0, "Dropout of the transformer's hidden states.", min=0, max=1)
    attention_dropout: float = flag(0.0, "Dropout of attention weights.", min=0, max=1)
    feat_proj_dropout: float = flag(0.0, "Dropout of the convs' projected output.", min=0, max=1)
    final_dropout: float = flag(0.0, "Dropout before the new head.", min=0, max=1)
    per_device_train_batch_size: int = flag(8, "Utterances in a micro-batch.", min=1, heading="Batches")
    gradient_accumulation_steps: int = flag(16, "Micro-batches of a device in one update.", min=1)
    micro_batch_seconds: float | None = flag(None, "Padded seconds of a micro-batch, in place of a number.", above=0)
    batch_seconds: float | None = flag(None, "Seconds in one update of all devices (default: the product).", above=0)
    per_device_eval_batch_size: int = flag(64, "Most utterances evaluated together, however short.", min=1)
    eval_micro_batch_seconds: float = flag(100.0, "Padded seconds evaluated together; does not move results.", above=0)
    learning_rate: float = flag(3e-5, "Peak learning rate.", min=0, max=1, heading="Optimisation")
    lr_scheduler_type: str = flag("tri_stage", "What follows the warm-up.", choices=SCHEDULES)
    warmup_steps: float = flag(0.1, "Updates of warm-up; under 1: a fraction of the run.", min=0)
    hold_fraction: float = flag(0.4, "tri_stage: fraction of the run at the peak learning rate.", min=0, max=1)
    final_lr_scale: float = flag(0.05, "tri_stage: the last learning rate over the peak.", above=0, max=1)
    max_steps: int = flag(80_000, "Updates in the run; -1: as many as --num_train_epochs takes.", min=-1)
    adam_beta2: float = flag(0.98, "Adam's second decay.", min=0, below=1)
    max_grad_norm: float = flag(0.0, "Clip the gradient's norm to this; 0 does not clip.", min=0)
    output_dir: str | None = flag(None, "Folder of the run.", heading="Saving and resuming")
    overwrite_output_dir: bool = flag(False, "Delete the run that `output_dir` holds and start anew.")
    resume_from_checkpoint: str | None = flag(None, "`auto` (newest whole checkpoint, or none yet), or its path.")
    accept_changed_batches: bool = flag(False, "Resume though data, seed or batch are others than the run had.")
    save_strategy: str = flag("steps", "When to save: `steps`, `epoch`.")
    save_steps: float = flag(1_000, "Updates between two checkpoints; a multiple of eval_steps.", above=0)
    save_total_limit: int | None = flag(2, "Checkpoints that are kept, the best one among them.", min=1)
    load_best_model_at_end: bool = flag(True, "End with the checkpoint that was best on the validation data.")
    metric_for_best_model: str | None = flag(None, "What says which is best (default: wer; cer without spaces; per).")
    greater_is_better: bool | None = flag(False, "Whether more of it is better.")
    eval_strategy: str = flag("steps", "When to validate: `steps`, `epoch`.", heading="Watching")
    eval_steps: float = flag(1_000, "Updates between two validations; under 1: a fraction of the run.", above=0)
    logging_steps: float = flag(50, "Updates between two logged lines; under 1: a fraction of the run.", above=0)
    report_to: list[str] = flag(["tensorboard"], "Trackers (tensorboard, wandb, trackio, …), `all` or `none`.")
    hub_license: str | None = flag(None, "Licence of the weights, stated in the model card.", heading="Hub")
    data_description: str | None = flag(None, "The training audio and its source in your words, for the model card.")

    bears: ClassVar[tuple[str, ...]] = ()  # stock flags that only some task follows

    def __post_init__(self):
        take_back(self, "model_name_or_path", "config_name", "resume_from_checkpoint")
        self.check_dataset()
        check_ranges(self)  # of flags that are ignored, too
        ignored = check_stock_flags(self, self.bears)
        self._check_combinations()
        if self.gradient_checkpointing and self.ddp_find_unused_parameters is None:
            # Layers that are dropped, or frozen for a while, have no gradient.
            self.ddp_find_unused_parameters = True
        self.use_cpu = self.use_cpu or torch.backends.mps.is_available()  # MPS has no float64
        schedule, self.lr_scheduler_type = self.lr_scheduler_type, "linear"  # the stock class knows no tri_stage
        self.metric_for_best_model = self.metric_for_best_model or ""  # None would become the loss
        try:
            super().__post_init__()
        except (ValueError, ImportError, TypeError, OSError) as error:  # TypeError and OSError: --accelerator_config
            raise UserError(" ".join(str(error).split())) from None
        check_trackers(self.report_to, INTEGRATION_TO_CALLBACK)
        self.lr_scheduler_type = schedule
        # One process, one device: `Trainer` would replicate the model over all the GPUs that it sees.
        self._n_gpu = min(self.n_gpu, 1)
        if self.micro_batch_seconds:
            micro_batches = self.gradient_accumulation_steps * self.world_size
            self.batch_seconds = self.batch_seconds or self.micro_batch_seconds * micro_batches
            self.gradient_accumulation_steps = 1  # `Trainer` sees an update as one batch
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self.disable_tqdm = self.disable_tqdm or not sys.stderr.isatty()
        for line in ignored:
            self.print_once(f"     ignored: {line}")

    def _check_combinations(self) -> None:
        self.require(*self.required_flags())
        model, config, least, most = self.model_name_or_path, self.config_name, self.min_seconds, self.max_seconds
        refuse(
            (not self.do_train and (config or not model),
             "--do_train false needs a fine-tuned model: give --model_name_or_path, and no --config_name"),
            (not self.do_train and self.push_to_hub, "--do_train false with --push_to_hub: there is no new model to push"),
            (bool(model) == bool(config), "give one of --model_name_or_path (pretrained) and --config_name (random)"),
            (self.max_steps == 0, "--max_steps is 0: give 1 or more, or -1 to count --num_train_epochs"),
            (most is not None and most < least, f"--max_seconds {most} is below --min_seconds {least}: change one of them"),
            (self.batch_seconds and not self.micro_batch_seconds,
             "--batch_seconds needs --micro_batch_seconds: how much of it a device takes at once"),
            (self.hub_token, "--hub_token: flags are written to files; set the environment variable HF_TOKEN instead"),
        )  # fmt: skip

    def print_once(self, line: str) -> None:
        """A line on the console of the main process."""
        if self.process_index == 0:
            print(line, flush=True)

    def required_flags(self) -> tuple[str, ...]:
        return ("train_data", "validation_data", "output_dir") if self.do_train else ("output_dir",)

    def model_changes(self) -> dict[str, Any]:
        """The flags that are keys of the model's configuration."""
        return {name: getattr(self, name) for name in _MODEL_FLAGS} | {"apply_spec_augment": True}


def prepare_output_dir(args: FineTuningArguments) -> str | None:
    """Make `output_dir` ready and return the checkpoint to resume from, None for a fresh start.

    Only a folder that `Trainer` saved whole counts as a checkpoint; a pretrained model never does.
    Raises UserError where the folder holds a run and no flag says what to do with it.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    with args.main_process_first(local=False):  # the others then find the folder ready
        starts_anew = wanted is None or (wanted == "auto" and args.overwrite_output_dir)
        checkpoint = None if starts_anew else _find_checkpoint(wanted, folder)
        if checkpoint is None:
            _clear_run(folder, args)
        make_output_dir(folder)
    return checkpoint


def _find_checkpoint(wanted: str, folder: Path) -> str | None:
    """The folder that `--resume_from_checkpoint` names; for `auto` the newest that was not cut short, if any."""
    newest = Path(wanted)
    if wanted == "auto":
        saved = [path.parent for path in folder.glob(f"checkpoint-[0-9]*/{_STATE_FILE}")]
        if not saved:
            return None
        newest = max(saved, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    for name in _CHECKPOINT_FILES:
        if not (newest / name).is_file():
            raise UserError(f"--resume_from_checkpoint {wanted}: {newest} is not a whole checkpoint of a fine-tuning run: "
                            f"it lacks {name} (--save_only_model?). Start from it with --model_name_or_path in "
                            "another --output_dir")  # fmt: skip
    return str(newest)


def _clear_run(folder: Path, args: FineTuningArguments) -> None:
    """Remove a former run, if there is one and the flags allow it; files that no run of ours writes stay."""
    old = [*folder.glob("checkpoint-*"), *(folder / name for name in _RUN_FILES if (folder / name).exists())]
    if not old:
        return
    was_cut_short = args.resume_from_checkpoint and not (folder / "model.safetensors").exists()
    source = Path(args.model_name_or_path or args.config_name).resolve()
    refuse(
        (not (args.overwrite_output_dir or was_cut_short),
         f"--output_dir {folder} already holds a run ({old[0].name}): choose another folder, or give "
         "--resume_from_checkpoint auto or --overwrite_output_dir"),
        (folder.resolve() in (source, *source.parents),
         f"--output_dir {folder} holds the model to start from, {source}: choose another folder"),
    )  # fmt: skip
    for path in old:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_config(path: Path, *arguments: Any) -> None:
    """The flags that differ from their defaults, as a YAML file that starts the same run again."""
    changed = {}
    for instance in arguments:
        for f in fields(instance):
            value = getattr(instance, f.name)
            value = ["none"] if f.name == "report_to" and not value else value  # an empty list is no flag
            value, default = (v.value if isinstance(v, Enum) else v for v in (value, default_of(f)))
            plain = isinstance(value, (bool, int, float, str, list, type(None)))
            is_set = (value or 0) != (default or 0) or (f.name, value) == ("drop_characters", "")  # drops none
            if f.init and plain and is_set and f.name not in _NOT_IN_CONFIG:
                changed[f.name] = value
    path.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True), encoding="utf-8")


def keep_trained_flags(args: FineTuningArguments, folder: Path) -> None:
    """Set the flags that only training heeds as the finished run in `folder` had them, for its records."""
    if not (folder / CONFIG_FILE).is_file():  # a checkpoint that was moved
        return
    trained = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8")) or {}
    for f in fields(args):
        if f.name in _TRAINED_FLAGS:
            setattr(args, f.name, trained.get(f.name, default_of(f)))


def follow_folder(arguments: Any, source: str, names: Iterable[str], **others: Any) -> Any:
    """Flags of these `names` as the fine-tuned folder or Hub id `source` was trained with; a flag that was given wins.

    A checkpoint was trained as its run was, and a fold as its cross-validation. `others` are values that something else tells, where the folder does not.
    """
    folder = Path(locate(source))
    places = [folder]
    for prefix in ("checkpoint-", "fold-"):
        places += [places[-1].parent] * places[-1].name.startswith(prefix)
    found = next(filter(Path.is_file, (place / CONFIG_FILE for place in places)), None)
    if not folder.is_dir():
        found = cached_file(source, CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
    trained = others | (yaml.safe_load(Path(found).read_text(encoding="utf-8")) or {} if found else {})
    defaults = {f.name: default_of(f) for f in fields(arguments)}
    follows = (name for name in names if name in trained and getattr(arguments, name) == defaults[name])
    return replace(arguments, **{name: trained[name] for name in follows})
