"""The one exception that stands for a user's slip rather than for a bug."""


class UserError(ValueError):
    """Something that the user can mend: the message names the file, row or flag, says what was found and what to do.

    The entry points turn it into exit status 2 and one line on standard error, without a traceback.
    """
