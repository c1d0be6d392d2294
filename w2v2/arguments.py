"""The flags: dataclasses with help texts, read from a YAML file and the command line.

`pretrain.py CONFIG.yaml --flag value` — the YAML's values are put in front of the command line's, so the command line wins
and both go through the same checks.
"""

import contextlib
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from w2v2.data.workers import explain_loss
from w2v2.errors import HUB_TOKEN, LocalError, UserError, as_user_error, error_line
from w2v2.train import console, heartbeat
from w2v2.train.schedule import SCHEDULES
from w2v2.train.stop import Stopped, leave
from w2v2.train.teardown import settle


def _flag(default: Any, help: str, **metadata) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments:
    """What is heard, and how an effective batch is drawn, cropped and cut."""

    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Training manifests (CSV, TSV, JSON, JSONL, Parquet, Kaldi or audio folders)."},
    )
    validation_data: list[str] = _flag([], "Validation manifests; none: no validation.")
    data_root: str | None = _flag(None, "What `$data_root` and relative paths in the manifests stand for.")
    min_seconds: float = _flag(2.0, "Shorter utterances are left out.")
    max_seconds: float | None = _flag(None, "Longer utterances are left out (none: they are cropped, never dropped).")
    crop_seconds: float = _flag(
        15.38, "Longest crop that is taken of an utterance, drawn anew each epoch (15.38: 768 latent frames)."
    )
    length_grid_seconds: float = _flag(0.32, "Crops are rounded down to this grid (+ 0.02 s): few distinct lengths.")
    batch_hours: float = _flag(1.6, "Effective batch: hours of speech, after cropping, in one update over all devices.")
    micro_batch_seconds: str = _flag(  # text on the command line; a float from then on, or "auto" until the search is done
        "200",
        "Most seconds of padded audio that a device holds at a time; `auto` tries before the first update what it can hold, up to what "
        "keeps it busy (a resumed run on as many processes keeps what was found).",
    )
    max_skipped_fraction: float = _flag(
        0.01, "Largest fraction of unreadable files that is skipped; beyond it the run stops."
    )
    dataloader_num_workers: int = _flag(2, "Processes that decode audio; 0 decodes in the main process.")
    dataloader_prefetch_factor: int = _flag(4, "Micro-batches that each worker decodes ahead.")


@dataclass
class ModelArguments:
    """The model and its objective."""

    model_name_or_path: str | None = _flag(
        None, "Start from the weights of this pretrained folder or Hub id (with a fresh optimizer)."
    )
    config_name: str | None = _flag(
        None,
        "Start from random weights of this configuration: a folder, a Hub id or a name in configs/models (default: base).",
    )
    config_overrides: str | None = _flag(None, "Changes to the configuration, as `num_hidden_layers=6,layerdrop=0.0`.")
    mask_time_prob: float = _flag(
        0.65, "Mask spans: expected number of masked frames over frames, overlaps counted twice."
    )
    mask_time_length: int = _flag(10, "Latent frames in a mask span.")
    mask_time_min_masks: int = _flag(2, "Fewest mask spans in an utterance that has room for them.")
    diversity_loss_weight: float | None = _flag(
        None, "Weight of the diversity loss (default: the configuration's, 0.1)."
    )
    diversity_delay_steps: int = _flag(
        0, "Updates before the diversity loss is brought in (small models: see docs/results.md)."
    )
    diversity_warmup_steps: int = _flag(0, "Updates over which the diversity loss then grows linearly to its weight.")
    diversity_scope: str = _flag(
        "micro_batch",
        "Code statistics of the diversity loss: `micro_batch` (as fairseq per device) or `effective_batch` (exact, costs a "
        "second pass through the convs).",
        choices=["micro_batch", "effective_batch"],
    )
    feature_grad_mult: float = _flag(0.1, "Scale of the gradient that reaches the convs.")
    feature_penalty_weight: float = _flag(10.0, "Weight of the mean square of the convs' output.")
    max_gumbel_temperature: float = _flag(2.0, "Gumbel temperature at the first update.")
    min_gumbel_temperature: float = _flag(0.5, "Gumbel temperature below which it does not fall.")
    gumbel_temperature_decay: float = _flag(0.999995, "Factor of the Gumbel temperature at each update.")


