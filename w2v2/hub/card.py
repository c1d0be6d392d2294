"""Model cards: what a run did and measured, and nothing that it did not.

The text is in templates/*.md; this file gathers the facts that fill it. Anybody may read a card, so paths of this
machine are shortened to their last part and nothing named a token is written.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from w2v2.errors import printable
from w2v2.hub.curves import FINETUNING_PICTURES, PICTURES, Pictures, chance_accuracy, model_config

_TEMPLATES = Path(__file__).parent / "templates"
_TASKS = {
    "Wav2Vec2ForCTC": "automatic-speech-recognition",
    "Wav2Vec2ForSequenceClassification": "audio-classification",
}


class Measure(NamedTuple):
    name: str
    hub_name: str
    form: str = "{:.2%}"


# By their keys in results.json, where those of a beam search with a language model stand under `lm`.
MEASURES = {name: Measure(name.upper(), name) for name in ("wer", "cer", "per")}
MEASURES |= {f"lm_{name}": Measure(f"{name.upper()} with the language model", name) for name in ("wer", "cer", "per")}
MEASURES |= {
    "accuracy": Measure("Accuracy", "accuracy"),
    "uar": Measure("Unweighted average recall", "recall"),
    "macro_f1": Measure("Macro-F1", "f1", "{:.4f}"),
}


def write_model_card(
    output_dir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    """Write the `README.md` of a pretraining run.

    Args:
        config: the resolved flags; the folder's `config.json` is consulted for the model's own values.
        summary: of `utterances`, `hours`, `validation_utterances`, `validation_hours`, `devices` and `num_parameters`,
            whichever are known.
        metrics: records as in `metrics.jsonl`. The pictures that `draw_plots` left in the folder are embedded.
    """
    # What is known, later sources over earlier ones, and what follows from it.
    output_dir, config = Path(output_dir), publishable(config)
    trained, validated = _last(metrics, "loss"), _last(metrics, "eval_")
    facts = _merge(model_config(output_dir), config, summary) | {
        "updates_done": trained.get("step", 0),
        "device_hours": device_hours(metrics),
        "train": _describe_set(config, "train", summary.get("utterances"), summary.get("hours")),
        "validation": _describe_set(
            config, "validation", summary.get("validation_utterances"), summary.get("validation_hours")
        ),
    }
    values = dict(
        trained=trained,
        validated=validated,
        heard=max((record.get("audio_hours") or 0 for record in metrics), default=0),
        chance=chance_accuracy(output_dir),
    )
    _save_card(output_dir, "pretrained.md", facts, PICTURES, dict(tags=["wav2vec2", "pretraining"]), **values)


def write_finetuned_card(
    output_dir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    device_hours: float | None = None,
) -> bool:
    """Write the `README.md` of a fine-tuned folder; the scores are also in its metadata, for the Hub (`model-index`).

    Args:
        config: the resolved flags, and `batch`, the effective batch in words, where it is known.
        results: as in `results.json`: name of a set → its measures; under `run` what was done.
        device_hours: hours of training times processes; None where they were not measured.

    Returns:
        False, without a card, where the folder's `config.json` names another kind of model.
    """
    output_dir, config = Path(output_dir), publishable(config)
    model = model_config(output_dir)
    task = _TASKS.get((model.get("architectures") or [None])[0])
    if task is None:
        return False
    run, scores = publishable(results.get("run") or {}), _read_scores(results)
    facts = _merge(model, config, run) | {
        "device_hours": device_hours,
        "train": _describe_set(config, "train", run.get("train_utterances"), run.get("train_hours")),
        "validation": _describe_set(config, "validation"),
        "test": _describe_set(config, "test"),
    }
    shown = [key for key in MEASURES if any(key in found for found in scores.values())]
    values = dict(task=task, scores=scores, shown=shown, measures=MEASURES)
    metadata = dict(tags=["wav2vec2"], pipeline_tag=task, eval_results=_eval_results(task, scores))
    _save_card(output_dir, "finetuned.md", facts, FINETUNING_PICTURES, metadata, **values)
    return True


def _save_card(
    output_dir: Path, template: str, facts: Mapping[str, Any], pictures: Pictures, metadata: Mapping, **values: Any
) -> None:
    """Fill a template with `facts` and `values`, under the card's metadata (YAML), into `README.md`."""
    source = printable(facts.get("hub_model_id") or output_dir.resolve().name)
    title, base = source.split("/")[-1], facts.get("model_name_or_path") or ""
    data = ModelCardData(
        library_name="transformers",
        license=facts.get("hub_license"),
        base_model=base if base.count("/") == 1 and not os.path.exists(base) else None,  # a repository, no folder
        model_name=title if metadata.get("eval_results") else None,
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATES / template),
        title=title,
        literal=json.dumps(source, ensure_ascii=False),  # in Python
        argument=shlex.quote(source),  # in a shell
        facts=facts,
        row=_row_writer(facts),
        cell=_cell,
        pictures={name: title for name, (title, _) in pictures.items() if (output_dir / f"plots/{name}.png").exists()},
        **values,
    )
    card.save(output_dir / "README.md")


