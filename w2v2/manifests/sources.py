"""A sources file, a YAML list of corpora → one table of utterances, source after source.

    - name: swahili           # stands before its ids; default: the name of its first manifest, without suffix
      data: sw/train.csv      # a manifest, folder or tar, or a list of them
      data_root: sw/audio     # that the paths in these manifests start from; default: --data_root
      language: sw            # of every source, or of none
      weight: 2               # its share, times so much; 0: it is neither read nor heard

In place of `data`, keys of a data set of Hugging Face, as the flags of these names: `dataset_name` (its last part, and
the configuration, are the default name), `dataset_config_name`, `dataset_split_names`, `audio_column_name`. Relative
paths start beside the file. How often each source is heard: `sampling`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.errors import UserError, did_you_mean, missed_range, tell
from w2v2.manifests.dataset_loading import DatasetSource, Manifest
from w2v2.manifests.manifest import EXTRAS, count_shared, read_manifests
from w2v2.manifests.tables import by_batch

SUFFIXES = (".yaml", ".yml")
LISTS = ("data", "dataset_split_names")  # keys that may hold several values
OF_DATASET = ("dataset_config_name", "dataset_split_names", "audio_column_name")
KEYS = ("name", "language", "weight", "data", "data_root", "dataset_name", *OF_DATASET)


@dataclass
class Source:
    """A corpus of a sources file. Its utterances are consecutive rows of the table."""

    name: str
    data: list[Manifest]  # manifests, folders and tars, or a data set
    data_root: str | None = None
    language: str = ""
    weight: float = 1.0
    num_rows: int = 0  # that were read
    num_utterances: int = 0  # of these rows, of a fitting length
    num_samples: int = 0  # of all its utterances, at 16 kHz
    dropped_samples: int = 0  # of rows that were read but have no fitting length
    heard_samples: int = 0  # of a crop of each
    num_unreadable: int = 0

    def summarize(self) -> dict[str, Any]:
        """What is known of it, for JSON."""
        hours = self.num_samples / SAMPLING_RATE / 3600
        size = {"name": self.name, "language": self.language, "utterances": self.num_utterances, "hours": hours}
        dropped = {"dropped": self.num_rows + self.num_unreadable - self.num_utterances}
        return size | dropped | {"dropped_hours": self.dropped_samples / SAMPLING_RATE / 3600}


def is_sources_file(paths: Sequence[str]) -> bool:
    """Whether a sources file is given in place of manifests. Raises UserError where it stands beside others."""
    files = [path for path in paths if Path(str(path)).suffix.lower() in SUFFIXES]
    if files and len(paths) > 1:
        raise UserError(
            f"{files[0]} is a sources file and has to stand alone: list the other manifests in it, as `- data: …`"
        )
    return bool(files)


def read_sources(
    path: str, *, data_root: str | None = None, cache_dir: str | Path | None = None
) -> tuple[pa.Table, list[dict], dict[str, Any]]:
    """The utterances of a sources file, in its order, as `read_manifests` gives them; ids begin with `<source>/`.

    The notes have `sources` besides, those that are heard; their `samples` are by source. Raises UserError.
    """
    listed, tables, skipped, passed_over = parse_sources(Path(path).expanduser()), [], [], Counter()
    sources = [source for source in listed if source.weight > 0]
    warnings = [f"{path}: source {source.name} has weight 0: it is not heard" for source in listed if not source.weight]
    for line in warnings:
        tell(line)
    samples = {}
    for source in sources:
        table, unmeasured, notes = read_manifests(
            source.data, data_root=source.data_root or data_root, cache_dir=cache_dir
        )
        source.num_rows, source.num_unreadable = len(table), len(unmeasured)
        ids = by_batch(lambda ids, name=source.name: pc.binary_join_element_wise(name, ids, "/"), table["id"])
        tables.append(table.set_column(table.column_names.index("id"), "id", ids))
        skipped += [row | {"id": f"{source.name}/{row['id']}"} for row in unmeasured]
        warnings += notes["warnings"]
        passed_over.update(notes["passed_over"])
        samples[source.name] = [row for rows in notes["samples"].values() for row in rows]
    table = pa.concat_tables(tables, promote_options="default")
    for line in count_shared(table) if len(tables) > 1 else ():
        tell(line)
        warnings.append(line)
    for name in filter(table.column_names.__contains__, EXTRAS):
        filled = by_batch(lambda texts: pc.fill_null(texts, ""), table[name])
        table = table.set_column(table.column_names.index(name), name, filled)
    notes = {"warnings": warnings, "passed_over": dict(passed_over), "samples": samples, "sources": sources}
    return table, skipped, notes


def count_utterances(sources: Sequence[Source], kept: np.ndarray, num_samples: np.ndarray, heard: np.ndarray) -> None:
    """Count what is heard of each source. Raises UserError where that is nothing.

    Args:
        kept, num_samples, heard: of every row that was read: whether it is heard, its samples, those of its crop
    """
    first = 0
    for source in sources:
        rows = slice(first, first := first + source.num_rows)
        source.num_utterances = int(kept[rows].sum())
        source.num_samples = int(num_samples[rows].sum(where=kept[rows], dtype=np.int64))
        source.dropped_samples = int(num_samples[rows].sum(dtype=np.int64)) - source.num_samples
        source.heard_samples = int(heard[rows].sum(where=kept[rows], dtype=np.int64))
        if not source.num_utterances:
            shortest, longest = num_samples[rows].min() / SAMPLING_RATE, num_samples[rows].max() / SAMPLING_RATE
            raise UserError(
                f"source {source.name}: none of its {source.num_rows:,} utterances ({shortest:.2f} to {longest:.2f} s) has a "
                "fitting length: lower --min_seconds, raise --max_seconds, or remove the source"
            )


# -- the file


def parse_sources(path: Path) -> list[Source]:
    """The sources of a file, as they are written. Raises UserError for whatever is wrong with it."""
    if not path.is_file():
        raise UserError(f"sources file {path} does not exist: check the path (relative ones start at {os.getcwd()})")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"{path}: a sources file is a list: write an entry `- data: manifest.csv` for each source")
    sources = [_parse_source(node, path) for node in root.value]
    _refuse_twice(path, "the name {!r}: give each source a `name` of its own", [source.name for source in sources])
    data = [str(name) for source in sources for name in source.data]
    _refuse_twice(path, "the data {}: name them once, and change a share by `weight`", data)
    if not any(source.weight for source in sources):
        raise UserError(f"{path}: all weights are 0, so nothing would be heard: raise one")
    if unknown := [source.name for source in sources if not source.language]:
        if len(unknown) < len(sources):
            raise UserError(f"{path}: source {unknown[0]} has no language, others have: give every source one, or none")
    return sources


def _parse_source(node: yaml.Node, path: Path) -> Source:
    """One entry of the list. A key's place is kept: every message names its line."""
    where = f"{path}: line {node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: a source is given by keys, found {node.value!r}: write `- data: manifest.csv`")
    found: dict[str, Any] = {}
    for key, value in node.value:
        name, where = str(key.value), f"{path}: line {key.start_mark.line + 1}"
        if name not in KEYS:
            hint = did_you_mean(name, KEYS, f"a source has {', '.join(KEYS)}")
            raise UserError(f"{where}: unknown key {name!r}: {hint}")
        if name in found:
            raise UserError(f"{where}: {name} comes twice in one source: begin each source with `- `")
        found[name] = _read_value(name, value, where)
    return _build_source(found, path.absolute().parent, where)