@dataclass
class OptimizationArguments:
    """The update."""

    max_steps: int = _flag(400_000, "Updates in the run.")
    learning_rate: float = _flag(5e-4, "Peak learning rate.")
    lr_scheduler_type: str = _flag("linear", "What follows the warm-up.", choices=list(SCHEDULES))
    warmup_steps: float = _flag(32_000, "Updates of warm-up; under 1: a fraction of the run.")
    adam_beta1: float = _flag(0.9, "Adam's first decay.")
    adam_beta2: float = _flag(0.98, "Adam's second decay.")
    adam_epsilon: float = _flag(1e-6, "Adam's epsilon.")
    weight_decay: float = _flag(0.01, "Decoupled weight decay.")
    decay_norms_and_biases: bool = _flag(True, "Apply weight decay to norms and biases too, as fairseq does.")
    max_grad_norm: float = _flag(0.0, "Clip the gradient's norm (per masked frame) to this; 0 does not clip.")
    gradient_checkpointing: bool = _flag(False, "Recompute activations in the backward pass: less memory, slower.")
    gradient_checkpointing_stages: list[str] = _flag(
        ["encoder"],
        "Whose activations: the `encoder`'s (transformer), the `convs`', or both.",
        choices=["encoder", "convs"],
    )
    torch_compile: bool = _flag(
        False, "Fuse what the transformer does frame by frame (needs a C compiler; try whether it pays)."
    )
    positional_conv: str = _flag(
        "auto",
        "The positional convolution as the library's (`stock`) or as products in `blocks` (`auto`: blocks on a GPU).",
        choices=["auto", "blocks", "stock"],
    )
    gradient_compression: str = _flag(
        "none",
        "Type in which several devices send their gradients: as they are, or half the bytes.",
        choices=["none", "bf16"],
    )
    ddp_timeout: int = _flag(
        1800, "Several devices: seconds without a step after which one of them counts as hung, and all of them end."
    )
    max_non_finite_updates: int = _flag(
        20,
        "Updates in a row without a finite loss or gradient after which the run stops; one such update alone is skipped.",
    )
    seed: int = _flag(42, "Seed of everything random.")


@dataclass
class RunArguments:
    """Where the run lives, and when it logs, validates and saves."""

    output_dir: str | None = _flag(None, "Folder of the run.")
    overwrite_output_dir: bool = _flag(False, "Delete the run that `output_dir` holds and start anew.")
    resume_from_checkpoint: str | None = _flag(
        None, "`auto` (newest whole checkpoint, or a fresh start) or a checkpoint's path."
    )
    accept_changed_batches: bool = _flag(
        False, "Resume though data, seed, batch_hours, crops or masks are others than the checkpoint's run had."
    )
    logging_steps: int = _flag(10, "Updates between two lines of metrics.jsonl.")
    eval_steps: int = _flag(1_000, "Updates between two validations.")
    save_steps: int = _flag(1_000, "Updates between two checkpoints.")
    save_total_limit: int = _flag(3, "Checkpoints that are kept; 0 keeps all.")
    max_hours: float | None = _flag(
        None,
        "Save and leave with status 75 at the first update after so many hours of training (start-up not counted), as on SIGTERM.",
    )
    save_failure: str = _flag(
        "stop",
        "What a full or failing disk at a save does: `stop` ends the run, `warn` goes on and tries again at the next save.",
        choices=["stop", "warn"],
    )
    collapse_action: str = _flag(
        "stop",
        "Where codes collapse or nothing is learned: `warn` half-way through the window and `stop` at its end, only `warn`, or `none`.",
        choices=["stop", "warn", "none"],
    )
    collapse_window_steps: int | None = _flag(
        None, "Updates that a collapse has to last (default: a tenth of the run, but 500 to 2,000)."
    )
    report_to: list[str] = _flag(["tensorboard"], "Trackers (tensorboard, wandb, trackio, …), `all` or `none`.")
    disable_tqdm: bool = _flag(False, "No progress bar.")
    log_level: str = _flag(
        "warning", "Python's logging level.", choices=["debug", "info", "warning", "error", "critical"]
    )
    dry_run: bool = _flag(False, "Print what the run would do, write plan.json, and stop.")
    use_cpu: bool = _flag(False, "Stay on the CPU even where there is an accelerator.")
    push_to_hub: bool = _flag(False, "Push the folder to the Hub at the end, and as `hub_strategy` says.")
    hub_model_id: str | None = _flag(None, "Repository on the Hub (default: the name of output_dir).")
    hub_license: str | None = _flag(None, "Licence of the weights, stated in the model card.")
    data_description: str | None = _flag(
        None, "What the training audio is and where it comes from, in your words, for the model card."
    )
    hub_private_repo: bool = _flag(False, "Create the repository as a private one.")
    hub_strategy: str = _flag("end", "When to push: at the `end`, or at `every_save`.", choices=["end", "every_save"])


