"""Corpora as lists of parts: each becomes one manifest if it is as its release says.

A script says for each part which rows it has, what the release holds and what is wrong; `write_parts` does the rest.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from corpus_files import COLUMNS, list_unusable, measure, open_atomic, write_manifest

from w2v2.errors import UserError, printable

NUM_NAMED = 5  # faulty parts that an error names


@dataclass
class Part:
    """What becomes one manifest, and what its release says of it."""

    manifest: Path
    root: Path  # that the audio of the rows is relative to
    rows: list[dict]
    columns: Sequence[str] = COLUMNS
    utterances: int | None = None  # in the whole release
    hours: float | None = None
    tolerance: float = 0.005  # of the hours, relative
    sample: int | None = None  # see `measure`
    faults: list[str] = field(default_factory=list)  # what is not as it should be, in words
    cut: Callable[[dict], Iterable[dict]] | None = None  # a measured row → rows of the manifest, as they are written

    def add_fault(self, cases: Sequence, what: str) -> None:
        """Such as `3 utterances without transcript, the first: …`; nothing where there are no cases."""
        if cases:
            self.faults.append(f"{len(cases):,} {what}, the first: {cases[0]}")

    def check_text(self) -> None:
        self.add_fault([row["id"] for row in self.rows if not row["text"]], "utterances without transcript")


def find_root(folder: Path, names: Iterable[str], inner: str) -> Path:
    """The folder that holds any of `names`: the one given, or `inner` in it. UserError where neither does."""
    for root in (folder, folder / inner):
        if any((root / name).is_dir() for name in names):
            return root
    raise UserError(f"{folder}: holds none of {', '.join(names)}: give the folder that the archives unpack to")


def write_parts(parts: Iterable[Part], args, combined: Mapping[str, Sequence[str]] | None = None) -> list[Path]:
    """Measure, check and write every part that is whole, or with --allow_incomplete whatever is there.

    `combined` names manifests of --output_dir that join others. Returns what was written. UserError names the parts
    that are not whole, after the whole ones were written.
    """
    rows, faults, joined = {}, [], {name for names in (combined or {}).values() for name in names}
    for part in parts:
        found = _check(part, args)
        if found and (args.allow_incomplete or not part.faults):
            pieces = (piece for row in found for piece in part.cut(row)) if part.cut else found
            write_manifest(part.manifest, pieces, part.columns)
            rows[part.manifest] = found if part.manifest.stem in joined else []
        else:
            part.manifest.unlink(missing_ok=True)
        if part.faults:
            faults.append(f"{'/'.join(part.manifest.with_suffix('').parts[-2:])}: {', '.join(part.faults)}")
    for name, names in (combined or {}).items():
        path, pieces = args.output_dir / f"{name}.csv", [args.output_dir / f"{name}.csv" for name in names]
        if rows.keys() >= {*pieces}:
            write_manifest(path, [row for piece in pieces for row in rows[piece]])
            rows[path] = []
        else:
            path.unlink(missing_ok=True)
    if faults and not (args.allow_incomplete and rows):
        further = f"; and {len(faults) - NUM_NAMED} more manifests" if len(faults) > NUM_NAMED else ""
        remedy = "unpack again, or pass --allow_incomplete to take what is there"
        raise UserError(f"{'; '.join(faults[:NUM_NAMED])}{further}: {remedy}")
    for fault in faults:
        print(printable(f"warning: {fault}"), file=sys.stderr)
    return list(rows)


def _check(part: Part, args) -> list[dict]:
    """Rows of the usable files of a part, measured; what is wrong with the others is added to its faults."""
    total = len(part.rows)
    found, errors = measure(part.rows, part.root, part.manifest, args.num_workers, part.sample)
    hours = sum(row["duration"] for row in found) / 3600
    if part.utterances and total != part.utterances:
        part.faults.insert(0, f"{total:,} of {part.utterances:,} utterances found")
    part.add_fault(errors, "unusable files")
    if not part.faults and not found:
        part.faults.append("no utterance found")
    if not part.faults and part.hours and abs(hours / part.hours - 1) > part.tolerance:
        part.faults.append(f"{hours:,.1f} hours found where {part.hours:,} are expected")
    list_unusable(part.manifest, errors if args.allow_incomplete else ())
    return found


def write_sources(path: Path, manifests: Sequence[Path]) -> None:
    """Write the list that --train_data mixes: a source for each of some LANGUAGE/….csv below the file's folder."""
    names = [manifest.parent.name for manifest in manifests]
    data = [manifest.relative_to(path.parent).as_posix() for manifest in manifests]
    sources = [{"name": name, "language": name, "data": one} for name, one in zip(names, data, strict=True)]
    path.unlink(missing_ok=True)
    if sources:
        with open_atomic(path) as file:
            yaml.safe_dump(sources, file, sort_keys=False, allow_unicode=True)
        print(f"{path}: {len(sources):,} sources, for --train_data")
