"""Short pieces of audio inside the page, found again by the manifests that the run was given."""

import base64
import io
from collections.abc import Sequence

import soundfile

from w2v2.audio.crops import SAMPLING_RATE, AudioError, read_crop
from w2v2.errors import UserError
from w2v2.finetune.ctc_data import name_sets
from w2v2.manifests.manifest import read_manifests
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import Utterance

SECONDS_PLAYED = 10.0  # of an utterance
MOST_BYTES = 1_300_000  # of all data URIs together: the page stays below 2 MB


def embed_audio(run: RunFiles, utterances: Sequence[Utterance]) -> list[str]:
    """Give the utterances their audio, as FLAC at 16 kHz. Returns what has to be said about those that have none."""
    rows, notes = _find_rows(run, {utterance.set for utterance in utterances})
    left, num_large, num_lost, is_cut = MOST_BYTES, 0, 0, False
    for utterance in utterances:
        row = rows.get((utterance.set, utterance.id))
        try:
            found = _encode(row) if row else None
        except AudioError as error:
            notes.append(f"No audio of {utterance.id}: {error.reason}.")
            continue
        if found is None:
            num_lost += 1
        elif len(found) > left:
            num_large += 1
        else:
            utterance.audio, left = found, left - len(found)
            length = row["num_samples"]
            is_cut |= length is None or length > SECONDS_PLAYED * SAMPLING_RATE
    if num_lost and rows:
        notes.append(f"{num_lost} utterances are not in the run's manifests any more.")
    if num_large:
        notes.append(f"The audio of {num_large} utterances was left out: the page would pass 2 MB.")
    return notes + [f"Of long utterances the first {SECONDS_PLAYED:g} s can be heard."] * is_cut


def _find_rows(run: RunFiles, sets: set[str]) -> tuple[dict, list[str]]:
    """(set, id) → row of a manifest, and why there is none."""
    config = run.config
    if config.get("dataset_name"):
        return {}, ["No audio is embedded: it is in a data set of the Hub, which the page does not load."]
    manifests = {"validation": config["validation_data"]} if config.get("validation_data") else {}
    manifests |= {name: [path] for name, path in name_sets(config.get("test_data") or []).items()}
    rows = {}
    for name in sorted(sets & manifests.keys()):
        try:
            table, *_ = read_manifests(manifests[name], data_root=config.get("data_root"), fill=False)
        except UserError as error:
            return rows, [f"No audio is embedded: {error}; make the report where the run was started."]
        rows |= {(name, row["id"]): row for row in table.to_pylist()}
    return rows, [] if rows else ["No audio is embedded: the run's flags name no manifest of these sets."]


def _encode(row: dict) -> str:
    """A data URI. Raises `AudioError` where the file cannot be read."""
    most, length = round(SECONDS_PLAYED * SAMPLING_RATE), row["num_samples"]
    start = round(row["start"] * SAMPLING_RATE)
    samples = read_crop(row["audio"], start, length and min(length, most), channel=row.get("channel"))[:most]
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()