@dataclass
class PretrainArguments(RunArguments, OptimizationArguments, ModelArguments, DataArguments):
    """All flags of pretrain.py. The defaults are BASE's (wav2vec 2.0 paper, section 4; fairseq's wav2vec2_base_librispeech)."""

    def __post_init__(self):
        for name in ("model_name_or_path", "config_name", "resume_from_checkpoint", "hub_model_id"):
            if getattr(self, name) in ("", "none"):  # how a command line takes back what a YAML file says
                setattr(self, name, None)
        for name in ("train_data", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name} is required: give it on the command line or in the YAML file")
        if self.micro_batch_seconds != "auto":
            self.micro_batch_seconds = _seconds("micro_batch_seconds", self.micro_batch_seconds)
        for name in ("batch_hours", "crop_seconds", "learning_rate", "max_steps", "logging_steps",
                     "save_steps", "eval_steps", "min_gumbel_temperature", "max_gumbel_temperature", "mask_time_prob"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} is {getattr(self, name)}: it has to be greater than 0")
        for name, least in (("seed", 0), ("ddp_timeout", 1), ("dataloader_num_workers", 0), ("dataloader_prefetch_factor", 1), ("save_total_limit", 0),
                            ("mask_time_length", 1), ("mask_time_min_masks", 1), ("warmup_steps", 0), ("length_grid_seconds", 0), ("min_seconds", 0),
                            ("diversity_delay_steps", 0), ("diversity_warmup_steps", 0), ("feature_penalty_weight", 0),
                            ("max_non_finite_updates", 1)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise UserError(f"--{name} is {getattr(self, name)}: it has to be {least} or more")
        if self.collapse_window_steps is not None and self.collapse_window_steps < 1:
            raise UserError(f"--collapse_window_steps is {self.collapse_window_steps}: it has to be 1 or more")
        if self.seed >= 2**32:
            raise UserError(f"--seed is {self.seed}: it has to be below 2**32")
        if self.max_hours is not None and not self.max_hours > 0:
            raise UserError(f"--max_hours is {self.max_hours}: it has to be greater than 0")
        if self.max_seconds is not None and self.max_seconds < self.min_seconds:
            raise UserError(f"--max_seconds {self.max_seconds} is below --min_seconds {self.min_seconds}")
        if not self.gradient_checkpointing_stages:
            raise UserError(
                "--gradient_checkpointing_stages is empty: name a stage, or leave --gradient_checkpointing out"
            )
        if self.gradient_checkpointing_stages != ["encoder"] and not self.gradient_checkpointing:
            raise UserError("--gradient_checkpointing_stages needs --gradient_checkpointing")
        if self.model_name_or_path and self.config_name:
            raise UserError("--model_name_or_path and --config_name exclude one another: weights come from one place")


def _seconds(name: str, value: str | float) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"--{name} is {value}: it has to be a number of seconds greater than 0, or `auto`")
    return seconds


class _Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else "; --help lists what there is"


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `flag: value` lines, found a {type(values).__name__}")
    return values


