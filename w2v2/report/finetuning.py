"""The page of a fine-tuning: scores by set, curves, and what the model gets wrong."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from w2v2.evaluate.scores import MEASURES, NAMES, confusion_counts
from w2v2.report.charts import show
from w2v2.report.grids import draw_confusion
from w2v2.report.playback import embed_audio
from w2v2.report.run_files import RECOGNITION, RunFiles
from w2v2.report.sections import (
    BAD,
    CAREFUL,
    GOOD,
    PLAIN,
    SHOWN,
    Section,
    Summary,
    Table,
    Utterance,
    draw_measures,
    keep,
    percent,
    tell_environment,
    tell_events,
    tell_flags,
    tell_skipped,
)
from w2v2.report.transcripts import MOST_CONFUSED, MOST_WORST, tell_commonest, tell_errors, tell_worst

NOT_SETS = {"run", "mean", "std", "folds"}
UPDATES = ("step", "updates")
HOPELESS = 0.95  # word error rate from which next to nothing is recognised


def report_finetuning(run: RunFiles, num_audio: int = 0) -> Summary:
    """Figures, verdict and sections of a recogniser or a classifier, with the audio of its worst utterances."""
    is_recogniser = run.kind == RECOGNITION
    verdict, mood = judge(run)
    told = (
        [tell_errors(scored_sets(run)), tell_commonest(run), tell_worst(run, num_audio)]
        if is_recogniser
        else [*tell_confusions(run, num_audio)]
    )
    sections = [tell_scores(run), tell_curves(run), *told, tell_events(run), tell_skipped(run), tell_flags(run, {})]
    kind = "Fine-tuning for speech recognition" if is_recogniser else "Fine-tuning for classification"
    return Summary(kind, run.name, verdict, mood, list_figures(run), sections=[*sections, tell_environment(run)])


def scored_sets(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Name → scores, tests last; what was only transcribed or labelled has none."""
    sets = {name: found for name, found in run.results.items() if name not in NOT_SETS and isinstance(found, dict)}
    return {name: found for name, found in sets.items() if SHOWN.keys() & found.keys()}


def main_measure(scores: Mapping[str, Any]) -> str:
    """What a set is judged by: the word error rate, with a language model where there is one, or the recall."""
    return next(
        name for name in ("lm_wer", "lm_per", "wer", "per", "uar", "accuracy", "cer") if name in flatten(scores)
    )


