"""JSON manifests of every layout → rows: lists, objects by id, an object a line, with or without gzip."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from w2v2.errors import UserError
from w2v2.manifests.columns import COLUMNS, EXTRAS
from w2v2.manifests.lhotse_cuts import is_lhotse, open_text, read_lhotse

Row = tuple[int | None, dict]  # its line in the file, and {name: cell}
WORDS = {alias for role in EXTRAS for alias in COLUMNS[role]}  # columns of text


def read_rows(path: Path, wanted: Callable[[str], bool], warnings: list[str]) -> Iterator[Row]:
    """The rows of a manifest, whichever its suffix (NeMo says .json too). Lhotse's are told by their first entry.

    Raises UserError for what is no row.
    """
    with open_text(path) as file:
        entries = _read_entries(path, file)
        first = next(entries, None)
        entries = chain([first] if first else [], entries)
        if first and isinstance(first[1], dict) and is_lhotse(first[1]):
            yield from read_lhotse(path, entries, warnings)
            return
        for line, row in entries:
            if not isinstance(row, dict):
                where = f"manifest {path}: " + (f"line {line}" if line else "an entry")
                raise UserError(f"{where} is not a JSON object {{…}}: write one for each utterance")
            for name, cell in list(row.items()):
                if isinstance(cell, dict) and wanted(name.lower()):
                    # SpeechBrain's {"file", "start", "stop"} and datasets' {"path", "bytes"}
                    row |= {key: cell[key] for key in ("start", "stop") if key in cell}
                    row[name] = cell.get("file") or cell.get("path")
                elif isinstance(cell, list) and name.lower() in WORDS:
                    where = f"manifest {path}: " + (f"line {line}" if line else "an entry")
                    raise UserError(f"{where}: {name} is a list, {cell!r}: write it as one text")
            yield line, row


def _read_entries(path: Path, file: IO[str]) -> Iterator[Row]:
    stripped = filter(None, map(str.strip, file))
    first, second = next(stripped, ""), next(stripped, "")
    file.seek(0)
    if second and first.startswith("{") and first.endswith("}"):
        yield from ((number, _parse(line, path, number)) for number, line in enumerate(file, 1) if line.strip())
        return
    content = _parse(file.read(), path) if first else []
    if isinstance(content, dict):
        by_id = content and all(isinstance(row, dict) for row in content.values())
        content = [{"id": name, **row} for name, row in content.items()] if by_id else [content]
    if not isinstance(content, list):
        raise UserError(
            f"manifest {path}: found another JSON; use a list of objects, an object of id → object, or an object a line"
        )
    yield from ((None, row) for row in content)


def _parse(text: str, path: Path, line: int | None = None) -> object:
    def check_keys(pairs: list[tuple[str, object]]) -> dict:
        if len(row := dict(pairs)) < len(pairs):
            key = Counter(name for name, _ in pairs).most_common(1)[0][0]
            spelled = "|".join(re.escape(json.dumps(key, ensure_ascii=ascii)) for ascii in (False, True))
            at = [found.start() for found in re.finditer(rf"({spelled})\s*:", text)]
            raise json.JSONDecodeError(f"the key {key!r} comes twice", text, at[1] if len(at) == 2 else 0)
        return row

    try:
        return json.loads(text, object_pairs_hook=check_keys)
    except (ValueError, RecursionError) as error:  # the latter for brackets in brackets
        reason = getattr(error, "msg", "nested too deep, or a number too long")
        where = f"manifest {path}: line {line or getattr(error, 'lineno', 1)}"
        raise UserError(f"{where} is not valid JSON ({reason}): mend or remove it") from None
