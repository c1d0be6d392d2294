"""The flags of pretrain.py: dataclasses with help texts and ranges. The defaults are BASE's."""

from dataclasses import dataclass

from w2v2.errors import SEEDS, check_ranges, flag, refuse, take_back
from w2v2.manifests.dataset_loading import DatasetArguments
from w2v2.manifests.sources import is_sources_file
from w2v2.train.schedule import SCHEDULES

DEFAULT_PROBE = 10  # updates that are timed for --gpu_hours


@dataclass
class PretrainArguments(DatasetArguments):
    """All flags of pretrain.py. The defaults are BASE's (wav2vec 2.0, section 4; fairseq's base_librispeech)."""

    recipes = "pretrain"  # the folder of configs/ that a configuration's bare name stands for
    split_flags = {"train_data": "dataset_split_names", "validation_data": "eval_split_name"}

    train_data: list[str] = flag(
        [],
        "Training manifests (CSV, TSV, JSON, JSONL, Parquet, Lhotse, Kaldi or audio folders, tars as "
        "'shards/*.tar' or 'shards/{000..012}.tar'), or one YAML list of sources (configs/data/mixed.yaml).",
        heading="Data",
    )
    validation_data: list[str] = flag([], "Validation manifests; none: no validation.")
    dataset_split_names: list[str] = flag([], "Splits of the data set to train on (default: train).")
    data_root: str | None = flag(None, "What `$data_root` and relative paths in the manifests stand for.")
    min_seconds: float = flag(2.0, "Shorter utterances are left out.", min=0)
    max_seconds: float | None = flag(None, "Longer utterances are left out (none: cropped, never dropped).", above=0)
    max_skipped_fraction: float = flag(
        0.01, "Largest fraction of unreadable files; beyond it the run stops.", min=0, max=1
    )
    sampling_alpha_language: float = flag(
        1.0, "Of a sources file: a language's share ∝ (its hours)^alpha; 0: all alike, 1: as they are.", min=0, max=1
    )
    sampling_alpha_corpus: float = flag(
        1.0, "Likewise, a source's share within its language (XLS-R: 0.5 for both).", min=0, max=1
    )
    streaming: bool = flag(
        False,
        "Train from shards that need not fit a disk: `train_data` names tars, or Parquet files that hold audio, as paths, "
        "URLs (s3://, https://, …), patterns (`{000..127}`, `*`) or folders.",
    )
    shuffle_window_shards: int = flag(
        16,
        "Streaming: shards whose utterances are shuffled together; the disk holds two or three times as many.",
        min=1,
    )
    shard_cache_gb: float | None = flag(
        None, "Streaming: disk for copies of shards (default: what three windows need; at least two).", above=0
    )
    shard_cache_dir: str | None = flag(
        None, "Streaming: folder of these copies, one a machine (default: in `output_dir`/cache)."
    )

    batch_hours: float = flag(
        1.6, "Effective batch: hours of cropped speech in an update.", above=0, max=1e4, heading="Batches"
    )
    micro_batch_seconds: float | None = flag(
        200.0,
        "Most seconds of audio that a device holds at a time; `auto` tries before the first update what it can "
        "hold, up to what keeps it busy (a resumed run on as many processes keeps what was found).",
        above=0,
        max=1e6,
        words={"auto": None},
    )
    crop_seconds: float = flag(
        15.38, "Longest crop of an utterance, drawn anew each epoch (768 latent frames).", above=0
    )
    length_grid_seconds: float = flag(0.32, "Crops are rounded down to this grid (+ 0.02 s): few lengths.", min=0)

    model_name_or_path: str | None = flag(None, "Start from these weights: a folder or Hub id.", heading="Model")
    config_name: str | None = flag(
        None, "Start from random weights: a folder, a Hub id or a name in configs/models (default: base)."
    )
    config_overrides: str | None = flag(None, "Changes to the configuration, as `num_hidden_layers=6,layerdrop=0.0`.")
    freeze_feature_encoder: bool = flag(
        False, "Keep the convs of --model_name_or_path as they are: no gradient, no optimizer state."
    )
    mask_time_prob: float = flag(0.65, "Mask spans: masked frames over frames, overlaps counted twice.", above=0, max=1)
    mask_time_length: int = flag(10, "Latent frames in a mask span.", min=1)
    mask_time_min_masks: int = flag(2, "Fewest mask spans in an utterance that has room for them.", min=1)
    diversity_loss_weight: float | None = flag(
        None, "Weight of the diversity loss (default: the configuration's, 0.1).", min=0
    )
    diversity_delay_steps: int = flag(0, "Updates without diversity loss (small models: docs/results.md).", min=0)
    diversity_warmup_steps: int = flag(0, "Updates over which it then grows linearly to its weight.", min=0)
    diversity_scope: str = flag(
        "micro_batch",
        "Code statistics of the diversity loss: a `micro_batch`'s (as fairseq's device), or the `effective_batch`'s "
        "(exact, costs a second pass through the convs).",
        choices=["micro_batch", "effective_batch"],
    )
    feature_grad_mult: float = flag(0.1, "Scale of the gradient that reaches the convs.", min=0)
    feature_penalty_weight: float = flag(10.0, "Weight of the mean square of the convs' output.", min=0)
    max_gumbel_temperature: float = flag(2.0, "Gumbel temperature at the first update.", above=0)
    min_gumbel_temperature: float = flag(0.5, "Gumbel temperature below which it does not fall.", above=0)
    gumbel_temperature_decay: float = flag(0.999995, "Factor of the Gumbel temperature at each update.", above=0, max=1)

    max_steps: int = flag(400_000, "Updates in the run.", min=1, heading="Optimisation")
    learning_rate: float = flag(5e-4, "Peak learning rate.", above=0, max=1)
    lr_scheduler_type: str = flag("linear", "What follows the warm-up.", choices=list(SCHEDULES))
    warmup_steps: float = flag(32_000, "Updates of warm-up; under 1: a fraction of the run.", min=0)
    adam_beta1: float = flag(0.9, "Adam's first decay.", min=0, below=1)
    adam_beta2: float = flag(0.98, "Adam's second decay.", min=0, below=1)
    adam_epsilon: float = flag(1e-6, "Adam's epsilon.", min=1e-20, max=1)
    weight_decay: float = flag(0.01, "Decoupled weight decay.", min=0)
    decay_norms_and_biases: bool = flag(True, "Apply weight decay to norms and biases too, as fairseq does.")
    max_grad_norm: float = flag(0.0, "Clip the gradient's norm (per masked frame) to this; 0 does not clip.", min=0)
    max_non_finite_updates: int = flag(
        20, "Updates in a row without finite loss or gradient that stop the run; a single one is skipped.", min=1
    )
    seed: int = flag(42, "Seed of everything random.", **SEEDS)

    output_dir: str | None = flag(None, "Folder of the run.", heading="Saving and resuming")
    overwrite_output_dir: bool = flag(False, "Delete the run that `output_dir` holds and start anew.")
    resume_from_checkpoint: str | None = flag(None, "`auto` (newest whole checkpoint, or none yet), or its path.")
    accept_changed_batches: bool = flag(
        False, "Resume though data, seed, batch_hours, crops or masks are others than the checkpoint's run had."
    )
    save_steps: int = flag(1_000, "Updates between two checkpoints.", min=1)
    save_total_limit: int = flag(
        3, "Checkpoints that are kept; 0 keeps all, as the run does while it looks like a collapse.", min=0
    )
    save_failure: str = flag(
        "stop", "A full or failing disk at a save: `stop`, or `warn` and try at the next.", choices=["stop", "warn"]
    )
    max_hours: float | None = flag(
        None,
        "Hours of training (without start-up) after which to save and leave with status 75, as on SIGTERM.",
        above=0,
    )

    dry_run: bool = flag(False, "Print what the run would do, write plan.json, and stop.", heading="Watching")
    probe_updates: int = flag(
        0, "Updates that are timed first, without a trace, to say how long the run takes; 0: none.", min=0, max=10_000
    )
    gpu_hours: float | None = flag(
        None, "With --dry_run: device-hours to propose a run for, at the speed that a probe measures.", above=0
    )
    logging_steps: int = flag(10, "Updates between two lines of metrics.jsonl.", min=1)
    eval_steps: int = flag(1_000, "Updates between two validations.", min=1)
    collapse_action: str = flag(
        "stop",
        "Codes collapse or nothing is learned: `warn` half-way through the window and `stop` at its end, only `warn`, "
        "or `none`.",
        choices=["stop", "warn", "none"],
    )
    collapse_window_steps: int | None = flag(
        None, "Updates that a collapse has to last (default: a tenth of the run, but 500 to 2,000).", min=1
    )
    report_to: list[str] = flag(["tensorboard"], "Trackers (tensorboard, wandb, trackio, …), `all` or `none`.")
    project: str = flag("huggingface", "The project that trackers put the run into.")
    run_name: str | None = flag(None, "The run's name in trackers (default: the name of output_dir).")
    trackio_space_id: str | None = flag(
        None, "Space of the Hub that Trackio reports to (none: this machine alone); private with --hub_private_repo."
    )
    disable_tqdm: bool = flag(False, "No progress bar.")
    log_level: str = flag(
        "warning", "Python's logging level.", choices=["debug", "info", "warning", "error", "critical"]
    )

    use_cpu: bool = flag(False, "Stay on the CPU even where there is an accelerator.", heading="Machine")
    dataloader_num_workers: int = flag(2, "Processes that decode audio; 0: the main process.", min=0, max=1000)
    dataloader_prefetch_factor: int = flag(4, "Micro-batches that each worker decodes ahead.", min=1)
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass: less memory, slower.")
    gradient_checkpointing_stages: list[str] = flag(
        ["encoder"], "Whose activations: the `encoder`'s (transformer), the `convs`'.", choices=["encoder", "convs"]
    )
    torch_compile: bool = flag(False, "Fuse what the transformer does by frame (needs a C compiler; may not pay).")
    fused_kernels: bool = flag(
        False, "Fuse that and GELU in the project's own Triton kernels (NVIDIA GPUs only; not timed on one yet)."
    )
    cuda_graph: bool = flag(
        False, "Launch the passes of a micro-batch as one CUDA graph (NVIDIA GPUs, bf16; not tried on one yet)."
    )
    positional_conv: str = flag(
        "auto",
        "The positional convolution as the library's (`stock`) or as products in `blocks` (`auto`: blocks on a GPU).",
        choices=["auto", "blocks", "stock"],
    )
    gradient_compression: str = flag(
        "none", "Several devices send gradients as they are, or half.", choices=["none", "bf16"]
    )
    ddp_timeout: int = flag(
        1800, "Seconds without a step after which a device counts as hung and all end.", min=1, max=1e8
    )

    push_to_hub: bool = flag(False, "Push the folder to the Hub at the end, and as `hub_strategy` says.", heading="Hub")
    hub_model_id: str | None = flag(None, "Repository on the Hub (default: the name of output_dir).")
    hub_license: str | None = flag(None, "Licence of the weights, stated in the model card.")
    data_description: str | None = flag(None, "The training audio and its source in your words, for the model card.")
    hub_private_repo: bool = flag(False, "Create the repository as a private one.")
    hub_strategy: str = flag("end", "When to push: at the `end`, or at `every_save`.", choices=["end", "every_save"])

    def __post_init__(self):
        take_back(
            self,
            "model_name_or_path",
            "config_name",
            "resume_from_checkpoint",
            "hub_model_id",
            "run_name",
            "trackio_space_id",
        )
        self.check_dataset()
        self.require("train_data", "output_dir")
        check_ranges(self)
        stages = self.gradient_checkpointing_stages
        by_source = self.sampling_alpha_language != 1 or self.sampling_alpha_corpus != 1
        refuse(
            (by_source and not is_sources_file(self.train_data),
             "--sampling_alpha_language and --sampling_alpha_corpus need sources: give --train_data one YAML list of them"),
            (self.streaming and is_sources_file(self.train_data),
             "--streaming reads one set of shards, not a sources file: name its tars or Parquet files in --train_data"),
            ((self.shard_cache_gb or self.shard_cache_dir) and not self.streaming,
             "--shard_cache_gb and --shard_cache_dir need --streaming"),
            (self.max_seconds is not None and self.max_seconds < self.min_seconds,
             f"--max_seconds {self.max_seconds} is below --min_seconds {self.min_seconds}: change one of them"),
            (self.min_gumbel_temperature > self.max_gumbel_temperature,
             f"--max_gumbel_temperature {self.max_gumbel_temperature} is below --min_gumbel_temperature "
             f"{self.min_gumbel_temperature}"),
            (not stages, "--gradient_checkpointing_stages is empty: name a stage"),
            (stages != ["encoder"] and not self.gradient_checkpointing,
             "--gradient_checkpointing_stages needs --gradient_checkpointing"),
            (self.torch_compile and self.fused_kernels,
             "--torch_compile and --fused_kernels exclude one another, because both fuse the same: leave one out"),
            (self.gpu_hours and not self.dry_run, "--gpu_hours proposes a run and starts none: give --dry_run with it"),
            (self.model_name_or_path and self.config_name,
             "--model_name_or_path and --config_name exclude one another, because weights come from one place: leave one out"),
        )  # fmt: skip

    @property
    def num_probed(self) -> int:
        """Updates that are timed before the run."""
        return self.probe_updates or (DEFAULT_PROBE if self.gpu_hours else 0)