def flatten(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores with those of the language model beside them, as `lm_wer`."""
    return dict(scores) | {f"lm_{name}": value for name, value in (scores.get("lm") or {}).items()}


def name_measure(measure: str) -> str:
    return SHOWN[measure.removeprefix("lm_")] + (" with LM" if measure.startswith("lm_") else "")


def judge(run: RunFiles) -> tuple[str, str]:
    sets = scored_sets(run)
    if not sets:
        done = f" {run.metrics[-1]['step']:,} updates are logged." if run.metrics else ""
        return f"There are no scores yet (no results.json with scores).{done}", CAREFUL
    name, scores = list(sets.items())[-1]
    measure, value = main_measure(scores), flatten(scores)[main_measure(scores)]
    facts = run.results.get("run", {})
    best = (
        f", with the weights of update {facts['best_update']:,} of {facts['updates']:,}"
        if facts.get("best_update")
        else ""
    )
    text = f"{name_measure(measure)} is {percent(value)} on {name}{best}."
    if measure.endswith(("wer", "per", "cer")):
        if value >= HOPELESS:
            return f"{text} Next to nothing is recognised.", BAD
        return text, PLAIN
    classes = len(facts.get("labels") or [])
    if measure == "uar" and classes:
        is_better = value > 1.1 / classes
        return f"{text} A constant answer earns {percent(1 / classes)}.", GOOD if is_better else BAD
    return text, PLAIN


def list_figures(run: RunFiles) -> list[tuple[str, str, str]]:
    figures = []
    for name, scores in list(scored_sets(run).items())[-4:]:
        flat, measure = flatten(scores), main_measure(scores)
        others = [f"{name_measure(key)} {percent(flat[key])}" for key in SHOWN if key in flat and key != measure]
        size = f"{scores['utterances']:,} utterances" if "utterances" in scores else ""
        figures.append(
            (f"{name_measure(measure)}, {name}", percent(flat[measure]), ", ".join(filter(None, [*others, size])))
        )
    facts = run.results.get("run", {})
    if facts.get("train_hours") is not None:
        figures.append(
            ("Labelled hours", show(facts["train_hours"]), f"{facts.get('train_utterances', 0):,} utterances")
        )
    if not figures:
        figures.append(("Updates", show(run.metrics[-1]["step"] if run.metrics else 0), "logged so far"))
    return figures


def list_scores(run: RunFiles) -> dict[str, str]:
    """`WER, test` → its value, for every measure of every set."""
    sets = {name: flatten(scores) for name, scores in scored_sets(run).items()}
    keys = (*SHOWN, *(f"lm_{name}" for name in NAMES))
    return {
        f"{name_measure(key)}, {name}": percent(sets[name][key]) for name in sets for key in keys if key in sets[name]
    }


def tell_scores(run: RunFiles) -> Section:
    """Every measure of every set, and of every fold."""
    section = Section("Scores")
    sets = {name: flatten(scores) for name, scores in scored_sets(run).items()}
    keys = [
        key for key in (*SHOWN, *(f"lm_{name}" for name in NAMES)) if any(key in scores for scores in sets.values())
    ]
    if not sets:
        section.notes.append(
            "There is no results.json with scores: the run has not ended, or its sets had no references."
        )
        return section
    rows = [
        (name, show(scores.get("utterances")), *(percent(scores.get(key)) for key in keys), show(scores.get("loss")))
        for name, scores in sets.items()
    ]
    section.tables.append(Table("Scores by set", ["Set", "Utterances", *map(name_measure, keys), "Loss"], rows))
    if folds := run.results.get("folds"):
        rows = [(fold.get("fold", ""), *(percent(fold.get(key)) for key in MEASURES)) for fold in folds]
        for name, label in {"mean": "mean of the folds", "std": "standard deviation"}.items():
            rows.append((label, *(percent(run.results.get(name, {}).get(key)) for key in MEASURES)))
        section.tables.append(Table("Scores by fold", ["Fold", *(SHOWN[key] for key in MEASURES)], rows))
    return section


def tell_curves(run: RunFiles) -> Section:
    section = Section("Curves")
    rates = {f"eval_{key}": name for key, name in NAMES.items()} | {"eval_empty_fraction": "empty transcripts"}
    measures = {"eval_uar": "UAR", "eval_accuracy": "accuracy", "eval_macro_f1": "macro-F1"}
    section.charts = keep(
        draw_measures(run, "Error rates", rates, subtitle="of the validation set, as fractions", over=UPDATES),
        draw_measures(run, "Scores", measures, subtitle="of the validation set, as fractions", over=UPDATES),
        draw_measures(
            run, "Loss", {"loss": "training", "eval_loss": "held out"}, subtitle="of an update", over=UPDATES
        ),
        draw_measures(run, "Learning rate", {"learning_rate": "learning rate"}, subtitle="of the update", over=UPDATES),
        draw_measures(run, "Gradient norm", {"grad_norm": "norm"}, subtitle="before clipping", over=UPDATES),
    )
    if not run.metrics:
        section.notes.append("There is no metrics.jsonl: nothing was trained in this folder.")
    elif not run.validated:
        section.notes.append("No validation was run.")
    return section


def tell_confusions(run: RunFiles, num_audio: int) -> list[Section]:
    """Confusion matrices of all sets, and the mistakes that the model was surest of."""
    section, wrong = Section("Confusions"), Section("Surest mistakes")
    lines = [line for line in run.predictions if line.get("reference") and "prediction" in line]
    for name in dict.fromkeys(line["set"] for line in lines):
        pairs = [(line["reference"], line["prediction"]) for line in lines if line["set"] == name]
        classes = run.results.get("run", {}).get("labels") or sorted({label for pair in pairs for label in pair})
        if chart := draw_confusion(confusion_counts(*zip(*pairs, strict=True), classes), classes):
            chart.title = f"Confusions, {name}"
            section.charts.append(chart)
        else:
            counted = Counter(pair for pair in pairs if pair[0] != pair[1]).most_common(3 * MOST_CONFUSED)
            rows = [(true, predicted, count) for (true, predicted), count in counted]
            section.tables.append(Table(f"Most confused, {name}", ["True", "Predicted", "Utterances"], rows))
    if not lines:
        section.notes.append("There are no predictions with labels (predictions.jsonl).")
    mistakes = [line for line in lines if line["reference"] != line["prediction"]]
    wrong.utterances = list_mistakes(mistakes, max(MOST_WORST, num_audio))
    if not wrong.utterances:
        wrong.notes.append("There are none.")
    elif num_audio:
        wrong.notes += embed_audio(run, wrong.utterances[:num_audio])
    return [section, wrong]


def list_mistakes(lines: Sequence[Mapping[str, Any]], most: int) -> list[Utterance]:
    surest = sorted(lines, key=lambda line: (-(line.get("probability") or 0), str(line["id"])))[:most]
    return [
        Utterance(
            str(line["set"]),
            str(line["id"]),
            f"{line['reference']} taken for {line['prediction']}, {percent(line.get('probability'))}",
        )
        for line in surest
    ]
