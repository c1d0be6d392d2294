"""What a run's batches depend on, so that a resumed run, and every process of one, hears the same."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.utils import gather_object
from datasets import Dataset

from w2v2.data.batching import CHUNK
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.manifests.readers import PACKED_MANIFEST

LABELLED_ROWS = 10_000  # that are hashed together
MEANING = {
    "ids_sha256": "other utterances, another order or other paths (has the corpus moved?): ",
    "lengths_sha256": "other lengths: ",
    "places_sha256": "other starts or channels: ",
    "labels_sha256": "other transcripts or labels: ",
    "draws": "other shares of the sources (weight, --sampling_alpha_corpus, --sampling_alpha_language): an epoch's ",
}


# Of another kind of order, which the other side may lack.
OTHERS = ("draws", "shuffle_window_shards", "batch_seconds", "batch_utterances")


def differences(before: dict[str, Any], current: dict[str, Any]) -> str:
    """`seed 43 (was 42), …`, of what both know."""
    texts = []
    for name in OTHERS:
        if (name in before) != (name in current):
            before, current = {name: None} | before, {name: None} | current
    for name, value in current.items():
        if (old := before.get(name, value)) != value:
            by_name = isinstance(value, dict) and isinstance(old, dict)
            said = differences(dict.fromkeys(value, 0) | old, value) if by_name else f"{value} (was {old})"
            texts.append(f"{MEANING.get(name, '')}{name} {said}")
    return ", ".join(texts)


def identity(args, utterances: Utterances) -> dict[str, Any]:
    """What the effective batches depend on, but for the ids of the utterances: a resumed run has to agree in it."""
    digest, lengths = hashlib.sha256(), utterances.num_samples
    for first in range(0, len(lengths), CHUNK):
        digest.update(lengths[first : first + CHUNK].astype("<i8"))
    names = "seed batch_hours crop_seconds length_grid_seconds mask_time_prob mask_time_length mask_time_min_masks"
    values = {name: getattr(args, name) for name in names.split()}
    return values | {"utterances": len(lengths), "lengths_sha256": digest.hexdigest()[:16]}


def identify_labelled(args, data) -> dict[str, Any]:
    """The same of fine-tuning, whose `data.table` has texts or targets; the ids of its utterances are hashed here."""
    table = data.table
    parts = {"ids": ("id",), "lengths": ("num_samples",), "places": ("start", "channel"), "labels": ("text", "target")}
    digests = {name: hashlib.sha256() for name in parts}
    for rows in table.with_format("arrow").iter(LABELLED_ROWS):
        for name, columns in parts.items():
            values = rows.select([column for column in columns if column in table.column_names]).to_pydict()
            digests[name].update(json.dumps(values).encode())
    num = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    by_number = {"batch_utterances": num, "per_device_train_batch_size": args.per_device_train_batch_size}
    batch = {"batch_seconds": args.batch_seconds} if args.batch_seconds else by_number
    longest = {"longest_samples": max(data.lengths, default=0)}  # after cropping
    hashes = {f"{name}_sha256": digest.hexdigest()[:16] for name, digest in digests.items()}
    speeds = {"speed_perturbation": list(args.speed_perturbation)}
    return {"seed": args.seed, **batch, **speeds, **longest, "utterances": len(table), **hashes}


def hash_ids(train_data: Sequence[str], table: Dataset) -> str:
    """Of all ids in their order, as manifests write them, and of the names of the folders whose files are the ids.

    A corpus may move where its manifests write relative paths.
    """
    folders = [name for name in map(os.path.expanduser, train_data) if os.path.isdir(name)]
    folders = [name for name in folders if not {PACKED_MANIFEST, "wav.scp"}.intersection(os.listdir(name))]
    names = [os.path.basename(os.path.abspath(folder)) + "/\0" for folder in folders]
    digest, ids = hashlib.sha256("".join(names).encode()), table.data.column("id")
    for first in range(0, len(ids), CHUNK):
        for names in ids.slice(first, CHUNK).chunks:
            joined = pc.binary_join(pa.ListArray.from_arrays([0, len(names)], names), "\0")[0]
            digest.update(joined.as_buffer())
            digest.update(b"\0")
    return digest.hexdigest()[:16]


def hash_places(table: Dataset) -> str:
    """Of starts and channels: which part of its file each utterance is."""
    digest = hashlib.sha256()
    for name in filter(table.column_names.__contains__, ("start", "channel")):
        column = table.data.column(name)
        for first in range(0, len(column), CHUNK):
            digest.update(pc.fill_null(column.slice(first, CHUNK).cast(pa.float64()), -1.0).to_numpy())
    return digest.hexdigest()[:16]


def compare(before: dict[str, Any], current: dict[str, Any], is_accepted: bool) -> list[str]:
    """A note where the checkpoint's run had other batches. Raises UserError unless these are accepted."""
    if not (changed := differences(before, current)):
        return []
    if not is_accepted:
        raise UserError(
            f"the batches would differ from those of the checkpoint's run: {changed}; use the old values, go on with other "
            "batches with --accept_changed_batches, or start a new run from the weights with --model_name_or_path"
        )
    return [f"other batches from here on, as accepted: {changed}"]


def check_agreement(identities: Sequence[Any]) -> None:
    """Raises UserError where the processes of a run found other utterances."""
    if len(set(gather_object([json.dumps(identities, sort_keys=True)]))) > 1:
        raise UserError(
            "the processes of this run read different utterances: give every machine the same, whole corpus"
        )
