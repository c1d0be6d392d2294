"""The picture of a corpus: histograms, and spectrograms of typical and of suspicious utterances."""

import sys
from pathlib import Path

import numpy as np
from listening import REASONS

from w2v2.audio.crops import SAMPLING_RATE, read_crop
from w2v2.evaluate.plots import make_figure, save_figure

NUM_SHOWN = 3  # typical ones, and as many suspicious ones
SHOWN_SECONDS = 10
WINDOW, HOP = 512, 128  # samples


def draw_description(path: Path, seconds: np.ndarray, rows: list[dict], looks: list[dict]) -> None:
    """Histograms of all lengths, and of the levels and silence in the sample; spectrograms where librosa is there."""
    try:
        import librosa.display  # compiles on first use
    except ImportError:
        print(f"{path}: without spectrograms: the package librosa is missing; pip install librosa", file=sys.stderr)
        shown = []
    else:
        shown = pick_typical(looks) + pick_suspicious(looks)
    figure = make_figure(13, 3 + 3 * -(-len(shown) // NUM_SHOWN))
    axes = figure.subplots(1 + -(-len(shown) // NUM_SHOWN), NUM_SHOWN, squeeze=False)
    heard = [look for look in looks if "level" in look]
    draw_histogram(axes[0][0], seconds, "length (s)", "hours", seconds / 3600)
    draw_histogram(axes[0][1], [look["level"] for look in heard], "level (dBFS)", "utterances of the sample")
    draw_histogram(
        axes[0][2], [look["silence"] for look in heard], "share of silent frames", "utterances of the sample"
    )
    for axis, (place, title) in zip(axes[1:].flat, shown, strict=False):
        row = rows[place]
        length = min(row["num_samples"], SHOWN_SECONDS * SAMPLING_RATE)
        samples = read_crop(row["audio"], round(row["start"] * SAMPLING_RATE), length, row.get("channel"))
        magnitudes = np.abs(librosa.stft(samples, n_fft=WINDOW, hop_length=HOP))
        decibels = librosa.amplitude_to_db(magnitudes, ref=WINDOW / 4, top_db=None)  # a full-scale sine is at 0
        options = {"sr": SAMPLING_RATE, "hop_length": HOP, "x_axis": "time", "y_axis": "hz"}
        librosa.display.specshow(decibels, ax=axis, vmin=-90, vmax=0, cmap="magma", **options)
        name = row["id"] if len(row["id"]) <= 40 else f"…{row['id'][-39:]}"
        axis.set_xlabel("time (s)")
        axis.set_title(f"{title}\n{name}".replace("$", r"\$"), fontsize=8)
    for axis in axes[1:].flat[len(shown) :]:
        axis.axis("off")
    save_figure(figure, path)


def draw_histogram(axis, values, title: str, counted: str, weights=None) -> None:
    axis.hist(values, bins=40, weights=weights, color="tab:blue")
    axis.set_xlabel(title)
    axis.set_ylabel(counted)


def pick_typical(looks: list[dict]) -> list[tuple[int, str]]:
    """Utterances without a fault that lie nearest to the medians of level and silence."""
    sound = [place for place, look in enumerate(looks) if not look["reasons"]]
    if not sound:
        return []
    values = np.array([[looks[place]["level"], looks[place]["silence"]] for place in sound])
    scale = np.maximum(values.std(axis=0), 1e-9)
    distance = np.abs((values - np.median(values, axis=0)) / scale).sum(axis=1)
    return [(sound[nth], "typical") for nth in np.argsort(distance, kind="stable")[:NUM_SHOWN]]


def pick_suspicious(looks: list[dict]) -> list[tuple[int, str]]:
    """One utterance of each kind of fault in turn; where there are too few, the quietest and the most silent."""
    found: dict[int, str] = {}
    kinds = [[n for n, look in enumerate(looks) if kind in look["reasons"] and "level" in look] for kind in REASONS]
    for nth in range(NUM_SHOWN):
        for kind, places in zip(REASONS, kinds, strict=True):
            if nth < len(places):
                found.setdefault(places[nth], f"{kind.replace('_', ' ')}: {REASONS[kind]}")
    heard = [place for place, look in enumerate(looks) if "level" in look]
    for name, sign in (("level", 1), ("silence", -1)):
        for place in sorted(heard, key=lambda place: sign * looks[place][name])[:NUM_SHOWN]:
            found.setdefault(place, f"lowest {name}" if sign > 0 else f"highest share of {name}")
    return list(found.items())[:NUM_SHOWN]
