"""The one exception that stands for a user's slip rather than for a bug, and errors of a disk, which are of its kind."""

import errno
import re
import sys
from pathlib import Path

HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class UserError(ValueError):
    """Something that the user can mend: the message names the file, row or flag, says what was found and what to do.

    The entry points turn it into exit status 2 and one line on standard error, without a traceback.
    """


class LocalError(UserError):
    """One that a single process of several may meet, so that it says the line itself, whichever it is."""


def printable(text: object) -> str:
    """Text for a line on the console: line breaks, terminal codes and what is no text at all as escapes, as in `repr`, the rest as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def error_line(message: object) -> str:
    """`script.py: error: …`: what a script ends with on standard error. One line, without a token of the Hub."""
    return printable(HUB_TOKEN.sub("hf_…", f"{Path(sys.argv[0]).name}: error: {message}"))


def as_user_error(error: OSError) -> UserError | None:
    """The same for a disk that is full, failing or read-only; None for any other error, which may be a bug."""
    if error.errno not in _OF_THE_DISK:
        return None
    return UserError(
        f"{error.filename or 'a file'}: {error.strerror}; free space or mend the disk, then start again (a run goes on with "
        "--resume_from_checkpoint auto)"
    )


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and numbers of errors; its type's name where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
