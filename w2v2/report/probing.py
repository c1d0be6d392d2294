"""The page of a probe: what each layer of which model knows, and how well it tells speakers apart."""

from collections.abc import Sequence
from itertools import pairwise

from w2v2.report.charts import Chart, Series, draw_lines, show
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import SHOWN, Section, Summary, Table, percent, tell_folder

LOWER_IS_BETTER = {"cer", "wer", "per"}


def report_probe(run: RunFiles) -> Summary:
    """Figures, verdict and sections of a probe.json."""
    measure, models, chance = run.probe["measure"], run.probe["models"], run.probe.get("chance")
    name, target = SHOWN.get(measure, measure), run.probe.get("run", {}).get("target", "the target")
    best = (min if measure in LOWER_IS_BETTER else max)(models, key=lambda model: model[measure])
    random = next((model for model in models if model["source"] is None), None)
    verdict = f"{best['name']} does best on {target}: {name} {percent(best[measure])} at layer {best['best_layer']}"
    if random and random is not best:
        verdict += f", random weights {percent(random[measure])}"
    verdict += f", chance {percent(chance)}." if chance is not None else "."
    if best is random and len(models) > 1:
        verdict += " What was learned does not show in this probe."
    figures = []
    for model in models[:6]:
        heard = f", {show(model['hours'])} h heard" if model.get("hours") is not None else ""
        figures.append((model["name"], percent(model[measure]), f"{name}, layer {model['best_layer']}{heard}"))
    heard = sorted((model["hours"], model[measure]) for model in models if model.get("hours") is not None)
    sections = [tell_layers(run)]
    if len(heard) > 1:
        lines = [Series("pretrained", heard)]
        chart = draw_lines(f"{name} of the best layer", lines, "hours of audio heard", subtitle="test, as a fraction")
        sections.append(Section("Scores by hours heard", [chart]))
    sections += [tell_facts(run), *tell_folder(run, {})]
    mood = "bad" if best is random else "good"
    return Summary(f"Probe of {target}", run.name, verdict, mood, figures, sections=sections)


def report_verification(run: RunFiles) -> Summary:
    """Figures, verdict and sections of a verification.json: how far one speaker's pairs lie from two speakers'."""
    found = {name: scores for name, scores in run.probe.items() if name != "run"}
    best = min(found, key=lambda name: found[name]["eer"])
    eer, series = found[best]["eer"], []
    histogram = found[best].get("histogram") or {"edges": [], "counts": {}}  # of an earlier version
    middles = [sum(pair) / 2 for pair in pairwise(histogram["edges"])]
    for kind, counts in histogram["counts"].items():
        series.append(Series(kind, [(x, count / sum(counts)) for x, count in zip(middles, counts, strict=True)]))
    chart = draw_lines(f"Scores by {best}", series, "cosine", subtitle="share of the pairs of one speaker, and of two")
    rows = [(name, percent(scores["eer"]), show(scores["min_dcf"])) for name, scores in found.items()]
    figures = [(name, value, f"equal error rate, minDCF {cost}") for name, value, cost in rows[:6]]
    table = Table("Error rates", ["Embedding", "EER", "minDCF"], rows)
    sections = [Section("Scores", [chart], [table]), tell_facts(run), *tell_folder(run, {})]
    verdict = f"The equal error rate by {best} is {percent(eer)}; a guess has 50 %."
    mood = "good" if eer < 0.45 else "bad"
    return Summary("Verification of speakers", run.name, verdict, mood, figures, sections=sections)


def draw_layers(runs: Sequence[RunFiles]) -> Chart | None:
    """The layers of all runs' models, and chance; None where they were not measured alike."""
    if len({run.probe["measure"] for run in runs}) > 1:
        return None
    measure, chance, series = runs[0].probe["measure"], runs[0].probe.get("chance"), []
    for run in runs:
        for model in run.probe["models"]:
            name = model["name"] if len(runs) == 1 else f"{run.name}: {model['name']}"
            series.append(Series(name, [(layer["layer"], layer[measure]) for layer in model["layers"]]))
    if chance is not None:
        layers = sorted({x for one in series for x, _ in one.points})
        series.append(Series("chance", [(layer, chance) for layer in layers], 5, is_dashed=True))
    return draw_lines(f"{SHOWN.get(measure, measure)} by layer", series, "layer", subtitle="test, as a fraction")


def tell_layers(run: RunFiles) -> Section:
    """Scores by layer, as lines and as a table; the layer that validated best is starred."""
    measure, models = run.probe["measure"], run.probe["models"]
    layers, rows = sorted({layer["layer"] for model in models for layer in model["layers"]}), []
    for model in models:
        found = {layer["layer"]: layer[measure] for layer in model["layers"]}
        stars = {model["best_layer"]: " *"}
        rows.append((model["name"], *(percent(found.get(layer)) + stars.get(layer, "") for layer in layers)))
    caption = f"{SHOWN.get(measure, measure)}, test; * the layer that validated best"
    table = Table(caption, ["Model", *(f"layer {layer}" for layer in layers)], rows)
    return Section("Scores by layer", [draw_layers([run])], [table])


def tell_facts(run: RunFiles) -> Section:
    facts = {name.replace("_", " "): value for name, value in run.probe.get("run", {}).items()}
    dropped = facts.pop("dropped", None) or {}
    facts |= {f"dropped {reason}": number for reason, number in dropped.items()}
    facts |= {f"weights of {model['name']}": model["source"] for model in run.probe.get("models", [])}
    rows = [(name, show(value)) for name, value in facts.items() if value is not None]
    return Section("How it was probed", tables=[Table("The probe", ["What", "Value"], rows)], is_folded=True)
