"""Flags: dataclass fields that carry their help text and the range of their values."""

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from w2v2.errors import UserError


def flag(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    choices: Sequence[str] | None = None,
    words: dict[str, Any] | None = None,
) -> Any:
    """A field for `cli.parse_command_line`, which is an `HfArgumentParser`.

    Values are at least `min`, greater than `above`, at most `max`; None is always allowed. `words` are texts that stand
    for values.
    """
    limits = {name: limit for name, limit in (("min", min), ("above", above), ("max", max)) if limit is not None}
    metadata = {"help": help, "limits": limits}
    metadata |= ({"choices": list(choices)} if choices else {}) | ({"words": words} if words else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(args: Any) -> None:
    """Raises `UserError` for the first flag of a dataclass instance whose value lies outside of its range, or is NaN."""
    for one in fields(args):
        limits, value = one.metadata.get("limits", {}), getattr(args, one.name)
        if value is None or not limits:
            continue
        found = None
        # Comparisons with NaN are false, so NaN is refused.
        if "min" in limits and not value >= limits["min"]:
            found = f"{limits['min']:g} or more"
        elif "above" in limits and not value > limits["above"]:
            found = f"greater than {limits['above']:g}"
        elif "max" in limits and not value <= limits["max"]:
            found = f"{limits['max']:.15g} or less"
        if found:
            words = "".join(f", or `{word}`" for word in one.metadata.get("words", ()))
            raise UserError(f"--{one.name} is {value:g}: it has to be {found}{words}")
