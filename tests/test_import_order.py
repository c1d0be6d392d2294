"""A package imports only from those before it in the flow of data (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "w2v2"
ORDER = "errors audio manifests data model train plan evaluate finetune probe hub report convert arguments cli __main__".split()


def imported_rooms(path):
    """Names below `w2v2` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("w2v2."))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_order(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    before = ORDER[: ORDER.index(room) + 1] if room != "__init__" else []
    assert not set(imported_rooms(path)) - set(before)
