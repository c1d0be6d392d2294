"""What a user can get wrong: errors that read as one line, and flags that know the range of their values.

An error names the file, row or flag, says what was found and what to do.
"""

import argparse
import difflib
import errno
import logging
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger(__name__)

HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}")
# Parts of a URL, whose second slash a `Path` drops; a query ends before a sentence's punctuation.
_LOGIN = re.compile(r"(?<=\w\w:/)(/?)[^\s/]*@")
_QUERY = re.compile(r"(?<=\w\w:/)([^\s?]*\?)\S*?(?=[:;,.)'\"\]]*(?:\s|$))")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
LIMITS = {
    "min": (operator.ge, "{:.15g} or more"),
    "above": (operator.gt, "greater than {:.15g}"),
    "max": (operator.le, "{:.15g} or less"),
    "below": (operator.lt, "less than {:.15g}"),
}
LARGEST = 1e15  # of any flag: what is larger, infinity among it, cannot be counted exactly
SEEDS = dict(min=0, max=2**32 - 1)

# Ranges of what scripts inherit from `transformers.TrainingArguments`.
INHERITED = {
    **dict.fromkeys(("adam_beta1", "adam_beta2"), dict(min=0, below=1)),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), dict(above=0)),
    **dict.fromkeys(("weight_decay", "neftune_noise_alpha", "eval_delay"), dict(min=0)),
    **dict.fromkeys(("eval_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps"), dict(min=1)),
    **dict.fromkeys(("seed", "data_seed"), SEEDS),
    "adam_epsilon": dict(min=1e-20, max=1),  # below it float32 divides by zero
    "label_smoothing_factor": dict(min=0, below=1),
    "ddp_bucket_cap_mb": dict(min=1),
    "ddp_timeout": dict(min=1, max=1e8),
    "local_rank": dict(min=-1),
}


class UserError(ValueError):
    """Something that the user can mend. The scripts turn it into exit status 2 and one line, without a traceback."""


class LocalError(UserError):
    """A `UserError` that one process of several may meet alone, so that it prints the line whichever rank it is."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.5) -> str:
    """The nearest of what there is, as a question, or `otherwise` where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else otherwise


def printable(text: object) -> str:
    """The text with line breaks, terminal codes and undecodable bytes as escapes, as in `repr`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def hide_secrets(text: str) -> str:
    """The text without tokens of the Hub, and its URLs without name, password and query."""
    return _QUERY.sub(r"\1…", _LOGIN.sub(r"\1", HUB_TOKEN.sub("hf_…", text)))


def error_line(message: object) -> str:
    """`script.py: error: …`, the line that a script ends with. Secrets are blotted out."""
    return printable(hide_secrets(f"{Path(sys.argv[0]).name}: error: {message}"))


def as_user_error(error: OSError) -> UserError | None:
    """A full, failing or read-only disk as a `UserError`; None for any other error, which may be a bug."""
    if error.errno not in DISK_ERRORS:
        return None
    return UserError(
        f"{error.filename or 'a file'}: {error.strerror}; free space or mend the disk, then start again (a run goes on with "
        "--resume_from_checkpoint auto)"
    )


def make_output_dir(folder: Path) -> None:
    """Raises UserError where there can be none: a file in its way, no permission, a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be made ({error.strerror}): give another folder") from None


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and error numbers; its type's name where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def tell(line: str) -> None:
    """Log a warning for people, on the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", hide_secrets(line))


def flag(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    words: dict[str, Any] | None = None,
    heading: str | None = None,
    **limits: float,
) -> Any:
    """A field for `cli.parse_command_line`. `limits` are some of `LIMITS`; None is always allowed.

    `words` are texts that stand for values. `heading` is, in --help, that of this flag and of those after it.
    """
    metadata = {"help": help, "limits": limits} | ({"heading": heading} if heading else {})
    metadata |= ({"choices": list(choices)} if choices else {}) | ({"words": words} if words else {})
    start = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**start, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """A script's docstring as it is written, and each flag's default. A slip is a `UserError`."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=self.Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def number(kind: type, **limits: float) -> Callable[[str], float]:
    """Parser of a number within limits, as argparse's `type`."""

    def parse(text: str) -> float:
        if missed := missed_range(kind(text), limits):
            raise argparse.ArgumentTypeError(f"{text}: it has to be {missed}")
        return kind(text)

    parse.__name__, parse.limits = kind.__name__, limits  # argparse names it: invalid int value
    return parse


def missed_range(value: float, limits: Mapping[str, float]) -> str | None:
    """What a number would have to be; None where it is. NaN and infinity are in no range."""
    for name, limit in {**limits, "max": limits.get("max", LARGEST)}.items():
        holds, bound = LIMITS[name]
        if not holds(value, limit):  # nothing holds for NaN
            return bound.format(limit)
    return None


def check_ranges(args: Any) -> None:
    """Raises `UserError` for the first flag of a dataclass instance whose value lies outside of its range."""
    for one in fields(args):
        values, limits = getattr(args, one.name), one.metadata.get("limits") or INHERITED.get(one.name, {})
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int | float) and (missed := missed_range(value, limits)):
                others = "".join(f", or `{word}`" for word in one.metadata.get("words", ()))
                raise UserError(f"--{one.name} is {value:g}: it has to be {missed}{others}")


def refuse(*slips: tuple[Any, str]) -> None:
    """Raises UserError for the first of some slips that was made; each is a condition and its message."""
    for is_made, message in slips:
        if is_made:
            raise UserError(message)


def take_back(args: Any, *names: str) -> None:
    """Make an empty text or `none` None: a command line takes back what a YAML file says."""
    for name in names:
        if getattr(args, name) in ("", "none"):
            setattr(args, name, None)
