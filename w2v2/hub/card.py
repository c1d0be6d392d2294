"""Model cards: what a run did and measured, and nothing that it did not.

The text is in templates/*.md; this file gathers the facts that fill it. Anybody may read a card, so paths of this
machine are shortened to their last part, URLs lose logins and queries, and nothing named a token is written.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from w2v2.errors import hide_secrets, printable
from w2v2.evaluate.plots import FINETUNING_PICTURES, PICTURES, Pictures, model_config

Facts = Mapping[str, Any]
# Texts that may look like paths, or like names of secrets, and are none.
VERBATIM = set(
    "data_description drop_characters keep_characters drop_tokens labels label_map train_labels id2label label2id".split()
)

# Key in results.json (`lm_…`: of a beam search with a language model) → name on a card, name on the Hub, form.
MEASURES = {rate: (rate.upper(), rate, "{:.2%}") for rate in ("wer", "cer", "per")}
MEASURES |= {
    f"lm_{rate}": (f"{name} with the language model", rate, form) for rate, (name, _, form) in MEASURES.items()
}
MEASURES |= {
    "accuracy": ("Accuracy", "accuracy", "{:.2%}"),
    "uar": ("Unweighted average recall", "recall", "{:.2%}"),
    "macro_f1": ("Macro-F1", "f1", "{:.4f}"),
}


def write_model_card(output_dir: str | os.PathLike, *, config: Facts, summary: Facts, metrics: Sequence[Facts]) -> None:
    """Write the `README.md` of a pretraining run from its resolved flags and the records of its `metrics.jsonl`.

    `summary` holds `utterances`, `hours`, `validation_utterances`, `validation_hours`, `devices` and `num_parameters`,
    whichever are known. The pictures that `draw_plots` left in the folder are embedded.
    """
    trained, validated = (next((r for r in reversed(metrics) if key in r), {}) for key in ("loss", "eval_loss"))
    facts = _merge(model_config(output_dir), config, summary, {"device_hours": device_hours(metrics)}) | {
        "trained": trained,
        "validated": validated,
        "updates_done": trained.get("step", 0),
        "heard": max((record.get("audio_hours") or 0 for record in metrics), default=0),
    }
    _save_card(Path(output_dir), "pretrained.md", facts, PICTURES, tags=["wav2vec2", "pretraining"])


def write_finetuned_card(output_dir: str | os.PathLike, *, config: Facts, results: Facts) -> None:
    """Write the `README.md` of a fine-tuned folder; the scores are also in its metadata, for the Hub (`model-index`).

    `config` holds the resolved flags, and `world_size` and `device_hours` where they are known; `results` is what
    `results.json` holds: name of a set → its measures, and under `run` what was done.
    """
    model, scores = model_config(output_dir), _read_scores(results)
    is_recogniser = model["architectures"][0].endswith("ForCTC")
    task = "automatic-speech-recognition" if is_recogniser else "audio-classification"
    shown = {key: measure for key, measure in MEASURES.items() if any(key in found for found in scores.values())}
    facts = _merge(config, model, results.get("run") or {}) | {"task": task, "scores": scores, "measures": shown}
    evaluated = [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            dataset_split="validation" if name == "validation" else "test",
            metric_type=hub_name,
            metric_name=f"{measure} (fraction)",
            metric_value=values[key],
        )
        for name, values in scores.items()
        for key, (measure, hub_name, _) in shown.items()
        if key in values
    ]
    metadata = dict(tags=["wav2vec2"], pipeline_tag=task, eval_results=evaluated or None)
    _save_card(Path(output_dir), "finetuned.md", facts, FINETUNING_PICTURES, **metadata)


def _save_card(folder: Path, template: str, facts: Facts, pictures: Pictures, **metadata: Any) -> None:
    """Fill a template with `facts`, under the card's metadata (YAML), into `README.md`."""
    source = printable(facts.get("hub_model_id") or folder.resolve().name)
    title = source.split("/")[-1]
    repositories = {
        flag: name
        for flag in ("model_name_or_path", "dataset_name")
        if (name := facts.get(flag) or "").count("/") == 1 and not os.path.exists(name)  # no folder
    }
    data = ModelCardData(
        library_name="transformers",
        license=facts.get("hub_license"),
        base_model=repositories.get("model_name_or_path"),
        datasets=[repositories["dataset_name"]] if "dataset_name" in repositories else None,
        model_name=title if metadata.get("eval_results") else None,
        **metadata,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates" / template),
        title=title,
        source=source,
        quote=shlex.quote,
        facts=facts,
        row=partial(_row, facts),
        cell=_cell,
        pictures={name: title for name, (title, _) in pictures.items() if (folder / f"plots/{name}.png").exists()},
    )
    card.save(folder / "README.md")


def _row(facts: Facts, label: str, form: str) -> str:
    """A table's row of a label and a format string; empty where one of its facts is not known."""
    try:
        return f"\n| {label} | {_cell(form.format_map(facts))} |"
    except KeyError:
        return ""


def _cell(text: str) -> str:
    """Text that others wrote, for one cell of a table: without line breaks and bars."""
    return printable(text.replace("\n", " ")).replace("|", "\\|")


def publishable(value: Any) -> Any:
    """Resolved flags without secrets and without paths of this machine but their last part, at any depth."""
    if isinstance(value, Mapping):
        kept = {name: item for name, item in value.items() if not str(name).endswith("token")}
        return {name: item if name in VERBATIM else publishable(item) for name, item in kept.items()}
    if isinstance(value, list):
        return [publishable(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "..")) or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name  # it splits at both kinds of slash
    return hide_secrets(value) if isinstance(value, str) else value


def device_hours(metrics: Sequence[Facts]) -> float | None:
    """Hours of all devices in updates: audio heard between records, over the throughput there, times the processes.

    None where a record of training lacks the processes. What a resumed run had to repeat is not in it.
    """
    total, before = 0.0, 0.0
    for record in metrics:
        if rate := record.get("audio_seconds_per_second"):
            total += (record["audio_hours"] - before) / rate * record.get("num_processes", float("nan"))
            before = record["audio_hours"]
    return total if total > 0 else None


def _merge(*sources: Facts) -> dict[str, Any]:
    """What may be published of the facts that are known; later ones win."""
    return publishable({k: v for source in sources for k, v in source.items() if v not in (None, "")})


def _read_scores(results: Facts) -> dict[str, dict[str, float]]:
    """Set → the measures that a card shows, and how many utterances they are of."""
    scores = {}
    for name, values in results.items():
        found = values | {f"lm_{key}": value for key, value in (values.get("lm") or {}).items()}
        found = {key: found[key] for key in ("utterances", *MEASURES) if found.get(key) is not None}
        if name != "run" and found.keys() & MEASURES.keys():
            scores[name] = found
    return scores
