"""Flags of `TrainingArguments` that our samplers, loaders and scores do not follow: refused, or ignored with a line.

All others mean what `Trainer` says.
"""

from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Any

from w2v2.errors import UserError

REFUSED = {  # flag → why, and what to do instead
    "prediction_loss_only": "scores need predictions: leave it out",
    "batch_eval_metrics": "scores are those of a whole set: leave it out",
    "include_for_metrics": "scores need predictions and labels alone: leave it out",
    "label_names": "labels are made from the manifests: leave it out",
    "fp16_full_eval": "weights stay in 32 bits: use --fp16",
    "bf16_full_eval": "weights stay in 32 bits: use --bf16",
    "auto_find_batch_size": "a batch is a part of the recipe: lower --micro_batch_seconds instead",
    "label_smoothing_factor": "CTC has no labels to smooth: leave it out",
    "neftune_noise_alpha": "it is for models of text: leave it out",
    "use_liger_kernel": "it is for models of text: leave it out",
    "dataloader_in_order": "the order would follow the workers' speed, and no run could be repeated: leave it out",
    "dataloader_persistent_workers": "workers would repeat the first epoch's crops: leave it out",
}
NO_EFFECT = (  # the evaluation loop, the samplers and the schedules are ours
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "train_sampling_strategy",
    "length_column_name", "data_seed", "remove_unused_columns", "use_cache", "do_predict",
    "lr_scheduler_kwargs",
)  # fmt: skip
NO_EFFECT_BY_SECONDS = ("dataloader_drop_last",)
TRAINING_ALONE = (  # without a training ignored
    "mode", "classifier_proj_size", "crop_seconds",
    "min_seconds", "max_seconds", "speed_perturbation", "accept_changed_batches", "freeze_feature_encoder", "freeze_encoder_steps", "mask_time_prob",
    "mask_time_length", "mask_feature_prob", "mask_feature_length", "layerdrop", "activation_dropout",
    "hidden_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "hold_fraction", "final_lr_scale",
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "micro_batch_seconds", "batch_seconds", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_grad_norm", "label_smoothing_factor", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "logging_strategy", "logging_steps", "logging_first_step",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "auto_find_batch_size", "neftune_noise_alpha", "ignore_data_skip",
    "ddp_find_unused_parameters", "ddp_static_graph", "fsdp", "fsdp_config", "deepspeed", "parallelism_config",
    "dataloader_drop_last", "dataloader_persistent_workers",
)  # fmt: skip


def check_stock_flags(args: Any, bears: Collection[str] = ()) -> list[str]:
    """Set flags that are ignored to their defaults. Returns a line for each reason, with the flags that were given.

    Raises UserError for a flag that is refused, unless the task `bears` it.
    """
    alone = [] if args.do_train else _reset(args, TRAINING_ALONE)
    for f in fields(args):
        if f.name in REFUSED and f.name not in bears and getattr(args, f.name) != default_of(f):
            raise UserError(f"--{f.name} {getattr(args, f.name)}: {REFUSED[f.name]}")
    idle = _reset(args, NO_EFFECT + (NO_EFFECT_BY_SECONDS if args.micro_batch_seconds else ()))
    reasons = {"nothing is trained": alone, "not used here": idle}
    return [f"{', '.join(f'--{name}' for name in names)} ({reason})" for reason, names in reasons.items() if names]


def _reset(args: Any, names: Collection[str]) -> list[str]:
    """Set flags to their defaults. Returns those that had another value."""
    found = [f for f in fields(args) if f.name in names and getattr(args, f.name) != default_of(f)]
    for f in found:
        setattr(args, f.name, default_of(f))
    return [f.name for f in found]


def default_of(one: Field) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default
