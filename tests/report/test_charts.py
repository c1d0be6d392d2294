"""Charts: positions against closed forms and brute force, colours against what colour-blind readers see."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from w2v2.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Band, Series, draw_lines, find_ticks, show, thin
from w2v2.report.grids import LABELS, SIDE, USE_LEVELS, draw_bars, draw_codebook, draw_confusion
from w2v2.report.page import TEMPLATES
from w2v2.report.pretraining import draw_lengths

NAN = float("nan")


def find(chart, name, classes=""):
    """The elements of this name that have all these classes."""
    every = ElementTree.fromstring(chart.svg).iter(name)
    return [one for one in every if set(classes.split()) <= set(one.get("class", "").split())]


def texts(chart, name):
    return [one.text for one in find(chart, name)]


def lines_of(chart, classes="line"):
    """The pieces of each path of straight lines, as points."""
    paths = [one.get("d").rstrip("Z").split("M")[1:] for one in find(chart, "path", classes)]
    return [[[tuple(map(float, point.split())) for point in piece.split("L")] for piece in path] for path in paths]


def y_ticks(chart):
    """Label of the y axis → its position."""
    return {
        one.text: float(one.get("y")) - 3.5 for one in find(chart, "text", "tick") if one.get("text-anchor") == "end"
    }


def test_a_line_stands_where_its_values_say():
    chart = draw_lines("t", [Series("a", [(0, 0.0), (5, 10.0), (10, 5.0)])], "x")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    expected = [(LEFT, HEIGHT - BOTTOM), ((LEFT + WIDTH - RIGHT) / 2, TOP), (WIDTH - RIGHT, middle)]
    assert lines_of(chart) == [[expected]] and not chart.legend
    assert y_ticks(chart)["0"] == HEIGHT - BOTTOM and y_ticks(chart)["10"] == TOP


@pytest.mark.parametrize("scale", [1e-200, 1e-13, 1e-12, 1e30])
def test_a_lines_form_does_not_depend_on_its_scale(scale):
    charts = [draw_lines("t", [Series("a", [(0, 2 * s), (5, 4 * s), (10, 3 * s)])], "x") for s in (1, scale)]
    assert lines_of(charts[0]) == lines_of(charts[1]) and len(y_ticks(charts[1])) > 2


@pytest.mark.parametrize("gap", [NAN, float("inf"), None])
def test_values_that_are_not_finite_leave_gaps(gap):
    chart = draw_lines("t", [Series("a", [(1, 1.0), (2, 2.0), (3, gap), (4, 3.0)]), Series("b", [(1, gap)])], "x")
    assert [[len(piece) for piece in line] for line in lines_of(chart)] == [[2, 1]]
    assert "1 not finite" in texts(chart, "desc")[0] and any(
        f"a: {show(gap)}" in text for text in texts(chart, "title")
    )
    assert draw_lines("t", [Series("b", [(1, gap)]), Series("c", [])], "x") is None


def test_a_long_line_keeps_its_extremes_ends_and_gaps():
    random = np.random.default_rng(0)
    for size in (3, 240, 241, 10_000):
        values = random.standard_normal(size).tolist()
        if size > 3:
            values[size // 2] = NAN
        kept = thin(list(enumerate(values)))
        finite = [y for _, y in kept if math.isfinite(y)]
        assert len(kept) <= 244 and kept == sorted(kept, key=lambda point: point[0])
        assert kept[0][0] == 0 and kept[-1][0] == size - 1
        assert (min(finite), max(finite)) == (np.nanmin(values), np.nanmax(values))
        assert any(not math.isfinite(y) for _, y in kept) == (size > 3)


def test_ticks_are_few_and_round():
    random = np.random.default_rng(0)
    for low, width in zip(random.normal(0, 100, 300), 10 ** random.uniform(-6, 6, 300), strict=True):
        ticks, around = (find_ticks(low, low + width, is_around=wide) for wide in (False, True))
        step = around[1] - around[0]
        digits = f"{step:.6e}".split("e")[0].rstrip("0").rstrip(".")
        assert digits in ("1", "2", "5") and 2 <= len(ticks) <= 6
        assert all(low - step / 100 <= tick <= low + width + step / 100 for tick in ticks)
        assert around[0] <= low + step / 100 and around[-1] >= low + width - step / 100


def test_a_band_ends_where_the_lines_end():
    edges = [(0, 0.0, 1.0), (10, 10.0, 11.0), (20, 20.0, 21.0)]
    chart = draw_lines("t", [Series("a", [(0, 0.0), (5, 6.0)])], "x", band=Band("others", edges))
    (((first, second, *_),),), y = lines_of(chart, "band"), y_ticks(chart)
    assert chart.legend[-1] == ("band", "others") and second == (WIDTH - RIGHT, y["6"])
    assert first == (LEFT, pytest.approx(y["0"] + (y["6"] - y["0"]) / 6, abs=0.1))
    late = draw_lines("t", [Series("a", [(0, 0.0), (5, 6.0)])], "x", band=Band("late", [(9, 0, 1)]))
    assert not find(late, "path", "band")


def test_a_histogram_is_the_outline_of_its_columns():
    random = np.random.default_rng(0)
    counts, edges = np.histogram(random.uniform(5, 9, 500), 24)
    chart = draw_lengths({"seconds": edges.tolist(), "utterances": counts.tolist()})
    (((first, *corners, last),),), y = lines_of(chart), y_ticks(chart)
    area = sum((x1 - x0) * (first[1] - y0) for (x0, y0), (x1, y1) in pairwise(corners) if y0 == y1)
    scale = (y["0"] - y["20"]) / 20 * (WIDTH - LEFT - RIGHT) / 24
    assert first[1] == last[1] == y["0"] and area / scale == pytest.approx(500, rel=0.01)
    assert draw_lengths(None) is None


def test_each_strip_tells_the_last_values_of_all_lines():
    series = [Series("a", [(x, float(x)) for x in range(1_000)]), Series("b", [(999, 7.0)])]
    _, *hovers = texts(draw_lines("t", series, "hours"), "title")
    assert len(hovers) == 40 and hovers[-1] == "999 hours\na: 999\nb: 7"


@pytest.mark.parametrize("entries", [7, 64, 320])
def test_a_heat_map_colours_each_cell_by_its_use(entries):
    random = np.random.default_rng(0)
    counts = [random.multinomial(500, random.dirichlet([0.2] * entries)).tolist() for _ in range(5)]
    records = [{"audio_hours": n + 1, "counts": [[1], line]} for n, line in enumerate(counts)]
    chart = draw_codebook(records, 1)
    # Brute force: rows by the last record's counts, each with the mean of its entries' shares.
    order = sorted(range(entries), key=lambda entry: -counts[-1][entry])
    rows = np.array_split(order, min(64, entries))
    expected = np.zeros(6)
    for line in counts:
        for row in rows:
            share = np.mean([line[entry] / 500 * entries for entry in row])
            expected[0 if share == 0 else 1 + sum(share >= limit for limit in USE_LEVELS)] += 1
    cell = (WIDTH - LEFT - RIGHT) / 5 * (HEIGHT - TOP - BOTTOM) / len(rows)
    for level in range(6):
        (path,) = find(chart, "path", f"q{level}")
        corners = re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)", path.get("d"))
        area = sum((float(x1) - float(x0)) * (float(y1) - float(y0)) for x0, y0, x1, y1 in corners)
        assert area / cell == pytest.approx(expected[level], rel=0.01, abs=0.05)
    used = sum(count > 0 for count in counts[0])
    assert f"{used} of {entries} entries used" in texts(chart, "title")[1]
    assert draw_codebook(records, 2) is None and draw_codebook([], 0) is None


def test_a_confusion_matrix_has_a_cell_for_each_count():
    chart = draw_confusion("t", [[3, 1], [0, 4]], ["anger", "a very long name of a class"])
    _, *cells = find(chart, "rect")  # after the frame
    places = [(float(cell.get("x")) - LABELS, float(cell.get("y")) - 2) for cell in cells]
    assert places == [(0, 0), (SIDE / 2, 0), (SIDE / 2, SIDE / 2)]
    assert [one.text for one in find(chart, "text", "count")] == ["3", "1", "4"]
    assert "anger → a very long name of a class: 1 of 4 (25%)" in texts(chart, "title")
    assert [one.text for one in find(chart, "text", "tick")] == ["anger"] * 2 + ["a very long …"] * 2
    assert draw_confusion("t", [[0] * 41] * 41, [str(n) for n in range(41)]) is None


def test_bars_are_as_long_as_their_values():
    chart = draw_bars("t", [("a", 4, "4"), ("b", 1, "1"), ("c", 0, "0")])
    widths = [float(bar.get("width")) for bar in find(chart, "rect", "bar")]
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.5) and widths[2] == 0
    assert draw_bars("t", [("a", 0, "0")]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (NAN, "not finite"), (12_345, "12,345"), (0.0, "0"), (1234.56, "1,235"), (0.000123456, "0.000123"), (3.14159, "3.142")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert show(value) == text


# Machado, Oliveira & Fernandes (2009), severity 1, for linear RGB.
COLOUR_BLIND = {
    "none": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("sight", COLOUR_BLIND)
def test_lines_can_be_told_apart_by_everybody(scheme, sight):
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    value = {name: re.findall(rf"--{name}: (#\w+)", style)[scheme] for name in ("paper", *(f"c{n}" for n in range(6)))}
    luminance = {name: float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for name, colour in value.items()}
    seen = [lab(np.clip(np.array(COLOUR_BLIND[sight]) @ linear(value[f"c{n}"]), 0, 1)) for n in range(6)]
    for n in range(6):
        dark, light = sorted([luminance["paper"], luminance[f"c{n}"]])
        assert (light + 0.05) / (dark + 0.05) >= 3  # WCAG 1.4.11
        assert all(np.linalg.norm(seen[n] - seen[other]) > 20 for other in range(n))  # of CIELAB's units
