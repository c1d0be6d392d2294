"""The model card of a fine-tuned folder: recipe, data, and scores, these also as the Hub's own metadata (`model-index`)."""

import json
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from w2v2.errors import printable
from w2v2.hub.card_parts import (
    UNKNOWN_TO_THE_PROGRAM,
    data_row,
    fill,
    hub_id,
    in_hours,
    licence,
    publishable,
    stated_rows,
    table,
)
from w2v2.hub.curves import FINETUNING_PICTURES, model_config


class _Task(NamedTuple):
    hub_name: str
    does: str
    ask: str  # what the card's code does with `run`, the pipeline
    limit: str


_TASKS = {
    "Wav2Vec2ForCTC": _Task(
        "automatic-speech-recognition",
        "A speech recogniser: wav2vec 2.0 under a linear layer, trained with CTC on transcribed speech. It writes the\n"
        "characters of `vocab.json`, and knows no others.",
        'print(run({"raw": waveform, "sampling_rate": 16_000})["text"])',
        "It writes plain words, as its training text did: no punctuation or figures that were not in it.",
    ),
    "Wav2Vec2ForSequenceClassification": _Task(
        "audio-classification",
        "A classifier of whole utterances: wav2vec 2.0 under a linear head over the mean of its frames. It tells the\n"
        "classes listed below from one another, and knows no others.",
        'print(run({"raw": waveform, "sampling_rate": 16_000}))',
        "It answers with one of its classes whatever it hears; its probabilities were not calibrated.",
    ),
}

# Key in results.json (`lm_`: under `lm`, by beam search with a language model): its name, what the Hub calls it, and how it is written.
MEASURES = {
    "wer": ("WER", "wer", "{:.2%}"),
    "cer": ("CER", "cer", "{:.2%}"),
    "per": ("PER", "per", "{:.2%}"),
    "lm_wer": ("WER with the language model", "wer", "{:.2%}"),
    "lm_cer": ("CER with the language model", "cer", "{:.2%}"),
    "lm_per": ("PER with the language model", "per", "{:.2%}"),
    "accuracy": ("Accuracy", "accuracy", "{:.2%}"),
    "uar": ("Unweighted average recall", "recall", "{:.2%}"),
    "macro_f1": ("Macro-F1", "f1", "{:.4f}"),
    "eer": ("Equal error rate", "eer", "{:.2%}"),
    "min_dcf": ("Minimum detection cost", "min_dcf", "{:.4f}"),
}

_RECIPE = [
    ("Initial weights", "{model_name_or_path}"),
    ("Random weights of the configuration", "{config_name}"),
    ("Transformer", "{num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads"),
    ("Updates", "{updates} of {max_steps}"),
    ("Weights published", "those after update {best_update}, best on the validation data"),
    ("Training", "{mode}"),
    ("Effective batch", "{batch}"),
    ("Peak learning rate", "{learning_rate}"),
    ("Schedule", "{lr_scheduler_type}, warm-up {warmup_steps}"),
    ("Convolutions frozen", "{freeze_feature_encoder}"),
    ("Updates of the new layer alone", "{freeze_encoder_steps}"),
    ("Time masks", "probability {mask_time_prob}, spans of {mask_time_length} frames"),
    ("Channel masks", "probability {mask_feature_prob}, spans of {mask_feature_length} channels"),
    ("Layerdrop", "{layerdrop}"),
    ("Vocabulary", "{vocabulary_size} entries"),
    ("Classes", "{classes}"),
    ("Language model of the search", "{lm[path]}"),
    ("Seed", "{seed}"),
    ("Device-hours, validation in between included", "{device_hours}"),
]

_CARD = string.Template("""
# $title

$does

## Results

$results

The scores are of this folder's weights. $validation

$curves

## Recipe

| | |
|---|---|
$recipe

The flags that differ from their defaults are in `finetune_config.yaml`, all scores in `results.json`.

## Data

| | |
|---|---|
$data

$unknown

## How to load it

```python
import numpy as np
from transformers import pipeline

source = $literal
run = pipeline("$task", model=source)

waveform = np.random.default_rng(0).uniform(-0.1, 0.1, 16_000)  # put your speech here: mono, 16 kHz
$ask
```

## Licence

$licence

## Limits

- It expects mono speech sampled at 16 kHz, of the kind that it was trained on.
- $limit
- Bias in the training audio, of voices, accents or topics, has neither been measured nor reduced.
""")