def _build_source(found: dict[str, Any], beside: Path, where: str) -> Source:
    """The source of these keys; relative paths start `beside`."""
    if "data" in found:
        of_other = [name for name in ("dataset_name", *OF_DATASET) if name in found]
        data: list[Manifest] = [_resolve(beside, name) for name in found["data"]]
        name = Path(data[0]).stem
    elif "dataset_name" in found:
        of_other = [name for name in ("data_root",) if name in found]
        folder, config = _resolve(beside, found["dataset_name"]), found.get("dataset_config_name")
        is_folder = found["dataset_name"].startswith((".", "~", os.sep)) or os.path.isdir(folder)
        splits = tuple(found.get("dataset_split_names", ["train"]))
        dataset = folder if is_folder else found["dataset_name"]
        data = [DatasetSource(dataset, config, splits, found.get("audio_column_name"))]
        name = "-".join(filter(None, (Path(dataset).name, config)))
    else:
        raise UserError(f"{where}: the source has no data: add `data: manifest.csv`, a folder, or a `dataset_name`")
    if of_other:
        raise UserError(f"{where}: {of_other[0]} does not go with {'data' if 'data' in found else 'dataset_name'}")
    root, name = found.get("data_root"), found.get("name", name)
    if "/" in name:
        raise UserError(
            f"{where}: the name {name!r} holds a slash, which separates it from ids (`name/id`): leave it out"
        )
    return Source(name, data, root and _resolve(beside, root), found.get("language", ""), found.get("weight", 1.0))


def _resolve(beside: Path, name: str) -> str:
    return os.path.normpath(os.path.join(beside, os.path.expanduser(name)))


def _read_value(name: str, node: yaml.Node, where: str) -> str | float | list[str]:
    """What a key holds: a text, the weight as a number, or a list."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) and name in LISTS else [node]
    if not nodes or not all(isinstance(one, yaml.ScalarNode) and one.value.strip() for one in nodes):
        expected = "one value, or a list of them" if name in LISTS else "one value"
        raise UserError(f"{where}: {name} takes {expected}: give it that, or leave the key out")
    texts = [one.value for one in nodes]
    if name != "weight":
        return texts if name in LISTS else texts[0]
    try:
        weight, limits = float(texts[0]), dict(min=0)
    except ValueError:
        weight, limits = float("nan"), dict(min=0)
    if missed := missed_range(weight, limits):
        raise UserError(f"{where}: weight is {texts[0]}: it has to be a number, {missed}")
    return weight


def _refuse_twice(path: Path, message: str, values: list[str]) -> None:
    if twice := [value for value, count in Counter(values).items() if count > 1]:
        raise UserError(f"{path}: two sources have {message.format(twice[0])}")
