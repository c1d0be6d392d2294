"""What the benchmarks share: where and when a number was measured, medians with their spread, a table, a line of JSON."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("numpy", "torch", "transformers", "accelerate", "datasets", "pyarrow", "soundfile")


def environment() -> dict:
    """Everything that a number needs beside it to be repeated: date, command, processor, threads, GPU, versions."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def median_spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest of repeated measurements; ValueError where there is none."""
    values = [float(value) for value in values]
    if not values:
        raise ValueError("median_spread: no value was measured")
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(rows: Iterable[Sequence], headers: Sequence[str]) -> None:
    """Columns as wide as they need; numbers to the right with four significant digits, text to the left."""
    rows = list(rows)
    cells = [list(map(str, headers)), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [
        all(isinstance(value, (int, float)) or value is None for value in column) for column in zip(*rows, strict=True)
    ]
    for row in [cells[0], ["-" * width for width in widths], *cells[1:]]:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric or [False] * len(widths), strict=True)
        ]
        print("  ".join(aligned).rstrip())


def _cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def json_line(values: dict) -> None:
    """One line on standard output for programs; benchmarks print it last."""
    print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)