def _row_writer(facts: Mapping[str, Any]) -> Callable[[str, str], str]:
    """A function that makes a table's row of a label and a format string; empty where one of its facts is not known."""
    known = {name: fact for name, fact in facts.items() if fact not in (None, "")}

    def write_row(label: str, form: str) -> str:
        try:
            return f"\n| {label} | {_cell(form.format_map(known))} |"
        except KeyError:
            return ""

    return write_row


def _cell(text: str) -> str:
    """Text that others wrote, for one cell of a table: without line breaks and bars."""
    return printable(text.replace("\n", " ")).replace("|", "\\|")


def _describe_set(
    config: Mapping[str, Any], name: str, utterances: int | None = None, hours: float | None = None
) -> str:
    """Manifests as they were given, with what was counted in them."""
    sources = config.get(f"{name}_data") or []
    sources = [sources] if isinstance(sources, str) else sources
    parts = ["`" + printable(source).replace("`", "'") + "`" for source in sources] or ["none"]
    parts += [] if utterances is None else [f"{utterances:,} utterances"]
    parts += [] if hours is None else [f"{hours:,.2f} h"]
    return ", ".join(parts)


def publishable(value: Any) -> Any:
    """Resolved flags without tokens and without paths of this machine but their last part, at any depth."""
    if isinstance(value, Mapping):
        kept = {name: item for name, item in value.items() if not str(name).endswith("token")}
        return {name: item if name == "data_description" else publishable(item) for name, item in kept.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return PurePath(value).name
    return value


def device_hours(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Hours of all devices in updates: audio heard between records, over the throughput there, times the processes.

    None where a record of training lacks one of the three. What a resumed run had to repeat is not in it.
    """
    total, before = 0.0, 0.0
    for record in metrics:
        if "audio_seconds_per_second" not in record:
            continue
        hours, rate, processes = map(record.get, ("audio_hours", "audio_seconds_per_second", "num_processes"))
        if hours is None or not rate or not processes:
            return None
        total += (hours - before) / rate * processes
        before = hours
    return total or None


def _merge(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Later facts win over earlier ones, where they are known."""
    return {name: value for source in sources for name, value in source.items() if value is not None}


def _last(metrics: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, Any]:
    """The newest record with a measure of that prefix; empty when there is none."""
    return next((record for record in reversed(metrics) if any(name.startswith(prefix) for name in record)), {})


def _read_scores(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Set → the measures that a card shows, as numbers."""
    scores = {}
    for name, values in results.items():
        if name == "run" or not isinstance(values, Mapping):
            continue
        values = {**values, **{f"lm_{key}": value for key, value in (values.get("lm") or {}).items()}}
        numbers = {key: values[key] for key in ("utterances", *MEASURES) if isinstance(values.get(key), int | float)}
        if numbers.keys() & MEASURES.keys():
            scores[name] = numbers
    return scores


def _eval_results(task: str, scores: Mapping[str, Mapping[str, float]]) -> list[EvalResult] | None:
    """One entry for each set and measure; values are fractions, as everywhere in the program."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            dataset_split="validation" if name == "validation" else "test",
            metric_type=MEASURES[key].hub_name,
            metric_name=f"{MEASURES[key].name} (fraction)",
            metric_value=value,
        )
        for name, values in scores.items()
        for key, value in values.items()
        if key in MEASURES
    ] or None
