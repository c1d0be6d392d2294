"""A file of the library imports only from lower floors (docs/architecture.md, "The rooms")."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "w2v2"
FILES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def read_floors(text):
    """File → floor from the rows `| floor | `file.py` … |` of a table; the floor `ground` lies under 0."""
    floors = {}
    for floor, files in re.findall(r"^\|\s*(ground|\d+)\s*\|([^|]*)\|", text, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)\.py`", files):
            assert name not in floors, f"{name}.py stands on two floors"
            floors[name] = -1 if floor == "ground" else int(floor)
    return floors


def imports(source):
    """Names of the package's files that a source imports, anywhere in it and in whatever way."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["w2v2" if node.level else "", node.module]))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "w2v2" else [module]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("w2v2."))


FLOORS = read_floors((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def test_every_file_has_a_floor_and_every_floor_holds_files_that_exist():
    assert sorted(FLOORS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_lower_floors_only(name):
    for imported in imports((PACKAGE / f"{name}.py").read_text(encoding="utf-8")):
        assert FLOORS[imported] < FLOORS[name], (
            f"{name}.py (floor {FLOORS[name]}) imports {imported}.py (floor {FLOORS[imported]})"
        )


def test_the_library_does_not_import_the_scripts():
    scripts = {path.stem for folder in (ROOT, ROOT / "data_scripts") for path in folder.glob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [getattr(node, "module", None) or ""]
            )
            assert not {name.split(".")[0] for name in names} & (scripts | {"data_scripts", "tests"}), path.name


def test_every_way_of_importing_is_seen():
    source = """
import w2v2.a, os
from w2v2.b import x
from w2v2 import c, d
from .e import y
from . import f
import torch
def late():
    from w2v2.g import z
"""
    assert sorted(imports(source)) == list("abcdefg")


def test_a_table_is_read_by_floor_and_file():
    text = (
        "| floor | file |\n|---|---|\n| ground | `errors.py` | one |\n| 2 | `model.py`, `plan.py` | job of `x.py` |\n"
    )
    assert read_floors(text) == {"errors": -1, "model": 2, "plan": 2}
