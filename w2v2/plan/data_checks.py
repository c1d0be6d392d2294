"""Checks of what a run hears: what is left out or repeated, who speaks, and whether validation is heard in training.

`run` is `preflight.Preflight`. Columns are compared as they are written, chunk by chunk: the text of a long table need not
fit into memory.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from w2v2.data.utterances import Utterances, silent_share
from w2v2.plan.recipe_checks import Found
from w2v2.train.collapse import MOST_SILENCE

MOST_REPETITIONS = 100  # in a run, of a source that is heard far more often than it would be by its hours
FAR_MORE = 5.0
MOST_DROPPED = 0.1  # of the utterances
MOST_OF_ONE = 0.5  # of the hours, by one speaker


def check_data(run) -> Iterator[Found]:
    repeated = [
        f"{source['name']} ({source['repetitions']:,.0f} times in the run, {source['repetitions_per_epoch']:,.0f} an epoch)"
        for source in run.plan.get("sources", [])
        if source["repetitions"] > MOST_REPETITIONS and source["repetitions_per_epoch"] >= FAR_MORE
    ]
    if repeated:
        found = f"some sources are repeated very often: {', '.join(repeated)}; the model may learn them by heart"
        remedy = "lower the weight, or raise --sampling_alpha_corpus or --sampling_alpha_language"
        yield "often_repeated", found, remedy
    num_dropped = sum(run.plan["dropped"].values())
    if num_dropped > MOST_DROPPED * (total := run.plan["utterances"] + num_dropped):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in run.plan["dropped"].items())
        found = f"{num_dropped:,} of {total:,} utterances are left out: {reasons}"
        remedy = "lower --min_seconds, raise --max_seconds or mend the files, unless that is meant"
        yield "many_dropped", found, remedy
    yield from check_validation(run)
    name, share = find_main_speaker(run.training)
    if share > MOST_OF_ONE:
        found = f"speaker {name} speaks {share:.0%} of the hours: the model learns that voice more than speech"
        yield "one_speaker_dominates", found, "add other speakers, or leave out some of that one's"
    if (share := silent_share(run.training)) >= MOST_SILENCE:
        found = f"{share:.0%} of the utterances looked at are silence: masked silence is guessed without listening"
        remedy = "cut it out (data_scripts/segment.py), and check channels and levels of the recordings"
        yield "silence", found, remedy


def check_validation(run) -> Iterator[Found]:
    if not run.validation:
        found = "no validation_data: a run that learns nothing would show in the training figures alone"
        yield "no_validation", found, "give --validation_data an hour or so of other speakers"
        return
    if found := describe_overlap(run.training, run.validation):
        remedy = "leave these out of the training data, or validate on others"
        yield "validation_in_training", f"{found}: validation looks better than unheard speech would", remedy
    if any(source.weight != 1 for source in run.validation.sources):
        found = "weights of --validation_data have no effect: every utterance is heard once"
        yield "validation_weights", found, "leave them out there"


def describe_overlap(training: Utterances, validation: Utterances) -> str | None:
    """What training and validation share: files, or else speakers."""
    ours, theirs = training.table.data, validation.table.data
    if len(shared := find_shared(ours["audio"], theirs["audio"])):
        count = pc.sum(pc.is_in(theirs["audio"], value_set=shared)).as_py()
        return f"{count:,} of {len(theirs):,} validation utterances lie in files of the training data, the first {shared[0]}"
    if not all("speaker" in table.column_names for table in (ours, theirs)):
        return None
    names, total = find_shared(ours["speaker"], theirs["speaker"]).to_pylist(), len(pc.unique(theirs["speaker"]))
    if names := [name for name in names if name]:
        return f"{len(names):,} of {total:,} speakers of the validation data are in the training data too, the first {names[0]}"
    return None


def find_shared(ours: pa.ChunkedArray, theirs: pa.ChunkedArray) -> pa.Array:
    """The distinct values of `theirs` that `ours` has too."""
    wanted = pc.unique(theirs).cast(ours.type)
    found = [pc.unique(chunk.filter(pc.is_in(chunk, value_set=wanted))) for chunk in ours.chunks]
    return pc.unique(pa.chunked_array(found, ours.type))


def find_main_speaker(utterances: Utterances) -> tuple[str, float]:
    """The speaker who speaks longest, and the share of all hours; 0 where no speaker is named."""
    if "speaker" not in utterances.table.column_names:
        return "", 0.0
    encoded = pc.dictionary_encode(utterances.table.data["speaker"]).combine_chunks()
    names, total = encoded.dictionary.to_pylist(), utterances.num_samples.sum(dtype=np.int64)
    samples = np.bincount(encoded.indices.to_numpy(), utterances.num_samples, len(names))  # float64
    samples[[not name for name in names]] = 0
    longest = int(samples.argmax())
    return names[longest], float(samples[longest] / total)
