"""The `DataLoader` whose workers decode micro-batches ahead of time, and what is said when it loses one of them."""

import os
import re
import signal
import threading
from collections.abc import Iterable

from torch.utils.data import DataLoader, Dataset

from w2v2.data.batching import MicroBatchPlan

TIMEOUT_SECONDS = 1_800  # without a micro-batch from a worker: hung storage, or a decoder that never ends


def build_loader(
    dataset: Dataset, plans: Iterable[MicroBatchPlan], num_workers: int, prefetch_factor: int, pin_memory: bool
) -> DataLoader:
    """A loader that decodes the micro-batches of `plans` ahead of time, in their order."""
    options = dict(batch_size=None, sampler=plans, num_workers=num_workers, pin_memory=pin_memory)
    if num_workers:
        options |= dict(prefetch_factor=prefetch_factor, worker_init_fn=shield_worker, timeout=TIMEOUT_SECONDS)
    return DataLoader(dataset, persistent_workers=num_workers > 0, **options)


def end_workers(loader: Iterable) -> None:
    """End the processes that decode at once.

    The garbage collector would close their queues while a thread of theirs does, and so perhaps files of others.
    """
    iterator = getattr(loader, "_iterator", None)  # of persistent workers; torch has no public names for this
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


def shield_worker(worker: int) -> None:
    """Keep a worker alive when a scheduler or a terminal signals every process of the run: the last update needs it.

    A SIGTERM from its own parent ends it, which is the loader's last resort. It also ends when its parent is gone.
    """

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    for name in ("SIGUSR1", "SIGHUP", "SIGINT"):  # Slurm's warning, a closed terminal, Ctrl-C
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey_parent, name="sigterm", daemon=True).start()


def explain_loss(error: BaseException) -> str | None:
    """One line for a worker that was lost or hangs, with the likely cause and the remedy; None for any other error.

    torch raises a bare RuntimeError from wherever the main process is when it hears of its child's death.
    """
    text = " ".join(f"{error.__cause__ or ''} {error}".split())  # the cause, where there is one, knows the signal
    if hung := re.search(r"DataLoader timed out after ([\d.]+)", text):
        return (
            f"no audio came for {float(hung[1]):,.0f} s from the processes that decode it: the storage does not "
            "answer, or a damaged file keeps the decoder busy"
        )
    lost = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)[\d, ]*\) (?:is killed by signal: (\w[\w ]*))?", text)
    if not lost:
        return None
    how = lost[2] or "it ended by itself"
    cause = "memory ran out, or shared memory (in a container: --shm-size=2g): use fewer --dataloader_num_workers"
    if re.search("egmentation|loating|Abort", how):
        cause = "a damaged file crashed the decoder: find it and leave it out of the manifest"
    return (
        f"a process that decodes audio (pid {lost[1]}) was lost ({how}): probably {cause}; "
        "--resume_from_checkpoint auto goes on from the last checkpoint"
    )
