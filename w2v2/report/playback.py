"""Short pieces of audio inside the page, found again by the manifests or the data set that the run was given."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

import soundfile

from w2v2.audio.crops import SAMPLING_RATE, AudioError, read_crop
from w2v2.errors import UserError
from w2v2.finetune.ctc_data import name_sets
from w2v2.manifests.dataset_loading import LabelledDatasetArguments
from w2v2.manifests.manifest import read_manifests
from w2v2.report.run_files import RunFiles
from w2v2.report.sections import Utterance

SECONDS_PLAYED = 10.0  # of an utterance
DATASET_FLAGS = fields(LabelledDatasetArguments)
MOST_BYTES = 1_300_000  # of all data URIs together: the page stays below 2 MB


def embed_audio(run: RunFiles, utterances: Sequence[Utterance]) -> list[str]:
    """Give the utterances their audio, as FLAC at 16 kHz. Returns what is to be said of it."""
    rows, why = _find_rows(run, {utterance.set for utterance in utterances})
    left, missing = MOST_BYTES, Counter()
    for utterance in utterances:
        try:
            found = _encode(rows[utterance.set, utterance.id])
        except AudioError as error:
            missing[error.reason] += 1
        except KeyError:
            missing[why] += 1
        else:
            if len(found) > left:
                missing["the page would pass 2 MB"] += 1
            else:
                utterance.audio, left = found, left - len(found)
    notes = [f"No audio of {count} utterances: {reason}." for reason, count in missing.items()]
    return [*notes, f"Of long utterances the first {SECONDS_PLAYED:g} s can be heard."] if utterances else []


def _find_rows(run: RunFiles, sets: set[str]) -> tuple[dict, str]:
    """(set, id) → row of a manifest or data set, and why a row may be missing."""
    config, rows = run.config, {}
    flags = LabelledDatasetArguments(**{f.name: config[f.name] for f in DATASET_FLAGS if f.name in config})
    flags.validation_data, flags.test_data = (config.get(name) or [] for name in ("validation_data", "test_data"))
    sources = {"validation": flags.list_sources("validation_data")}
    sources |= {name: [source] for name, source in name_sets(flags.list_sources("test_data")).items()}
    for name in sorted(name for name in sets if sources.get(name)):
        try:
            table, *_ = read_manifests(sources[name], data_root=config.get("data_root"), fill=False)
        except UserError as error:
            return rows, f"{error}; make the report where the run was started"
        rows |= {(name, row["id"]): row for row in table.to_pylist()}
    return rows, "the manifests of the run's flags do not have them (any more)"


def _encode(row: dict) -> str:
    """A data URI. Raises `AudioError` where the file cannot be read."""
    most, length = round(SECONDS_PLAYED * SAMPLING_RATE), row["num_samples"]
    start = round(row["start"] * SAMPLING_RATE)
    samples = read_crop(row["audio"], start, length and min(length, most), channel=row.get("channel"))[:most]
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()
