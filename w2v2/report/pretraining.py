"""The page of a pretraining: is it learning, what did it hear, how are the codes used, how fast was it."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers import Wav2Vec2Config

from w2v2.hub.card import device_hours
from w2v2.plan.description import describe
from w2v2.plan.expectations import Reference, advise_stop, find_references, place_in_band
from w2v2.report.charts import Band, Chart, Series, draw_lines, show
from w2v2.report.grids import draw_bars, draw_codebook
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import NORM, RATE, Measure, Section, Summary, Table, draw_measure, percent, tell_folder
from w2v2.train.collapse import TIMES_GUESS

HARD = "codebook_perplexity_hard"
LOSS = Measure("Contrastive loss", "nats a masked frame", {"contrastive_loss": ""})
ACCURACY = Measure(
    "Accuracy",
    "masked frames whose code is told from all distractors; the constant guess always names an utterance's commonest codes",
    {"accuracy": "", "constant_guess_accuracy": "constant guess"},
)
PERPLEXITY = Measure(
    "Codebook perplexity",
    "entries in use, over all codebooks; soft: by mean probabilities, hard: by each frame's likeliest entry",
    {"codebook_perplexity": "soft", HARD: "hard"},
)
CODES = [
    Measure("Entropy of one frame's code", "nats; at 0 every choice is certain", {"code_entropy": ""}),
    Measure("Distractors that count", "a masked frame; those of its own code do not", {"distractors_left": ""}),
]
SCHEDULE = [
    RATE,
    Measure("Gumbel temperature", "how random the choice of entries is", {"gumbel_temperature": ""}),
    NORM,
    Measure("Diversity loss", "1 − perplexity / entries; 0 where all are used alike", {"diversity_loss": ""}),
    Measure("Feature penalty", "mean square of the conv layers' output", {"feature_penalty": ""}),
]
SPEED = [
    Measure("Throughput", "times real time, all devices", {"audio_seconds_per_second": ""}),
    Measure("Waiting for data", "share of the time", {"data_wait_fraction": ""}),
]

FRAMES_PER_HOUR = 50 * 3600  # latent frames
MOST_SOURCES = 30
AUDIO = [
    Measure("Masked", "share of the latent frames", {"masked_share": ""}),
    Measure(
        "Cropped and padded",
        "share of the audio cropped away; share of the micro-batches that is no speech",
        {"cropped_fraction": "cropped", "padded_fraction": "padding"},
    ),
    Measure("Effective batch", "hours of speech an update, after cropping", {"batch_hours": ""}),
]


def report_pretraining(run: RunFiles, defaults: Mapping[str, Any]) -> Summary:
    """Figures, verdict and sections of a pretraining; `defaults` are the flags' own values."""
    verdict, mood = judge(run)
    references, remarks = find_expectations(run, defaults)
    sections = [
        tell_learning(run, references),
        tell_codes(run),
        tell_measures(run, "Schedule and gradient", SCHEDULE),
        tell_audio(run),
        tell_measures(run, "Speed", SPEED),
        *tell_folder(run, defaults),
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
    sentences = [*(placing or [])[1:], *advise_stop(known, flags, model)]
    return references, [f"{text[0].upper()}{text[1:]}.".replace(" %", "\u00a0%") for text in sentences]


def judge(run: RunFiles) -> tuple[str, str]:
    """One verdict on how far the run came and whether it learns, and its colour."""
    if not run.trained:
        return "No update was logged yet: the folder holds a plan alone.", "careful"
    begins = [n for n, event in enumerate(run.events) if event.get("event") in ("start", "resume")]
    events = {event.get("event"): event for event in run.events[begins[-1] :]} if begins else {}
    end = events.get("finish") or events.get("stop") or run.trained[-1]  # records are only of every so many updates
    done, planned = end["step"], run.config.get("max_steps")
    how_far = f"All {done:,} updates are done" if done == planned else f"{done:,} of {show(planned)} updates are done"
    if "collapse" in events and "finish" not in events:
        return f"{how_far}. The run collapsed: {events['collapse'].get('message', 'see the events')}", "bad"
    if "collapse" in events:
        how_far += f"; a collapse was seen at update {show(events['collapse'].get('step'))}"
    if "stop" in events:
        how_far += f"; the run stopped: {events['stop'].get('message', '').rstrip('.')}"
    where, last = newest(run)
    if last.get("accuracy") is None:
        return f"{how_far}, and the last record of {where} has no finite figures.", "bad"
    accuracy, guess = last["accuracy"], last.get("constant_guess_accuracy")
    found = f"{how_far}. In {where} the model tells the right code from the distractors in {percent(accuracy)} of the masked frames"
    if guess is None:
        return f"{found}; the constant guess was not measured.", "careful"
    if accuracy < TIMES_GUESS * guess:
        return f"{found}, no better than the constant guess with {percent(guess)}: nothing is learned.", "bad"
    return f"{found}, the constant guess in {percent(guess)}.", "careful" if "collapse" in events else "good"


def newest(run: RunFiles, is_validation: bool = True) -> tuple[str, dict[str, Any]]:
    """The last validation (its keys without `eval_`), or the last record of training where there is none."""
    if run.validated and is_validation:
        return "validation", {key.removeprefix("eval_"): value for key, value in run.validated[-1].items()}
    return "training", run.trained[-1] if run.trained else {}


def list_figures(run: RunFiles, is_validation: bool = True) -> list[tuple[str, str, str]]:
    """The headline: label, value, remark; of the last validation, where there is one and it `is_validation`."""
    heard = max((record.get("audio_hours") or 0 for record in run.metrics), default=None)
    epoch = run.trained[-1].get("epoch") if run.trained else None
    where, last = newest(run, is_validation)
    model = run.model and Wav2Vec2Config.from_dict(run.model)  # the file leaves the library's defaults out
    of = f"of {model.num_codevector_groups * model.num_codevectors_per_group} entries, {where}" if model else where
    times = [datetime.fromisoformat(event["time"]) for event in run.events if event.get("time")]
    span = f"{(times[-1] - times[0]).total_seconds() / 3600:.3g} h from start to end" if len(times) > 1 else ""
    span += ", with its pauses" if span and any(event.get("event") == "resume" for event in run.events) else ""
    return [
        ("Hours heard", show(heard), f"{epoch:,.1f} epochs" if epoch is not None else ""),
        ("Contrastive loss", show(last.get("contrastive_loss", last.get("loss"))), where),
        ("Accuracy", percent(last.get("accuracy")), where),
        ("Constant guess", percent(last.get("constant_guess_accuracy")), f"always the commonest codes, {where}"),
        ("Codebook perplexity", show(last.get("codebook_perplexity")), of),
        ("Device-hours", show(device_hours(run.trained)), span),
    ]


def tell_learning(run: RunFiles, references: list[Reference]) -> Section:
    """Loss, accuracy and perplexity, with the band of other runs."""
    section = tell_measures(run, "Learning", [LOSS])
    heard = max((record.get("audio_hours") or 0 for record in run.metrics), default=0)
    for measure, key in ((ACCURACY, "eval_accuracy"), (PERPLEXITY, f"eval_{HARD}")):
        bands = (
            Band(f"{reference.name}, validation", [(x, low, high) for x, low, _, high in points.tolist()])
            for reference in references
            if (points := reference.points.get(key)) is not None and points[0][0] < heard
        )
        chart = draw_measure(run.metrics, measure, band=next(bands, None))
        section.charts += [chart] if chart else []
    if run.trained and not run.validated:
        section.notes.append("No validation was run: these curves are of training alone.")
    return section


def tell_codes(run: RunFiles) -> Section:
    """Whether the codebooks are used, and how evenly."""
    groups = max((len(record["counts"]) for record in run.codebook_use), default=2)
    each = [("Coverage", "share of the entries that are some frame's likeliest", "codebook_coverage_{}")]
    each += [("Entropy of the codes", "nats, of each frame's likeliest entry", "codebook_entropy_{}")]
    by_group = [
        Measure(title, subtitle, {key.format(n): f"codebook {n}" for n in range(1, groups + 1)})
        for title, subtitle, key in each
    ]
    section = tell_measures(run, "Codebooks", [*by_group, *CODES])
    maps = [draw_codebook(run.codebook_use, group) for group in range(groups)]
    section.charts += [chart for chart in maps if chart]
    if not run.codebook_use:
        section.notes.append("Counts of each entry were not kept (no codebook_use.jsonl).")
    return section


def tell_measures(run: RunFiles, title: str, measures: list[Measure]) -> Section:
    section = Section(title, (draw_measure(run.metrics, measure) for measure in measures))
    section.notes += [] if section.charts else ["Nothing of this was logged."]
    return section


def tell_audio(run: RunFiles) -> Section:
    """What there was to hear, and how much of it was cropped and masked."""
    sources = sorted(run.plan.get("sources", []), key=lambda source: -source["share"])[:MOST_SOURCES]
    items = [(source["name"], source["share"], percent(source["share"])) for source in sources]
    records = [
        record | {"masked_share": record["masked_frames"] / (record["batch_hours"] * FRAMES_PER_HOUR)}
        if record.get("masked_frames") and record.get("batch_hours")
        else record
        for record in run.trained
    ]
    measures = (draw_measure(records, measure) for measure in AUDIO)
    charts = [draw_lengths(run.plan.get("lengths")), draw_bars("Sources", items, "share of what is heard"), *measures]
    section = Section("Audio, crops and masks", charts)
    try:
        lines = describe({**run.plan, "warnings": []}).splitlines()
        rows = [(line[:14].strip(), line[14:]) for line in lines]
        section.tables.append(Table("What was planned", ["Part", "Plan"], rows))
    except KeyError:
        section.notes.append("There is no plan.json of this version: how much there was to hear is not known.")
    return section


def draw_lengths(lengths: Mapping[str, Sequence[float]] | None) -> Chart | None:
    """The histogram of plan.json as the outline of its columns."""
    if not lengths:
        return None
    edges, counts = lengths["seconds"], lengths["utterances"]
    steps = [(edge, count) for n, count in enumerate(counts) for edge in (edges[n], edges[n + 1])]
    outline = [(edges[0], 0), *steps, (edges[-1], 0)]
    return draw_lines("Lengths", [Series("utterances", outline)], "seconds", subtitle="utterances of training")
