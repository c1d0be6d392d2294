"""Flags of the scripts that listen to frozen models: probe.py and verify_speakers.py."""

from dataclasses import dataclass
from pathlib import Path

import torch

from w2v2.errors import SEEDS, check_ranges, flag, make_output_dir, refuse
from w2v2.evaluate.scores import CHARACTERS
from w2v2.manifests.dataset_loading import LabelledDatasetArguments


@dataclass
class FrozenArguments:
    """What both have."""

    output_dir: str | None = flag(None, "Folder for the results.", heading="Run")
    data_root: str | None = flag(None, "What `$data_root` and relative paths stand for.")
    max_skipped_fraction: float = flag(0.01, "Largest unreadable fraction of a set's utterances.", min=0, max=1)
    config_name: str | None = flag(None, "Configuration of the random weights.")
    seed: int = flag(0, "Of random weights and of whatever is drawn.", **SEEDS)
    use_cpu: bool = flag(False, "Leave a GPU alone.")
    overwrite_output_dir: bool = flag(False, "Replace the results that `output_dir` holds.")

    def __post_init__(self):
        check_ranges(self)
        refuse((not self.output_dir, "--output_dir is required: give it on the command line or in the YAML file"))

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu"

    def prepare_output_dir(self, results: str) -> Path:
        """The folder, made; UserError where it has results that may not be replaced."""
        folder = Path(self.output_dir)
        slip = f"--output_dir {folder} already holds {results}: choose another, or give --overwrite_output_dir"
        refuse(((folder / results).exists() and not self.overwrite_output_dir, slip))
        make_output_dir(folder)
        return folder


@dataclass
class ProbingArguments(LabelledDatasetArguments, FrozenArguments):
    """Linear probes of every layer."""

    checkpoints: list[str] = flag([], "Pretrained folders or Hub ids: runs/x/checkpoint-*.", heading="Probe")
    random_weights: bool = flag(True, "Probe random weights too, of --config_name or the first checkpoint's shape.")
    target: str = flag("label", f"The manifests' column that is read: label, speaker, any other, or `{CHARACTERS}`.")
    label_map: list[str] = flag([], "Labels to rename or merge, as OLD=NEW.")
    labels: list[str] = flag([], "Only these labels (after --label_map); other utterances are left out.")
    train_data: list[str] = flag([], "Training manifests.", heading="Data")
    validation_data: list[str] = flag([], "Validation manifests (default: a fifth of the training utterances).")
    test_data: list[str] = flag([], "Test manifests, scored together.")
    folds: str | None = flag(None, "Cross-validation over --train_data alone, by this column: speaker, session, …")
    num_folds: int | None = flag(None, "Even folds of whole groups (default: each group is a fold).", min=2)
    min_seconds: float = flag(0.2, "Shorter utterances are left out of training.", min=0)
    max_seconds: float | None = flag(None, "Longer utterances are left out of training.", above=0)
    classifier: str = flag("logistic", "Ridge is faster with many classes.", ["logistic", "ridge"], heading="Probe")
    measure: str = flag("uar", "What chooses the penalty and is shown.", choices=["uar", "accuracy", "macro_f1"])
    ctc_updates: int = flag(1_500, f"Updates of 16 utterances for each layer's CTC head ({CHARACTERS}).", min=1)

    def __post_init__(self):
        super().__post_init__()
        self.check_dataset()
        self.require("train_data")
        validation, test = self.list_sources("validation_data"), self.list_sources("test_data")
        refuse(
            (not self.checkpoints and not (self.random_weights and self.config_name),
             "--checkpoints is required: name pretrained folders (or --config_name, for random weights alone)"),
            (self.max_seconds is not None and self.max_seconds < self.min_seconds,
             f"--max_seconds {self.max_seconds} is below --min_seconds {self.min_seconds}: change one of them"),
            (bool(self.folds) == bool(test),
             "a probe is tested on --test_data or on --folds: give one of them"),
            (self.folds and (validation or self.target == CHARACTERS),
             f"--folds goes with neither --validation_data nor --target {CHARACTERS}: give --test_data"),
            (self.num_folds is not None and not self.folds,
             "--num_folds needs --folds: name the column whose groups stay together, such as speaker"),
        )  # fmt: skip


@dataclass
class VerificationArguments(FrozenArguments):
    """Speaker verification."""

    model_name_or_path: str | None = flag(
        None, "A pretrained or fine-tuned folder, or a Hub id.", heading="Verification"
    )
    trials: str | None = flag(None, "`1 a.wav b.wav` lines (0: two speakers); paths under --data_root or beside it.")
    manifest: list[str] = flag([], "Instead of --trials: utterances with speakers, among which trials are drawn.")
    speaker_column: str = flag("speaker", "The manifest's column that tells speakers apart, in all of them together.")
    num_trials: int = flag(20_000, "Trials drawn from --manifest, half of them of one speaker.", min=2)
    layer: int | None = flag(
        None, "Average this layer's frames (default: a classifier's projection, or every layer).", min=0
    )
    cohort: list[str] = flag([], "Manifests of other utterances, whose mean and deviation standardise the embeddings.")
    p_target: float = flag(0.01, "Prior of a target trial in the detection cost.", above=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        refuse(
            (bool(self.model_name_or_path) == bool(self.config_name),
             "give one of --model_name_or_path and --config_name (random weights)"),
            (bool(self.trials) == bool(self.manifest), "give one of --trials and --manifest"),
        )  # fmt: skip
