"""The page of a pretraining: is it learning, what did it hear, how are the codes used, how fast was it."""

import re
from collections.abc import Mapping
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers import Wav2Vec2Config

from w2v2.hub.card import device_hours
from w2v2.plan.expectations import Reference, advise_stop, find_references, place_in_band
from w2v2.report.charts import Band, show
from w2v2.report.corpus import tell_audio
from w2v2.report.grids import draw_codebook
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import (
    BAD,
    CAREFUL,
    GOOD,
    Section,
    Summary,
    draw_measures,
    keep,
    percent,
    tell_environment,
    tell_events,
    tell_flags,
    tell_skipped,
)
from w2v2.train.collapse import TIMES_GUESS


def report_pretraining(run: RunFiles, defaults: Mapping[str, Any]) -> Summary:
    """Figures, verdict and sections of a pretraining; `defaults` are the flags' own values."""
    verdict, mood = judge(run)
    references, remarks = find_expectations(run, defaults)
    sections = [
        tell_learning(run, references),
        tell_codes(run),
        tell_schedule(run),
        tell_audio(run),
        tell_speed(run),
        tell_events(run),
        tell_skipped(run),
        tell_flags(run, defaults),
        tell_environment(run),
    ]
    return Summary("Pretraining", run.name, verdict, mood, list_figures(run), remarks, sections)


def find_expectations(run: RunFiles, defaults: Mapping[str, Any]) -> tuple[list[Reference], list[str]]:
    """The curves that the run may be compared with, and sentences on where it stands and what more hours are worth."""
    if not (run.config.get("batch_hours") and run.model and run.trained):
        return [], []
    flags, model = SimpleNamespace(**{**defaults, **run.config}), Wav2Vec2Config.from_dict(run.model)
    known = [{key: value for key, value in record.items() if value is not None} for record in run.metrics]
    references = find_references(model, flags)
    placing = place_in_band(known, references)
    sentences = [*([placing.text] if placing else []), *advise_stop(known, flags, model)]
    return references, [f"{text[0].upper()}{text[1:]}.".replace(" %", "\u00a0%") for text in sentences]


def draw_band(run: RunFiles, references: list[Reference], measure: str) -> Band | None:
    """The band of the nearest reference that has this measure within the hours heard."""
    heard = max((record.get("audio_hours") or 0 for record in run.metrics), default=0)
    for reference in references:
        if (rows := reference.points.get(measure)) is not None and rows[0][0] < heard:
            return Band(f"{reference.name}, held out", [(hours, low, high) for hours, low, _, high in rows.tolist()])
    return None


def judge(run: RunFiles) -> tuple[str, str]:
    """One verdict on how far the run came and whether it learns, and its colour."""
    if not run.trained:
        return "No update was logged yet: the folder holds a plan alone.", CAREFUL
    begins = [n for n, event in enumerate(run.events) if event.get("event") in ("start", "resume")]
    events = {event.get("event"): event for event in run.events[begins[-1] :]} if begins else {}
    end = events.get("finish") or events.get("stop") or run.trained[-1]  # records are only of every so many updates
    done, planned = end["step"], run.config.get("max_steps")
    how_far = f"All {done:,} updates are done" if done == planned else f"{done:,} of {show(planned)} updates are done"
    if "collapse" in events and "finish" not in events:
        return f"{how_far}. The run collapsed: {events['collapse'].get('message', 'see the events')}", BAD
    if "collapse" in events:
        how_far += f"; a collapse was seen at update {show(events['collapse'].get('step'))}"
    if "stop" in events:
        how_far += f"; the run stopped: {events['stop'].get('message', '').rstrip('.')}"
    where, record = ("held-out", run.validated[-1]) if run.validated else ("training", run.trained[-1])
    prefix = "eval_" if run.validated else ""
    accuracy, guess = record.get(f"{prefix}accuracy"), record.get(f"{prefix}constant_guess_accuracy")
    if accuracy is None:
        return f"{how_far}, and the last record of {where} speech has no finite figures.", BAD
    found = f"{how_far}. On {where} speech the model tells the right code from the distractors in {percent(accuracy)} of the masked frames"
    if guess is None:
        return f"{found}; the constant guess was not measured.", CAREFUL
    if accuracy < TIMES_GUESS * guess:
        return f"{found}, no better than the constant guess with {percent(guess)}: nothing is learned.", BAD
    return f"{found}, the constant guess in {percent(guess)}.", CAREFUL if "collapse" in events else GOOD


def list_figures(run: RunFiles, is_held_out: bool = True) -> list[tuple[str, str, str]]:
    """The headline: label, value, remark; of the last validation, where there is one and it `is_held_out`."""
    figures = []
    heard = max((record.get("audio_hours") or 0 for record in run.metrics), default=None)
    trained, validated = (records[-1] if records else {} for records in (run.trained, run.validated))
    epochs = f"{trained['epoch']:,.1f} epochs" if trained.get("epoch") is not None else ""
    figures.append(("Hours heard", show(heard), epochs))
    where, record, prefix = ("held out", validated, "eval_") if validated and is_held_out else ("training", trained, "")
    loss = record.get(f"{prefix}contrastive_loss", record.get(f"{prefix}loss"))
    figures.append(("Contrastive loss", show(loss), where))
    guess = record.get(f"{prefix}constant_guess_accuracy")
    remark = f"{where}; constant guess {percent(guess)}" if guess is not None else where
    figures.append(("Accuracy", percent(record.get(f"{prefix}accuracy")), remark))
    model = run.model and Wav2Vec2Config.from_dict(run.model)  # the file leaves the library's defaults out
    of = f"of {model.num_codevector_groups * model.num_codevectors_per_group} entries, {where}" if model else where
    figures.append(("Codebook perplexity", show(record.get(f"{prefix}codebook_perplexity")), of))
    hours = device_hours(run.trained)
    times = [time for event in run.events if (time := parse_time(event.get("time")))]
    span = f"{(times[-1] - times[0]).total_seconds() / 3600:.3g} h from start to end" if len(times) > 1 else ""
    span += ", with its pauses" if span and any(event.get("event") == "resume" for event in run.events) else ""
    figures.append(("Device-hours", show(hours), span))
    return figures


