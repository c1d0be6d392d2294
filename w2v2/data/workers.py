"""What the workers of a `DataLoader` are reading, and what to tell of one that was lost: a decoder that crashes takes its process with it."""

import contextlib
import ctypes
import os
import re
import weakref
from collections.abc import Iterator
from multiprocessing.sharedctypes import RawArray

from torch.utils.data import get_worker_info

TIMEOUT_SECONDS = (
    1_800  # without a micro-batch from a worker: storage that no longer answers, or a decoder that never ends
)
_PATH_BYTES = 4_096
_diaries: "weakref.WeakSet[Diary]" = weakref.WeakSet()  # those of this process's loaders


class _Page(ctypes.Structure):
    _fields_ = (("pid", ctypes.c_long), ("path", ctypes.c_char * _PATH_BYTES))


class Diary:
    """The file that each worker reads at the moment, in shared memory, where it outlives the worker."""

    def __init__(self, num_workers: int):
        self._pages = RawArray(_Page, num_workers)
        _diaries.add(self)

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """While a worker is in it, its page says so; the main process has none."""
        if (worker := get_worker_info()) is None:
            yield
            return
        page = self._pages[worker.id]
        page.pid, page.path = os.getpid(), os.fsencode(path)[: _PATH_BYTES - 1]
        try:
            yield
        finally:
            page.pid = 0

    def entries(self) -> dict[int, str]:
        """Process → path."""
        return {page.pid: os.fsdecode(page.path) for page in self._pages if page.pid}


def explain_loss(error: BaseException) -> str | None:
    """What happened to a worker, what it was reading, the likely cause and the remedy; None for any other error.

    torch raises a bare RuntimeError, from wherever the main process happens to be when the signal of a child's death reaches it.
    """
    text = " ".join(f"{error.__cause__ or ''} {error}".split())  # the cause, where there is one, knows the signal
    reading = {pid: path for diary in list(_diaries) for pid, path in diary.entries().items()}
    if found := re.search(r"DataLoader timed out after ([\d.]+)", text):
        where = f", while reading {' and '.join(reading.values())}" if reading else ""
        return (
            f"no audio came for {float(found[1]):,.0f} s from the processes that decode it{where}: storage that does not answer, or a "
            "file that the decoder never ends with; leave it out of the manifest"
        )
    lost = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (?:is killed by signal: (\w[\w ]*))?", text)
    if not lost:
        return None
    pid, signal = int(lost[1]), lost[2] or ""
    where = f" while reading {reading[pid]}" if pid in reading else ""
    if "egmentation" in signal or "loating" in signal or "Abort" in signal:
        cause = "a damaged file crashed the decoder, so leave it out of the manifest"
    elif "us error" in signal:
        cause = "shared memory ran out (in a container: --shm-size=2g)"
    else:
        cause = "memory ran out, or shared memory (in a container: --shm-size=2g), so use fewer --dataloader_num_workers; or it was killed by hand"
    return (
        f"a process that decodes audio (pid {pid}) was lost{where} ({signal or 'it ended by itself'}): probably {cause}; "
        "--resume_from_checkpoint auto goes on from the last checkpoint"
    )
