"""The model card of a pretraining run: what it did and measured, and nothing that it did not."""

import json
import os
import shlex
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from w2v2.errors import printable
from w2v2.hub.card_parts import (
    NOT_MEASURED,
    UNKNOWN_TO_THE_PROGRAM,
    data_row,
    device_hours,
    fill,
    hub_id,
    in_hours,
    licence,
    publishable,
    stated_rows,
    table,
)
from w2v2.hub.curves import PICTURES, chance_accuracy, model_config

_RECIPE = [
    ("Initial weights", "{model_name_or_path}"),
    ("Model configuration", "{config_name}"),
    ("Changed in it", "{config_overrides}"),
    ("Transformer", "{num_hidden_layers} layers, width {hidden_size}, {num_attention_heads} heads"),
    ("Parameters", "{num_parameters:,}"),
    ("Effective batch", "{batch_hours} h of audio"),
    ("Updates", "{updates_done} of {max_steps}"),
    ("Longest crop", "{crop_seconds} s"),
    ("Peak learning rate", "{learning_rate}"),
    ("Schedule", "{lr_scheduler_type}, warm-up {warmup_steps}"),
    ("Weight decay", "{weight_decay}"),
    ("Gradient clipped at", "{max_grad_norm}"),
    ("Masks", "probability {mask_time_prob}, spans of {mask_time_length} frames"),
    ("Distractors", "{num_negatives}"),
    ("Codebook", "{num_codevector_groups} groups of {num_codevectors_per_group} entries"),
    ("Contrastive temperature", "{contrastive_logits_temperature}"),
    ("Gumbel temperature", "{max_gumbel_temperature} to {min_gumbel_temperature}"),
    ("Gumbel temperature's decay", "{gumbel_temperature_decay} an update"),
    ("Diversity weight", "{diversity_loss_weight}"),
    ("Feature penalty's weight", "{feature_penalty_weight}"),
    ("Gradient into the convolutions", "× {feature_grad_mult}"),
    ("Seed", "{seed}"),
    ("Devices at the end of the run", "{devices}"),
    (
        "Device-hours",
        "{device_hours}, from the logged throughput; updates alone, without validation, saving and start-up",
    ),
]

_MEASURES = {
    "loss": "Loss",
    "contrastive_loss": "Contrastive loss",
    "diversity_loss": "Diversity loss",
    "accuracy": "Accuracy",
    "codebook_perplexity": "Codebook perplexity (soft)",
    "codebook_perplexity_hard": "Codebook perplexity (hard)",
    "code_entropy": "Entropy of a frame's codes (nats)",
}

_CODES = (
    "A perplexity is the number of codes in even use, summed over the {num_codevector_groups} codebooks: at most "
    "{num_codevector_groups} × {num_codevectors_per_group}."
)

_CARD = string.Template("""
# $title

A wav2vec 2.0 speech encoder, pretrained by self-supervision on unlabelled audio. It turns speech into one vector
a latent frame. **It is no speech recogniser**: it has no vocabulary and writes no text until it is fine-tuned.

## Recipe

| | |
|---|---|
$recipe

All settings, as resolved, are in `pretrain_config.yaml`.

## Data

| | |
|---|---|
$data

$unknown

## Results

$results

Losses are means over masked frames. Accuracy is the share of masked frames whose true code was told from its
distractors; by chance it is $chance. $codes $heard

$curves

## How to load it

```python
import torch
from transformers import AutoFeatureExtractor, AutoModel

source = $literal
extractor = AutoFeatureExtractor.from_pretrained(source)
model = AutoModel.from_pretrained(source).eval()

waveform = torch.randn(16_000).numpy()  # put your speech here: mono, 16 kHz
inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
with torch.no_grad():
    frames = model(**inputs).last_hidden_state  # (1, latent frames, width)
```

`Wav2Vec2ForPreTraining.from_pretrained(source)` has the quantizer and the projections too, to pretrain further.

To recognise speech, fine-tune it on transcribed audio with CTC:

```bash
python finetune_ctc.py --model_name_or_path $argument --train_data train.csv --validation_data dev.csv --output_dir asr
```

## Licence

$licence

## Limits

- It expects mono speech sampled at 16 kHz, and knows the kinds of speech in its training audio only.
- Bias in that audio, of voices, accents or topics, has neither been measured nor reduced.
- The figures above say how well the pretraining task is solved. What the encoder is worth for recognition or any
  other use was not measured here: fine-tune it and see.
""")


def write_model_card(
    output_dir: str | os.PathLike,
    *,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    """Write `README.md`: what was done and measured, and nothing that was not.

    Args:
        config: the resolved flags; the folder's `config.json` is consulted for the model's own values.
        summary: of `utterances`, `hours`, `validation_utterances`, `validation_hours` and `num_parameters`,
            whichever are known.
        metrics: records as in `metrics.jsonl`. The pictures that `draw_plots` left in the folder are embedded.
    """
    output_dir = Path(output_dir)
    config = publishable(config)
    trained = _last(metrics, "loss")
    given = {name: value for name, value in config.items() if value is not None}
    facts = {**model_config(output_dir), **given, **summary, "updates_done": trained.get("step", 0)}
    facts["device_hours"] = in_hours(device_hours(metrics))
    heard = max((record.get("audio_hours") or 0 for record in metrics), default=0)
    source = printable(config.get("hub_model_id") or output_dir.resolve().name)
    pictures = [name for name in PICTURES if (output_dir / "plots" / f"{name}.png").exists()]
    text = _CARD.substitute(
        title=source.split("/")[-1],
        recipe=table(fill(_RECIPE, facts)),
        data=table(_data_rows(config, summary) + stated_rows(config)),
        unknown=UNKNOWN_TO_THE_PROGRAM,
        results=_results_table(trained, _last(metrics, "eval_")),
        chance=f"{chance_accuracy(output_dir):.4f}",
        codes="".join(text for _, text in fill([("", _CODES)], facts)),
        heard=f"Hours of audio heard in all, counting repetitions: {f'{heard:,.2f}' if heard else NOT_MEASURED}.",
        curves="\n\n".join(f"![{PICTURES[name][0]}](plots/{name}.png)" for name in pictures),
        licence=licence(config),
        literal=json.dumps(source, ensure_ascii=False),
        argument=shlex.quote(source),
    )
    data = ModelCardData(
        library_name="transformers",
        tags=["wav2vec2", "pretraining"],
        license=config.get("hub_license"),
        base_model=hub_id(config.get("model_name_or_path")),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(output_dir / "README.md")


def _last(metrics: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, Any]:
    """The newest record with a measure of that prefix; empty when there is none."""
    return next((record for record in reversed(metrics) if any(name.startswith(prefix) for name in record)), {})


def _data_rows(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        data_row(label, config.get(flag), summary.get(f"{prefix}utterances"), summary.get(f"{prefix}hours"))
        for label, flag, prefix in (("Training", "train_data", ""), ("Validation", "validation_data", "validation_"))
    ]


def _results_table(trained: Mapping[str, Any], validated: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        return NOT_MEASURED if value is None else f"{value:.4g}"

    def head(name: str, record: Mapping[str, Any]) -> str:
        return f"{name}, update {record['step']}" if record else name

    rows = [
        f"| {label} | {cell(trained.get(name))} | {cell(validated.get('eval_' + name))} |"
        for name, label in _MEASURES.items()
    ]
    return "\n".join([f"| | {head('Training', trained)} | {head('Validation', validated)} |", "|---|---|---|", *rows])
