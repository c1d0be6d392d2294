"""Checks of what a run hears: what is left out or repeated, who speaks, and whether validation is heard in training.

`run` is `preflight.Preflight`. A check gives what was found and what to do, or None. Columns are compared as they are
written, chunk by chunk: the text of a long table need not fit into memory.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.data.utterances import Utterances, silent_share
from w2v2.plan.recipe_checks import Found
from w2v2.train.collapse import MOST_SILENCE

MOST_REPETITIONS = 100  # in a run, of a source that is heard far more often than it would be by its hours
FAR_MORE = 5.0
MOST_DROPPED = 0.1  # of the utterances
MOST_OF_ONE = 0.5  # of the hours, by one speaker


def check_repetitions(run) -> Found:
    repeated = [
        f"{source['name']} ({source['repetitions']:,.0f} times in the run, {source['repetitions_per_epoch']:,.0f} an epoch)"
        for source in run.plan.get("sources", [])
        if source["repetitions"] > MOST_REPETITIONS and source["repetitions_per_epoch"] >= FAR_MORE
    ]
    if not repeated:
        return None
    found = f"some sources are repeated very often: {', '.join(repeated)}; the model may learn them by heart"
    return found, "lower the weight, or raise --sampling_alpha_corpus or --sampling_alpha_language"


def check_dropped(run) -> Found:
    num_dropped = sum(run.plan["dropped"].values())
    if num_dropped <= MOST_DROPPED * (total := run.plan["utterances"] + num_dropped):
        return None
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in run.plan["dropped"].items())
    found = f"{num_dropped:,} of {total:,} utterances are left out: {reasons}"
    return found, "lower --min_seconds, raise --max_seconds or mend the files, unless that is meant"


def check_validation(run) -> Found:
    if run.validation:
        return None
    found = "no validation_data: a run that learns nothing would show in the training figures alone"
    return found, "give --validation_data an hour or so of other speakers"


def check_overlap(run) -> Found:
    if not run.validation or not (found := describe_overlap(run.training, run.validation)):
        return None
    return (
        f"{found}: validation looks better than unheard speech would",
        "leave these out of the training data, or validate on others",
    )


def check_weights(run) -> Found:
    if not run.validation or all(source.weight == 1 for source in run.validation.sources):
        return None
    return "weights of --validation_data have no effect: every utterance is heard once", "leave them out there"


def check_speaker(run) -> Found:
    found = find_main_speaker(run.training)
    if not found or found[1] <= MOST_OF_ONE:
        return None
    said = f"speaker {found[0]} speaks {found[1]:.0%} of the hours: the model learns that voice more than speech"
    return said, "add other speakers, or leave out some of that one's"


def check_silence(run) -> Found:
    if (share := silent_share(run.training)) < MOST_SILENCE:
        return None
    found = f"{share:.0%} of the utterances looked at are silence: masked silence is guessed without listening"
    return found, "cut it out (data_scripts/segment.py), and check channels and levels of the recordings"


# -- two tables, and one


def describe_overlap(training: Utterances, validation: Utterances) -> str | None:
    """What training and validation share: files, or else utterances under the same id and name, or else speakers."""
    ours, theirs = training.table.data, validation.table.data
    shared = find_shared(ours["audio"], theirs["audio"])
    if len(shared):
        count = pc.sum(pc.is_in(theirs["audio"], value_set=shared)).as_py()
        return f"{count:,} of {len(theirs):,} validation utterances lie in files of the training data, the first {shared[0]}"
    # Copies in another place or format: ids alone may be numbers of rows.
    shared = find_shared(ours["id"], theirs["id"])
    both = pd.merge(*(_outline(table, shared) for table in (ours, theirs)))
    if len(both):
        return (
            f"{len(both):,} of {len(theirs):,} validation utterances have the id, length and file name of one that is trained on, "
            f"the first {both['id'][0]}"
        )
    if not all("speaker" in table.column_names for table in (ours, theirs)):
        return None
    names = [name for name in find_shared(ours["speaker"], theirs["speaker"]).to_pylist() if name]
    if not names:
        return None
    total = len(pc.unique(theirs["speaker"]))
    return f"{len(names):,} of {total:,} speakers of the validation data are in the training data too, the first {names[0]}"


def find_shared(ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> pa.Array:
    """The distinct values of `theirs` that `ours` has too."""
    wanted = pc.unique(theirs).cast(ours.type)
    found = [pc.unique(chunk.filter(pc.is_in(chunk, value_set=wanted))) for chunk in ours.chunks]
    return pc.unique(pa.chunked_array(found, ours.type))


def _outline(table: pa.Table, ids: pa.Array) -> pd.DataFrame:
    """Id, length and file name without suffix of the rows that have one of these ids."""
    mask = pc.is_in(table["id"], value_set=ids.cast(table.schema.field("id").type))
    rows = pa.table({name: table[name].filter(mask) for name in ("id", "num_samples", "audio")}).to_pandas()
    name = rows.pop("audio").str.rsplit("/", n=1).str[-1].str.rsplit(".", n=1).str[0]
    return rows.assign(name=name)


def find_main_speaker(utterances: Utterances) -> tuple[str, float] | None:
    """The speaker who speaks longest, and the share of all hours; None where no speaker is named."""
    if "speaker" not in utterances.table.column_names:
        return None
    encoded = pc.dictionary_encode(utterances.table.data["speaker"]).combine_chunks()
    names, numbers = encoded.dictionary, encoded.indices.to_numpy()
    samples = np.bincount(numbers, utterances.num_samples, len(names))  # float64
    samples[[name == "" for name in names.to_pylist()]] = 0
    longest = int(samples.argmax())
    return (
        (names[longest].as_py(), float(samples[longest] / utterances.num_samples.sum(dtype=np.int64)))
        if samples.any()
        else None
    )