def write_finetuned_card(
    output_dir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    device_hours: float | None = None,
) -> bool:
    """Write `README.md`; False where the folder's `config.json` names a model that no card is known for.

    Args:
        config: the resolved flags, and `batch`, the effective batch in words, where it is known.
        results: as in `results.json`: name of a set → its measures (`MEASURES` says which are shown); under `run` what
            was done.
        device_hours: hours of training times processes; None where they were not measured.
    """
    output_dir, config = Path(output_dir), publishable(config)
    model = model_config(output_dir)
    task = _TASKS.get((model.get("architectures") or [None])[0])
    if task is None:
        return False
    run, scores = publishable(results.get("run") or {}), _scores(results)
    given = {name: value for name, value in config.items() if value is not None}
    facts = {**model, **given, **run, "device_hours": in_hours(device_hours), "classes": _classes(model, task)}
    source = printable(config.get("hub_model_id") or output_dir.resolve().name)
    training = data_row("Training", config.get("train_data"), run.get("train_utterances"), run.get("train_hours"))
    held_out = [data_row(label, config.get(flag), None, None) for label, flag in _HELD_OUT if config.get(flag)]
    text = _CARD.substitute(
        title=source.split("/")[-1],
        does=task.does,
        results=_results_table(scores) if scores else "Nothing was measured.",
        validation="The best update was chosen on the set `validation`." if "validation" in scores else "",
        curves="\n\n".join(
            f"![{title}](plots/{name}.png)"
            for name, (title, _) in FINETUNING_PICTURES.items()
            if (output_dir / "plots" / f"{name}.png").exists()
        ),
        recipe=table(fill(_RECIPE, facts)),
        data=table([training, *held_out, *stated_rows(config)]),
        unknown=UNKNOWN_TO_THE_PROGRAM,
        literal=json.dumps(source, ensure_ascii=False),
        task=task.hub_name,
        ask=task.ask,
        licence=licence(config),
        limit=task.limit,
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task.hub_name,
        tags=["wav2vec2"],
        license=config.get("hub_license"),
        base_model=hub_id(config.get("model_name_or_path")),
        model_name=source.split("/")[-1],
        eval_results=_eval_results(task, scores),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(output_dir / "README.md")
    return True


_HELD_OUT = (("Validation", "validation_data"), ("Test", "test_data"))


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Set → the measures that a card shows, as numbers."""
    sets = {name: values for name, values in results.items() if name != "run" and isinstance(values, Mapping)}
    found = {}
    for name, values in sets.items():
        values = {**values, **{f"lm_{key}": value for key, value in (values.get("lm") or {}).items()}}
        numbers = {key: values[key] for key in ("utterances", *MEASURES) if isinstance(values.get(key), int | float)}
        if numbers.keys() & MEASURES.keys():
            found[name] = numbers
    return found


def _results_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    shown = [key for key in MEASURES if any(key in values for values in scores.values())]
    rows = [["Set", "Utterances", *(MEASURES[key][0] for key in shown)], ["---"] * (2 + len(shown))]
    for name, values in scores.items():
        cells = [MEASURES[key][2].format(values[key]) if key in values else "not measured" for key in shown]
        rows.append([f"`{name}`", f"{values['utterances']:,}" if "utterances" in values else "", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _eval_results(task: _Task, scores: Mapping[str, Mapping[str, float]]) -> list[EvalResult] | None:
    """One entry for each set and measure; values are fractions, as everywhere in the program."""
    return [
        EvalResult(
            task_type=task.hub_name,
            dataset_type=name,
            dataset_name=name,
            dataset_split="validation" if name == "validation" else "test",
            metric_type=MEASURES[key][1],
            metric_name=f"{MEASURES[key][0]} (fraction)",
            metric_value=value,
        )
        for name, values in scores.items()
        for key, value in values.items()
        if key in MEASURES
    ] or None


def _classes(model: Mapping[str, Any], task: _Task) -> str | None:
    if task.hub_name != "audio-classification" or not model.get("id2label"):
        return None
    labels = list(map(str, model["id2label"].values()))
    more = f" and {len(labels) - 20:,} more, in `config.json`" if len(labels) > 20 else ""
    return f"{len(labels):,}: {', '.join(labels[:20])}{more}"
