"""Main memory: what this process takes of it at most, and what it may take. Linux; elsewhere the answer is None.

Bytes throughout.
"""

import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from w2v2.model.cpu import give_back

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available() -> int | None:
    """What can still be taken: the system's `MemAvailable`, or less where a control group (version 2) leaves less."""
    system = _kilobytes(_PROC / "meminfo", "MemAvailable")
    return None if system is None else min([system, *_rooms()])


def resident() -> int | None:
    """What this process takes now, after what was freed went back to the system."""
    give_back()
    return _kilobytes(_PROC / "self/status", "VmRSS")


def peak_of(work: Callable[[], object]) -> int | None:
    """What this process takes at most while `work()` runs, what it took before included.

    None where the kernel's record can neither be set back nor was beaten.
    """
    give_back()
    is_reset, record = _reset_peak(), _highest()
    work()
    if is_reset:
        return _kilobytes(_PROC / "self/status", "VmHWM")
    return found if (found := _highest()) > record else None


def _highest() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> bool:
    try:
        (_PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _kilobytes(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def _rooms() -> Iterator[int]:
    """What each control group around this process leaves of its limit; page cache that can be dropped counts as free."""
    try:
        inside = re.search(r"^0::/(.*)$", (_PROC / "self/cgroup").read_text(), re.MULTILINE)
    except OSError:
        return
    path = _CGROUPS / (inside[1] if inside else "")
    for folder in (path, *path.parents):
        if not folder.is_relative_to(_CGROUPS):
            return
        try:
            limit = (folder / "memory.max").read_text().strip()
            taken = int((folder / "memory.current").read_text())
            cache = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        except OSError:  # the root has no limit, and version 1 no such files
            continue
        if limit != "max":
            yield max(0, int(limit) - taken + (int(cache[1]) if cache else 0))
