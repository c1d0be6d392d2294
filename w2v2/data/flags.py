"""Flags: dataclass fields that carry their help text and the range of their values."""

import operator
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from w2v2.errors import UserError

LIMITS = {"min": (operator.ge, "or more"), "above": (operator.gt, "greater than"), "max": (operator.le, "or less")}


def flag(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    words: dict[str, Any] | None = None,
    **limits: float,
) -> Any:
    """A field for `cli.parse_command_line`. `limits`: `min`, `above` (greater than) and `max`; None is always allowed.

    `words` are texts that stand for values.
    """
    metadata = {"help": help, "limits": limits}
    metadata |= ({"choices": list(choices)} if choices else {}) | ({"words": words} if words else {})
    start = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**start, metadata=metadata)


def check_ranges(args: Any) -> None:
    """Raises `UserError` for the first flag of a dataclass instance whose value lies outside of its range, or is NaN."""
    for one in fields(args):
        value = getattr(args, one.name)
        for name, limit in one.metadata.get("limits", {}).items() if value is not None else ():
            holds, bound = LIMITS[name]
            if not holds(value, limit):  # nothing holds for NaN
                bound = f"{bound} {limit:.15g}" if name == "above" else f"{limit:.15g} {bound}"
                others = "".join(f", or `{word}`" for word in one.metadata.get("words", ()))
                raise UserError(f"--{one.name} is {value:g}: it has to be {bound}{others}")


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
