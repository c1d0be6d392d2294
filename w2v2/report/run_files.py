"""What a run left in its folder, read with patience: whatever is missing or torn is noted, not fatal."""

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from w2v2.errors import UserError, one_line
from w2v2.train.log import METRICS_FILE, read_metrics

PRETRAINING, RECOGNITION, CLASSIFICATION, PROBE = "pretraining", "recognition", "classification", "probe"
_MARKS = (METRICS_FILE, "results.json", "probe.json", "plan.json")  # one of them makes a folder a run's
SKIPPED_FILES = ("skipped_audio.jsonl", "skipped_validation.jsonl")


@dataclass
class RunFiles:
    """The contents of a run's folder; what is not there is empty."""

    folder: Path
    name: str
    kind: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # the flags as the run wrote them
    model: dict[str, Any] = field(default_factory=dict)  # config.json
    plan: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)
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
    run = RunFiles(folder, folder.resolve().name, PRETRAINING)
    if (folder / METRICS_FILE).is_file():
        run.metrics = read_metrics(folder / METRICS_FILE)
    for name in ("plan", "results", "probe"):
        setattr(run, name, _read_mapping(run, f"{name}.json"))
    saved = sorted(folder.glob("checkpoint-[0-9]*/config.json"), key=lambda path: path.stat().st_mtime)
    run.model = _read_mapping(run, "config.json") or _read_mapping(
        run, str(Path(*saved[-1].parts[-2:])) if saved else ""
    )
    for name in ("events", "codebook_use", "predictions"):
        setattr(run, name, _read_lines(run, f"{name}.jsonl"))
    run.non_finite = _read_lines(run, "non_finite_updates.jsonl")
    run.skipped = {name: lines for name in SKIPPED_FILES if (lines := _read_lines(run, name))}
    run.codebook_use = [line for line in run.codebook_use if {"audio_hours", "counts"} <= line.keys()]
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
    if not folder.exists():
        there = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, there, n=1, cutoff=0.5)
        return "no such folder" + (
            f": did you mean {folder.parent / close[0]}?" if close else ": give a run's output_dir"
        )
    return f"not a run's folder, as it holds none of {', '.join(_MARKS)}: give the output_dir of a run"


def _find_kind(run: RunFiles) -> str:
    if run.probe:
        return PROBE
    scores = run.results.get("validation") or run.results.get("pooled") or {}
    keys = {key.removeprefix("eval_") for record in [*run.metrics, scores, *run.predictions[:1]] for key in record}
    if (run.folder / "vocab.json").exists() or keys & {"wer", "cer", "per", "hypothesis"}:
        return RECOGNITION
    return (
        CLASSIFICATION
        if run.results or keys & {"uar", "prediction"} or "finetune" in _config_name(run)
        else PRETRAINING
    )


def _config_name(run: RunFiles) -> str:
    return next((path.name for path in run.folder.glob("*_config.yaml")), "")


def _read_mapping(run: RunFiles, name: str) -> dict[str, Any]:
    """A JSON or YAML file's mapping; empty where it is missing or, with a note, where it is something else."""
    path = run.folder / name
    if not path.is_file():  # a device would be read without end
        return {}
    try:
        found = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text(encoding="utf-8"))
        if not isinstance(found, Mapping):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"{name} cannot be read: {one_line(error)}")
        return {}
    return dict(found)


def _read_lines(run: RunFiles, name: str) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines; others are counted in a note, but for a last line that a kill tore."""
    path = run.folder / name
    if not path.is_file():
        return []
    found, torn = [], []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append(record)
        elif line.strip() and number < len(lines):
            torn.append(number)
    if torn:
        run.notes.append(f"{name}: {len(torn)} lines cannot be read, the first is line {torn[0]}")
    return found
