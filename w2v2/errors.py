"""Errors that a user can mend, and how they read: one line that names the file, row or flag, says what was found and
what to do.
"""

import errno
import re
import sys
from pathlib import Path

HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class UserError(ValueError):
    """Something that the user can mend. The scripts turn it into exit status 2 and one line, without a traceback."""


class LocalError(UserError):
    """A `UserError` that one process of several may meet alone, so that it prints the line whichever rank it is."""


def printable(text: object) -> str:
    """The text with line breaks, terminal codes and undecodable bytes as escapes, as in `repr`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def error_line(message: object) -> str:
    """`script.py: error: …`, the line that a script ends with. A token of the Hub is blotted out."""
    return printable(HUB_TOKEN.sub("hf_…", f"{Path(sys.argv[0]).name}: error: {message}"))


def as_user_error(error: OSError) -> UserError | None:
    """A full, failing or read-only disk as a `UserError`; None for any other error, which may be a bug."""
    if error.errno not in DISK_ERRORS:
        return None
    return UserError(
        f"{error.filename or 'a file'}: {error.strerror}; free space or mend the disk, then start again (a run goes on with "
        "--resume_from_checkpoint auto)"
    )


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and error numbers; its type's name where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
