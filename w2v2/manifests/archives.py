"""Uncompressed tars of audio, WebDataset's or any → rows whose audio is an address in them."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from w2v2.errors import UserError
from w2v2.manifests.columns import says_place
from w2v2.manifests.readers import RawTable
from w2v2.manifests.tar_index import NOTES, index_tars

TAR_NAME = re.compile(r"\.(tar(\.[a-z0-9]+)?|tgz|tbz2?|txz)$", re.IGNORECASE)
SET_OF_NAMES = re.compile(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}")
MOST_SHARDS = 1_000_000


def gather_tars(names: Sequence[str]) -> dict[str, list[str]]:
    """Name of each manifest → its tars, if it is one of tars. All tars are one manifest: shells spell a `*` out.

    A name may have `{000..012}`, `{a,b}`, `*` or `?`. Raises UserError where a tar does not exist.
    """
    is_dir = os.path.isdir
    of_tars = {name: None for name in names if TAR_NAME.search(name) and not is_dir(os.path.expanduser(name))}
    label = next(iter(of_tars), "") + (f" and {len(of_tars) - 1} more" if len(of_tars) > 1 else "")
    gathered: dict[str, list[str]] = {}
    for name in names:
        if name in of_tars:
            gathered.setdefault(label, []).extend(_find_tars(os.path.expanduser(name)))
        else:
            gathered[name] = []
    return gathered


def _find_tars(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    paths = []
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name))
        if not found:
            where = f"manifest {pattern}" + (f": {name}" if name != pattern else "")
            raise UserError(f"{where} does not exist: check the path (relative ones start at {os.getcwd()})")
        paths += found
    return paths


def expand_braces(pattern: str) -> Iterator[str]:
    """`{000..012}` and `{a,b}`, as a shell spells them out. Raises UserError for what counts backwards."""
    found = SET_OF_NAMES.search(pattern)
    if not found:
        yield pattern
        return
    first, last, names = found.groups()
    if names is None and not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise UserError(f"manifest {pattern}: {found[0]} counts backwards or too far: write {{first..last}}")
    parts = names.split(",") if names else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    for part in parts:
        yield from expand_braces(pattern[: found.start()] + part + pattern[found.end() :])


def read_tars(
    name: str, paths: Sequence[str], wanted: Callable[[str], bool], cache_dir: str | Path | None = None
) -> RawTable:
    """The audio of tars as one manifest `name`; what they hold is kept in `cache_dir`. Raises UserError for no tar."""
    paths = [os.path.abspath(path) for path in paths]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise UserError(f"{twice[0]} is given twice: name each tar once")
    indexes = index_tars(paths, cache_dir)
    notes = [json.loads(index.schema.metadata[b"notes"]) for index in indexes]
    passed_over = sum((Counter(note.pop("passed_over")) for note in notes), Counter())
    lines = []
    for kind, said in NOTES.items():
        if found := [(path, note[kind]) for path, note in zip(paths, notes, strict=True) if note[kind]]:
            first = f"the first {found[0][0]}: {found[0][1]:,}"
            lines.append(f"{len(found):,} of {len(paths):,} tars {said} ({first})")
    tables = [_build_rows(path, index, wanted) for path, index in zip(paths, indexes, strict=True) if len(index)]
    if not tables:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.items()) or "no files"
        raise UserError(f"{paths[0]}: {len(paths):,} tars hold no audio, but {kinds}: name tars of audio files")
    table = pa.concat_tables(tables, promote_options="default")
    if len(tables) > 1 and pc.count_distinct(table["id"]).as_py() < len(table):  # numbered anew in each tar
        common = os.path.commonpath(paths)
        tars = [os.path.splitext(os.path.relpath(path, common))[0] for path in paths]
        labels = pa.chunked_array([pa.repeat(tar, len(index)) for tar, index in zip(tars, indexes, strict=True)])
        table = table.set_column(0, "id", pc.binary_join_element_wise(labels, table["id"], "/"))
    passed_over = dict(passed_over.most_common())
    return RawTable(Path(name), table, table.column_names, passed_over=passed_over, warnings=lines)


def _build_rows(path: str, index: pa.Table, wanted: Callable[[str], bool]) -> pa.Table:
    """Columns of one tar: `id`, `audio`, and as text what is told of its utterances."""
    place = (index["offset"].cast(pa.string()), index["size"].cast(pa.string()))
    columns = {"id": index["id"], "audio": pc.binary_join_element_wise(os.path.abspath(path), *place, ":")}
    told = [json.loads(fields) if fields else {} for fields in index["fields"].to_pylist()]
    for name in dict.fromkeys(name for fields in told for name in fields):
        # Other places are those in the recording that the member was cut from.
        if wanted(name) and (name == "duration" or not says_place(name)):
            columns[name] = pa.chunked_array([[fields.get(name) for fields in told]], pa.string())
    for name in ("text", "label"):
        if index[name].null_count < len(index):
            columns[name] = pc.coalesce(index[name], columns[name]) if name in columns else index[name]
    return pa.table(columns)
