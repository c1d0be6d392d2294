"""The page of a fine-tuning: scores by set, curves, and what the model gets wrong."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from w2v2.evaluate.scores import MEASURES as LABEL_MEASURES
from w2v2.report.charts import show
from w2v2.report.grids import draw_confusion
from w2v2.report.playback import embed_audio
from w2v2.report.run_files import RECOGNITION, RunFiles
from w2v2.report.sections import (
    NORM,
    RATE,
    SHOWN,
    UPDATES,
    Measure,
    Section,
    Summary,
    Table,
    Utterance,
    draw_measure,
    percent,
    tell_folder,
)
from w2v2.report.transcripts import MOST_CONFUSED, MOST_WORST, tell_commonest, tell_errors, tell_worst

NOT_SETS = {"run", "mean", "std", "folds"}
MAIN = ("lm_wer", "lm_per", "wer", "per", "uar", "accuracy", "cer")  # what a set is judged by: the first that it has
HOPELESS = 0.95  # word error rate from which next to nothing is recognised
RATES = {"wer": "WER", "cer": "CER", "per": "PER", "empty_fraction": "empty transcripts"}
MEASURES = [
    Measure("Error rates", "as fractions", RATES),
    Measure(
        "Scores", "as fractions; UAR: mean recall of the classes", {key: SHOWN[key] for key in LABEL_MEASURES[::-1]}
    ),
    Measure("Loss", "of an update", {"loss": ""}),
    RATE,
    NORM,
]


def report_finetuning(run: RunFiles, num_audio: int = 0) -> Summary:
    """Figures, verdict and sections of a recogniser or a classifier, with the audio of its worst utterances."""
    sets = scored_sets(run)
    verdict, mood = judge(run, sets)
    curves = Section("Curves", (draw_measure(run.metrics, measure, UPDATES) for measure in MEASURES))
    curves.notes += [] if run.validated else ["No validation was run."]
    if run.kind == RECOGNITION:
        kind, told = "Fine-tuning for speech recognition", [tell_errors(sets), tell_commonest(run)]
        told.append(tell_worst(run, num_audio))
    else:
        kind, told = "Fine-tuning for classification", [tell_confusions(run), tell_mistakes(run, num_audio)]
    sections = [tell_scores(run, sets), curves, *told, *tell_folder(run, {})]
    return Summary(kind, run.name, verdict, mood, list_figures(run, sets), sections=sections)


def scored_sets(run: RunFiles) -> dict[str, dict[str, Any]]:
    """Name → scores, with a language model's as `lm_wer`, tests last; what was only transcribed or labelled has none."""
    sets = {name: found for name, found in run.results.items() if name not in NOT_SETS and isinstance(found, dict)}
    flat = {
        name: found | {f"lm_{key}": value for key, value in (found.get("lm") or {}).items()}
        for name, found in sets.items()
    }
    return {name: found for name, found in flat.items() if SHOWN.keys() & found.keys()}


def main_measure(scores: Mapping[str, Any]) -> str:
    return next(key for key in MAIN if key in scores)


