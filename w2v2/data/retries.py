"""Errors that pass by themselves, as of a server that does not answer or of too many open files: another try, a little later."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
PAUSES = (1.0, 4.0)  # seconds before another try
# Of a file that exists: a stale or slow file server, a failing disk, too many open files, no memory.
PASSING = frozenset((errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM))


def is_passing(error: BaseException) -> bool:
    """Whether an error of reading audio (any with an `errno`) says nothing of the file itself."""
    return getattr(error, "errno", None) in PASSING


def warn(error: Exception, pause: float) -> None:
    logger.warning("%s; tried again in %g s", error, pause)


def retried(
    read: Callable[[], T], passes: Callable[[Exception], bool], tell: Callable[[Exception, float], object] = warn
) -> T:
    """What `read` returns. An error for which `passes` is told, with the pause that follows, and `read` called again; the last one is raised."""
    for pause in PAUSES:
        try:
            return read()
        except Exception as error:
            if not passes(error):
                raise
            tell(error, pause)
        time.sleep(pause)
    return read()