def parse_time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def tell_learning(run: RunFiles, references: list[Reference]) -> Section:
    """Loss, accuracy and perplexity, against hours heard."""
    section = Section("Learning")
    prefixes = {"": "training", "eval_": "held out"}
    loss = {f"{prefix}contrastive_loss": name for prefix, name in prefixes.items()}
    accuracy = {f"{prefix}accuracy": name for prefix, name in prefixes.items()}
    guess = {f"{prefix}constant_guess_accuracy": f"{name}, constant guess" for prefix, name in prefixes.items()}
    soft, hard = "codebook_perplexity", "codebook_perplexity_hard"
    perplexity = {
        soft: "training, soft",
        hard: "training, hard",
        f"eval_{soft}": "held out, soft",
        f"eval_{hard}": "held out, hard",
    }
    accuracies, perplexities = (draw_band(run, references, f"eval_{measure}") for measure in ("accuracy", hard))
    section.charts = keep(
        draw_measures(run, "Contrastive loss", loss, subtitle="nats a masked frame"),
        draw_measures(run, "Accuracy", accuracy | guess, subtitle="share of masked frames", band=accuracies),
        draw_measures(
            run, "Codebook perplexity", perplexity, subtitle="entries in use, over all groups", band=perplexities
        ),
    )
    if not run.trained:
        section.notes.append("There is no record of training.")
    elif not run.validated:
        section.notes.append("No validation was run: these curves are of training alone.")
    return section


def tell_codes(run: RunFiles) -> Section:
    """Whether the codebooks are used, and how evenly."""
    section = Section("Codebooks")
    found = {key for record in run.metrics for key in record}
    by_group = {
        measure: {
            key: _name_group(key) for key in sorted(found) if re.fullmatch(rf"(eval_)?codebook_{measure}_\d+", key)
        }
        for measure in ("coverage", "entropy")
    }
    section.charts = keep(
        draw_measures(run, "Coverage", by_group["coverage"], subtitle="share of the entries that are in use"),
        draw_measures(run, "Entropy of the codes", by_group["entropy"], subtitle="nats, of hard codes"),
        draw_measures(run, "Entropy of one frame's code", {"code_entropy": "training", "eval_code_entropy": "held out"}, subtitle="nats"),
        draw_measures(
            run, "Distractors that count", {"distractors_left": "training", "eval_distractors_left": "held out"},
            subtitle="of other codes than the positive, a frame",
        ),
    )  # fmt: skip
    groups = max((len(record["counts"]) for record in run.codebook_use), default=0)
    section.charts += keep(*(draw_codebook(run.codebook_use, group) for group in range(groups)))
    if not any(by_group.values()):
        section.notes.append("Coverage and entropy of each codebook were not logged.")
    if not run.codebook_use:
        section.notes.append("Counts of each entry were not kept (no codebook_use.jsonl).")
    return section


def _name_group(key: str) -> str:
    where = "held out" if key.startswith("eval_") else "training"
    return f"codebook {key.rpartition('_')[2]}, {where}"


def tell_schedule(run: RunFiles) -> Section:
    """What the optimizer was given, and the gradient that it saw."""
    charts = keep(
        draw_measures(run, "Learning rate", {"learning_rate": "learning rate"}, subtitle="of the update"),
        draw_measures(run, "Gumbel temperature", {"gumbel_temperature": "temperature"}, subtitle="of the codes' draw"),
        draw_measures(run, "Gradient norm", {"grad_norm": "norm"}, subtitle="before clipping"),
        draw_measures(run, "Diversity loss", {"diversity_loss": "training", "eval_diversity_loss": "held out"}, subtitle="1 − perplexity / entries"),
        draw_measures(run, "Feature penalty", {"feature_penalty": "training", "eval_feature_penalty": "held out"}, subtitle="mean square of the convs' output"),
    )  # fmt: skip
    notes = [] if charts else ["Learning rate and gradient were not logged."]
    skipped = run.trained[-1].get("skipped_updates") if run.trained else None
    notes += [f"{skipped:,} updates were skipped: their loss or gradient was not finite."] if skipped else []
    return Section("Schedule and gradient", charts, notes=notes)


def tell_speed(run: RunFiles) -> Section:
    """Throughput and waiting."""
    section = Section("Speed")
    section.charts = keep(
        draw_measures(run, "Throughput", {"audio_seconds_per_second": "all devices"}, subtitle="times real time"),
        draw_measures(run, "Waiting for data", {"data_wait_fraction": "waiting"}, subtitle="share of the time"),
        draw_measures(run, "Skipped audio", {"skipped_audio": "files"}, subtitle="unreadable files so far")
        if any(record.get("skipped_audio") for record in run.trained) else None,
    )  # fmt: skip
    if not section.charts:
        section.notes.append("Throughput was not logged.")
    return section
