"""What is heard in an utterance: level, clipping, silence, and whether another one holds the same recording."""

import hashlib

import numpy as np
from fingerprints import count_repeated, find_repeated, take_fingerprint

from w2v2.audio.crops import SAMPLING_RATE, AudioError, read_crop
from w2v2.audio.inspection import CLIPPED, SILENCE, inspect_audio

LOOKED_SECONDS = 30  # of an utterance, from its beginning
SILENT_FRAME = 320  # samples: 20 ms
SILENT_DECIBELS = -35  # of a frame, relative to the loud ones
MOSTLY_SILENT = 0.5  # share of silent frames
REASONS = {  # of suspicious utterances, the gravest first
    "unreadable": "cannot be decoded",
    "silent": "below −60 dBFS",
    "clipped": "more than 0.1 % of samples at full scale",
    "antiphase": "stereo whose sides cancel out",
    "exact_repetition": "the same samples as an earlier one",
    "near_repetition": "the same recording as an earlier one",
    "mostly_silent": "more than half of its frames silent",
}


def look_into(row: dict) -> dict:
    """Level, peak, clipping, silence, and what tells repetitions, of the first seconds of an utterance."""
    length = min(row["num_samples"], LOOKED_SECONDS * SAMPLING_RATE)
    facts = inspect_audio(row["audio"], LOOKED_SECONDS)
    try:
        samples = read_crop(row["audio"], round(row["start"] * SAMPLING_RATE), length, row.get("channel"))
    except AudioError as error:
        return {"reasons": ["unreadable"], "error": error.reason}
    frames = samples[: len(samples) // SILENT_FRAME * SILENT_FRAME].reshape(-1, SILENT_FRAME)
    loudness = np.sqrt(np.square(frames, dtype=np.float64).mean(axis=1))
    level = np.sqrt(np.square(samples, dtype=np.float64).mean())
    least = max(SILENCE, np.percentile(loudness, 95) * 10 ** (SILENT_DECIBELS / 20)) if len(loudness) else SILENCE
    silence = float((loudness < least).mean()) if len(loudness) else float(level < SILENCE)
    is_full = np.abs(samples) >= 1 - 2.0**-14
    found = {
        "silent": level < SILENCE,
        "clipped": is_full.mean() > CLIPPED,
        "antiphase": facts.is_antiphase and row.get("channel") is None,
        "mostly_silent": silence > MOSTLY_SILENT and level >= SILENCE,
    }
    return {
        "level": float(20 * np.log10(max(level, 1e-5))),
        "peak": float(np.abs(samples).max()),
        "silence": silence,
        "reasons": [name for name, holds in found.items() if holds],
        "digest": hashlib.sha256(samples.tobytes() + str(row["num_samples"]).encode()).digest()[:16],
        "words": take_fingerprint(samples),
    }


def mark_repetitions(looks: list[dict]) -> None:
    """Add the reasons of exact and near repetitions; silence repeats nothing."""
    heard = [look for look in looks if "level" in look and "silent" not in look["reasons"]]
    seen, single = set(), []
    for look in heard:
        if look["digest"] in seen:
            look["reasons"].append("exact_repetition")
        else:
            seen.add(look["digest"])
            single.append(look)
    for place in count_repeated(find_repeated([look["words"] for look in single])):
        single[place]["reasons"].append("near_repetition")