def judge(run: RunFiles, sets: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    if not sets:
        done = f" {run.metrics[-1]['step']:,} updates are logged." if run.metrics else ""
        return f"There are no scores yet (no results.json with scores).{done}", "careful"
    name, scores = list(sets.items())[-1]
    measure, facts = main_measure(scores), run.results.get("run", {})
    value, classes = scores[measure], len(facts.get("labels") or [])
    text = f"{SHOWN[measure]} is {percent(value)} on {name}"
    if facts.get("best_update"):
        text += f", with the weights of update {facts['best_update']:,} of {facts['updates']:,}"
    if measure.endswith(("wer", "per", "cer")) and value >= HOPELESS:
        return f"{text}. Next to nothing is recognised.", "bad"
    if measure == "uar" and classes:
        mood = "good" if value > 1.1 / classes else "bad"
        return f"{text}. A constant answer earns {percent(1 / classes)}.", mood
    return f"{text}.", "plain"


def list_figures(run: RunFiles, sets: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    figures, facts = [], run.results.get("run", {})
    for name, scores in list(sets.items())[-4:]:
        main = main_measure(scores)
        others = [f"{SHOWN[key]} {percent(scores[key])}" for key in SHOWN if key in scores and key != main]
        others += [f"{scores['utterances']:,} utterances"] if "utterances" in scores else []
        figures.append((f"{SHOWN[main]}, {name}", percent(scores[main]), ", ".join(others)))
    if facts.get("train_hours") is not None:
        size = f"{facts.get('train_utterances', 0):,} utterances"
        figures.append(("Labelled hours", show(facts["train_hours"]), size))
    return figures or [("Updates", show(run.metrics[-1]["step"] if run.metrics else 0), "logged so far")]


def list_scores(run: RunFiles) -> list[tuple[str, str]]:
    """(`WER, test`, its value) for every measure of every set."""
    sets = scored_sets(run)
    return [(f"{SHOWN[key]}, {name}", percent(sets[name][key])) for name in sets for key in SHOWN if key in sets[name]]


def tell_scores(run: RunFiles, sets: Mapping[str, Mapping[str, Any]]) -> Section:
    """Every measure of every set, and of every fold."""
    section, keys = Section("Scores"), [key for key in SHOWN if any(key in scores for scores in sets.values())]
    if not sets:
        section.notes.append("The run has not ended, or its sets had no references: results.json has no scores.")
        return section
    rows = [
        (name, show(scores.get("utterances")), *(percent(scores.get(key)) for key in keys), show(scores.get("loss")))
        for name, scores in sets.items()
    ]
    head = ["Set", "Utterances", *(SHOWN[key] for key in keys), "Loss"]
    section.tables.append(Table("Scores by set", head, rows))
    if folds := run.results.get("folds"):
        found = [(fold.get("fold", ""), fold) for fold in folds]
        found += [("mean of the folds", run.results.get("mean", {}))]
        found += [("standard deviation", run.results.get("std", {}))]
        rows = [(name, *(percent(scores.get(key)) for key in LABEL_MEASURES)) for name, scores in found]
        section.tables.append(Table("Scores by fold", ["Fold", *(SHOWN[key] for key in LABEL_MEASURES)], rows))
    return section


def labelled_lines(run: RunFiles) -> list[dict[str, Any]]:
    return [line for line in run.predictions if line.get("reference") and "prediction" in line]


def tell_confusions(run: RunFiles) -> Section:
    """A confusion matrix of each set, or a table of the commonest confusions where there are many classes."""
    from sklearn.metrics import confusion_matrix  # slow to import

    section, lines = Section("Confusions"), labelled_lines(run)
    for name in dict.fromkeys(line["set"] for line in lines):
        pairs = [(line["reference"], line["prediction"]) for line in lines if line["set"] == name]
        classes = run.results.get("run", {}).get("labels") or sorted({label for pair in pairs for label in pair})
        counts = confusion_matrix(*zip(*pairs, strict=True), labels=classes).tolist()
        if chart := draw_confusion(f"Confusions, {name}", counts, classes):
            section.charts.append(chart)
        else:
            counted = Counter(pair for pair in pairs if pair[0] != pair[1]).most_common(3 * MOST_CONFUSED)
            rows = [(*pair, count) for pair, count in counted]
            section.tables.append(Table(f"Most confused, {name}", ["True", "Predicted", "Utterances"], rows))
    section.notes += [] if lines else ["There are no predictions with labels (predictions.jsonl)."]
    return section


def tell_mistakes(run: RunFiles, num_audio: int) -> Section:
    """The mistakes that the model was surest of."""
    wrong = [line for line in labelled_lines(run) if line["reference"] != line["prediction"]]
    wrong.sort(key=lambda line: (-(line.get("probability") or 0), str(line["id"])))
    section = Section("Most confident mistakes")
    for line in wrong[: max(MOST_WORST, num_audio)]:
        score = f"{line['reference']} taken for {line['prediction']}, {percent(line.get('probability'))}"
        section.utterances.append(Utterance(str(line["set"]), str(line["id"]), score))
    section.notes += embed_audio(run, section.utterances[:num_audio])
    return section