def _yaml_as_flags(path: str, parser: HfArgumentParser, types: dict[str, Any]) -> list[str]:
    """Command-line form of a flat YAML file; keys are checked here, values by the parser.

    An empty value (`null`, `[]`) has no such form: it becomes the parser's default where the flag can be empty.
    """
    flags = []
    for name, value in _read_yaml(path).items():
        if name not in types:
            raise UserError(f"{path}: unknown key {name!r}{_nearest(str(name), list(types))}")
        if isinstance(value, dict):
            raise UserError(f"{path}: key {name!r} holds a mapping: a flag takes a value or a list")
        if value is None or value == []:
            if not (type(None) in get_args(types[name]) if value is None else get_origin(types[name]) is list):
                raise UserError(f"{path}: key {name!r} has no value: give it one, or leave the key out")
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse_command_line(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Instances of `dataclass_types` from `[CONFIG.yaml] --flag value …` (default: the process's own arguments).

    Raises `UserError` for an unknown flag or key (with the nearest name), a value of the wrong kind, a missing required one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        list(dataclass_types),
        allow_abbrev=False,
        usage="%(prog)s [CONFIG.yaml] [--flag value …]",
        conflict_handler="resolve",
    )
    hints = {name: hint for types in dataclass_types for name, hint in get_type_hints(types).items()}
    known = [f.name for types in dataclass_types for f in fields(types) if f.init]
    if argv and not argv[0].startswith("-"):
        argv = _yaml_as_flags(argv[0], parser, {name: hints[name] for name in known}) + argv[1:]
    rest = parser.parse_known_args(argv)[1]
    if rest:
        if not rest[0].startswith("-"):
            raise UserError(f"unexpected argument {rest[0]!r}: write [CONFIG.yaml] --flag value …, the file first")
        name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        raise UserError(f"unknown flag {rest[0].split('=')[0]}{_nearest(name, known)}")
    _refuse_tokens(argv)
    instances = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(instances)


def _refuse_tokens(argv: Sequence[str]) -> None:
    """A flag's value is printed, logged and written to the run's files, where a token must never stand."""
    for index, value in enumerate(argv):
        if HUB_TOKEN.search(value):
            flags = [text.split("=")[0] for text in argv[: index + 1] if text.startswith("--")]
            raise UserError(
                f"{flags[-1] if flags else 'an argument'} holds what looks like a token of the Hub: flags are written to the run's "
                "files; set the environment variable HF_TOKEN, or call `hf auth login`"
            )


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """A device's memory that does not suffice is a setting to change: the same batches would not fit at the next attempt either.

    After an hour of work it is not: memory that is fragmented, or another program's, is worth another attempt.
    """
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        is_full = type(error).__name__ == "OutOfMemoryError"  # torch's; torch itself need not be loaded
        if not is_full or time.monotonic() - started > 3600:
            raise
        first = str(error).strip().splitlines()[0]
        raise LocalError(f"{first} Give a device less at once: a smaller --micro_batch_seconds (pretrain.py: or `auto`), "
                         "--per_device_train_batch_size (fine-tuning) or --gradient_checkpointing; the run goes on with "
                         "--resume_from_checkpoint auto") from error  # fmt: skip


@console.outlived()
def run_script(main: Callable[[], Any]) -> None:
    """Run an entry point: a `UserError` ends it with exit status 2 and one line on standard error; so does a lost worker of a loader.

    `Stopped` ends it with 75, or with 0 under a launcher that would start it again (`leave`). A console that cannot be written any more changes none of these.
    """
    try:
        with heartbeat.explained(), _memory_explained():
            main()
    except Stopped as stopped:
        leave(stopped)
    except (UserError, OSError, RuntimeError) as error:
        lost = explain_loss(error)
        found = as_user_error(error) if isinstance(error, OSError) else error
        if lost is None and not isinstance(found, UserError):
            raise
        # A UserError raised in a loader's worker brings its traceback along.
        message = lost or str(found).rpartition("UserError: ")[2].strip()
        if lost or isinstance(found, LocalError) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(error_line(message), file=sys.stderr)
        sys.exit(2)
    finally:
        settle()
