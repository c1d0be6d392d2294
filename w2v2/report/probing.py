"""The page of a probe: what each layer of which model knows."""

from w2v2.report.charts import Series, draw_lines, show
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import BAD, GOOD, SHOWN, Section, Summary, Table, keep, percent, tell_environment, tell_events

LOWER_IS_BETTER = {"cer", "wer", "per"}


def report_probe(run: RunFiles) -> Summary:
    """Figures, verdict and sections of a probe.json."""
    measure, models, facts = run.probe["measure"], run.probe["models"], run.probe.get("run", {})
    choose = min if measure in LOWER_IS_BETTER else max
    best = choose(models, key=lambda model: model[measure])
    chance, random = run.probe.get("chance"), next((model for model in models if model["source"] is None), None)
    target = facts.get("target", "the target")
    name = SHOWN.get(measure, measure)
    verdict = f"{best['name']} does best on {target}: {name} {percent(best[measure])} at layer {best['best_layer']}"
    if random and random is not best:
        verdict += f", random weights {percent(random[measure])}"
    verdict += f", chance {percent(chance)}." if chance is not None else "."
    if best is random and len(models) > 1:
        verdict += " What was learned does not show in this probe."
    figures = [(model["name"], percent(model[measure]), _remark(model, measure)) for model in models[:6]]
    mood = BAD if best is random else GOOD
    sections = [tell_layers(run), *([tell_hours(run)] if _heard(run) else []), tell_facts(run), tell_events(run)]
    return Summary(f"Probe of {target}", run.name, verdict, mood, figures, sections=[*sections, tell_environment(run)])


def _remark(model: dict, measure: str) -> str:
    heard = f", {show(model['hours'])} h heard" if model.get("hours") is not None else ""
    return f"{SHOWN.get(measure, measure)}, layer {model['best_layer']}{heard}"


def _heard(run: RunFiles) -> list[tuple[float, float]]:
    measure = run.probe["measure"]
    found = [(model["hours"], model[measure]) for model in run.probe["models"] if model.get("hours") is not None]
    return sorted(found) if len(found) > 1 else []


def tell_layers(run: RunFiles) -> Section:
    """Scores by layer, as lines and as a table; the layer that validated best is starred."""
    measure, models, chance = run.probe["measure"], run.probe["models"], run.probe.get("chance")
    series = [
        Series(model["name"], [(layer["layer"], layer[measure]) for layer in model["layers"]]) for model in models
    ]
    layers = sorted({layer["layer"] for model in models for layer in model["layers"]})
    if chance is not None:
        series.append(Series("chance", [(layer, chance) for layer in layers], 5, is_dashed=True))
    section = Section("Scores by layer")
    section.charts = keep(
        draw_lines(f"{SHOWN.get(measure, measure)} by layer", series, "layer", subtitle="test, as a fraction")
    )
    rows = []
    for model in models:
        found = {layer["layer"]: layer[measure] for layer in model["layers"]}
        stars = {layer: " *" if layer == model["best_layer"] else "" for layer in layers}
        rows.append((model["name"], *(percent(found.get(layer)) + stars[layer] for layer in layers)))
    caption = f"{SHOWN.get(measure, measure)}, test; * the layer that validated best"
    section.tables.append(Table(caption, ["Model", *(f"layer {layer}" for layer in layers)], rows))
    return section


def tell_hours(run: RunFiles) -> Section:
    """The best layers' scores over the hours that their models had heard."""
    measure = run.probe["measure"]
    chart = draw_lines(f"{SHOWN.get(measure, measure)} of the best layer", [Series("pretrained", _heard(run))], "hours of audio heard",
                       subtitle="test, as a fraction")  # fmt: skip
    return Section("Scores by hours heard", keep(chart))


def tell_facts(run: RunFiles) -> Section:
    rows = [
        (name.replace("_", " "), show(value)) for name, value in run.probe.get("run", {}).items() if value is not None
    ]
    rows += [(f"weights of {model['name']}", model["source"]) for model in run.probe["models"] if model["source"]]
    return Section("How it was probed", tables=[Table("The probe", ["What", "Value"], rows)], is_folded=True)
