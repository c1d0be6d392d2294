"""What a run left in its folder, read with patience: whatever is missing or torn is noted, not fatal."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from w2v2.errors import UserError, did_you_mean, one_line
from w2v2.train.log import METRICS_FILE, read_metrics

PRETRAINING, RECOGNITION, CLASSIFICATION, PROBE = "pretraining", "recognition", "classification", "probe"
VERIFICATION = "verification"
# One of them makes a folder a run's.
_MARKS = (METRICS_FILE, "results.json", "probe.json", "verification.json", "plan.json")
SKIPPED_FILES = ("skipped_audio.jsonl", "skipped_validation.jsonl")


@dataclass
class RunFiles:
    """The contents of a run's folder; what is not there is empty."""

    folder: Path
    name: str
    kind: str = PRETRAINING
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # the flags as the run wrote them
    model: dict[str, Any] = field(default_factory=dict)  # config.json
    plan: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)  # or the verification of speakers
    events: list[dict[str, Any]] = field(default_factory=list)
    codebook_use: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # file → its lines
    non_finite: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def trained(self) -> list[dict[str, Any]]:
        return [record for record in self.metrics if "loss" in record]

    @property
    def validated(self) -> list[dict[str, Any]]:
        return [record for record in self.metrics if "eval_loss" in record]


def read_run(folder: str | os.PathLike) -> RunFiles:
    """Read a run's folder. Raises `UserError` where it is none, or its metrics.jsonl is damaged before its end."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _MARKS):
        raise UserError(f"{folder}: {_explain_folder(folder)}")
    run = RunFiles(folder, folder.resolve().name)
    if (folder / METRICS_FILE).is_file():
        run.metrics = read_metrics(folder / METRICS_FILE)
    run.plan, run.results, run.probe = (_read_mapping(run, f"{name}.json") for name in ("plan", "results", "probe"))
    run.probe = run.probe or _read_mapping(run, "verification.json")
    saved = sorted(folder.glob("checkpoint-[0-9]*/config.json"), key=lambda path: path.stat().st_mtime)[-1:]
    for path in [folder / "config.json", *saved]:
        run.model = run.model or _read_mapping(run, str(path.relative_to(folder)))
    run.events, run.predictions, run.non_finite = (
        _read_lines(run, f"{name}.jsonl") for name in ("events", "predictions", "non_finite_updates")
    )
    run.codebook_use = [line for line in _read_lines(run, "codebook_use.jsonl") if "counts" in line]
    run.skipped = {name: lines for name in SKIPPED_FILES if (lines := _read_lines(run, name))}
    run.config = _read_mapping(run, "pretrain_config.yaml") or _read_mapping(run, "finetune_config.yaml")
    run.kind = _find_kind(run)
    return run


def name_runs(runs: Sequence[RunFiles]) -> None:
    """Give runs of one name their folder's name too, or their whole path."""
    for choose in (lambda path: str(Path(*path.parts[-2:])), str):
        names = [run.name for run in runs]
        for run in runs:
            if names.count(run.name) > 1:
                run.name = choose(run.folder.resolve())


def _explain_folder(folder: Path) -> str:
    if folder.exists():
        return f"not a run's folder, as it holds none of {', '.join(_MARKS)}: give the output_dir of a run"
    there = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = did_you_mean(folder.name, there, "give a run's output_dir")
    return f"no such folder: {hint}"


def _find_kind(run: RunFiles) -> str:
    if run.probe:
        return PROBE if "models" in run.probe else VERIFICATION
    scores = run.results.get("validation") or run.results.get("pooled") or {}
    keys = {key.removeprefix("eval_") for record in [*run.metrics, scores, *run.predictions[:1]] for key in record}
    if (run.folder / "vocab.json").exists() or keys & {"wer", "cer", "per", "hypothesis"}:
        return RECOGNITION
    is_finetuning = run.results or keys & {"uar", "prediction"} or (run.folder / "finetune_config.yaml").exists()
    return CLASSIFICATION if is_finetuning else PRETRAINING


def _read_mapping(run: RunFiles, name: str) -> dict[str, Any]:
    """A JSON or YAML file's mapping; empty where it is missing or, with a note, where it is something else."""
    path = run.folder / name
    if not path.is_file():  # a device would be read without end
        return {}
    try:
        return dict((json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{name} cannot be read: {one_line(error)}")
        return {}


def _read_lines(run: RunFiles, name: str) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines; others are counted in a note, but for a last line that a kill tore."""
    path, found, torn = run.folder / name, [], []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            torn += [number] if line.strip() and number < len(lines) else []
    if torn:
        run.notes.append(f"{name}: {len(torn)} lines cannot be read, the first is line {torn[0]}")
    return found
