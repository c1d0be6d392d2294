"""The one exception that stands for a user's slip rather than for a bug."""


class UserError(ValueError):
    """Something that the user can mend: the message names the file, row or flag, says what was found and what to do.

    The entry points turn it into exit status 2 and one line on standard error, without a traceback.
    """


def printable(text: object) -> str:
    """Text for a line on the console: line breaks, terminal codes and what is no text at all as escapes, as in `repr`, the rest as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
