"""The end of a process that was one of several: it must neither hang nor crash after its work is done."""

import time

from torch import distributed

SETTLE_SECONDS = 0.1


def settle() -> None:
    """Call after the last exchange between processes, before the group is destroyed or the interpreter ends; does nothing without a group.

    A thread of gloo's may still hold the tensors of an exchange that is over. To let go of them it needs the interpreter's lock, which the
    group's destructor holds while it waits for that thread, for ever (pytorch issue 56297), and which an ending interpreter
    no longer gives: the process aborts. So the lock is left to it for a moment first, many times what it takes.
    """
    if distributed.is_available() and distributed.is_initialized():
        time.sleep(SETTLE_SECONDS)
