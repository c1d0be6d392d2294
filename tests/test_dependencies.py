"""Every package that is imported is declared in setup.cfg, and every declared one is imported."""

import ast
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT, TOOLS = ("*.py", "w2v2/**/*.py", "data_scripts/*.py"), ("tests/**/*.py", "benchmarks/**/*.py")
OWN = {"w2v2"} | {path.stem for pattern in (*PRODUCT, *TOOLS) for path in ROOT.glob(pattern)}
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml", "flashlight": "flashlight-text"}
NOT_IMPORTED = {
    "tensorboard": "the default tracker, through accelerate and Trainer",
    "ufal-flashlight-text": "flashlight-text under this name for Python 3.13",
    "trackio": "a tracker, through accelerate and Trainer",
    "pytest-xdist": "the -n of make test",
    "ipykernel": "runs the notebook of docs/",
    "ruff": "make quality",
}


def imported(patterns):
    for path in (path for pattern in patterns for path in ROOT.glob(pattern) if path.name != "setup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - OWN - sys.stdlib_module_names:
                yield DISTRIBUTIONS.get(name, name).replace("_", "-")


def declared(*extras):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    for line in filter(None, "\n".join(texts).splitlines()):
        yield re.match(r"[\w-]+", line)[0].replace("_", "-")


def test_imports_and_declarations_match():
    assert (
        set(imported(PRODUCT))
        == set(declared("cluster", "demo", "describe", "kernels", "lm", "segment")) - NOT_IMPORTED.keys()
    )
    assert set(imported(PRODUCT + TOOLS)) == set(declared("test")) - NOT_IMPORTED.keys()
