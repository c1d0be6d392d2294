"""Reads that fail for a while, as of a server that does not answer or with too many open files: tried again shortly."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from w2v2.data.retries import PAUSES, retried
from w2v2.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def patiently(read: Callable[[], T], path: Path) -> T:
    """What `read` returns; an `OSError` is a warning, and `read` is called again.

    Raises `UserError` that names the file (`path` where the error names none) if that does not help, but EIO, which is a disk's, as it is.
    """

    def tell(error: OSError, pause: float) -> None:
        logger.warning("%s: %s; tried again in %g s", error.filename or path, error.strerror, pause)

    try:
        return retried(read, lambda error: isinstance(error, OSError), tell)
    except OSError as error:
        if error.errno == errno.EIO:
            raise
        raise UserError(
            f"{error.filename or path} cannot be read ({error.strerror}), tried {len(PAUSES) + 1} times; "
            "nothing was changed: start again when it can be"
        ) from None
