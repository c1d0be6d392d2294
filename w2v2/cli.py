"""The command line of every script: a YAML file and flags in, exit status out.

`pretrain.py CONFIG.yaml --flag value` — the YAML's values are put in front of the command line's, so the command line wins
and both go through the same checks.
"""

import contextlib
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from w2v2.data.loader import explain_loss
from w2v2.errors import HUB_TOKEN, LocalError, UserError, as_user_error, error_line
from w2v2.train import console, heartbeat
from w2v2.train.stop import Stopped, leave
from w2v2.train.teardown import settle


class _Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line. It leaves the fields' limits to `check_ranges`."""

    def add_argument(self, *names: str, limits: dict | None = None, **options) -> Any:
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else "; --help lists what there is"


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `flag: value` lines, found a {type(values).__name__}")
    return values


def _yaml_as_flags(path: str, parser: HfArgumentParser, types: dict[str, Any]) -> list[str]:
    """Command-line form of a flat YAML file; keys are checked here, values by the parser.

    An empty value (`null`, `[]`) has no such form: it becomes the parser's default where the flag can be empty.
    """
    flags = []
    for name, value in _read_yaml(path).items():
        if name not in types:
            raise UserError(f"{path}: unknown key {name!r}{_nearest(str(name), list(types))}")
        if isinstance(value, dict):
            raise UserError(f"{path}: key {name!r} holds a mapping: a flag takes a value or a list")
        if value is None or value == []:
            if not (type(None) in get_args(types[name]) if value is None else get_origin(types[name]) is list):
                raise UserError(f"{path}: key {name!r} has no value: give it one, or leave the key out")
            parser.set_defaults(**{name: value})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse_command_line(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Instances of `dataclass_types` from `[CONFIG.yaml] --flag value …` (default: the process's own arguments).

    Raises `UserError` for an unknown flag or key (with the nearest name), a value of the wrong kind, a missing required one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        list(dataclass_types),
        allow_abbrev=False,
        usage="%(prog)s [CONFIG.yaml] [--flag value …]",
        conflict_handler="resolve",
    )
    hints = {name: hint for types in dataclass_types for name, hint in get_type_hints(types).items()}
    known = [f.name for types in dataclass_types for f in fields(types) if f.init]
    if argv and not argv[0].startswith("-"):
        argv = _yaml_as_flags(argv[0], parser, {name: hints[name] for name in known}) + argv[1:]
    rest = parser.parse_known_args(argv)[1]
    if rest:
        if not rest[0].startswith("-"):
            raise UserError(f"unexpected argument {rest[0]!r}: write [CONFIG.yaml] --flag value …, the file first")
        name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        raise UserError(f"unknown flag {rest[0].split('=')[0]}{_nearest(name, known)}")
    _refuse_tokens(argv)
    instances = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    return tuple(instances)


def _refuse_tokens(argv: Sequence[str]) -> None:
    """A flag's value is printed, logged and written to the run's files, where a token must never stand."""
    for index, value in enumerate(argv):
        if HUB_TOKEN.search(value):
            flags = [text.split("=")[0] for text in argv[: index + 1] if text.startswith("--")]
            raise UserError(
                f"{flags[-1] if flags else 'an argument'} holds what looks like a token of the Hub: flags are written to the run's "
                "files; set the environment variable HF_TOKEN, or call `hf auth login`"
            )


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """A device's memory that does not suffice is a setting to change: the same batches would not fit at the next attempt either.

    After an hour of work it is not: memory that is fragmented, or another program's, is worth another attempt.
    """
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        is_full = type(error).__name__ == "OutOfMemoryError"  # torch's; torch itself need not be loaded
        if not is_full or time.monotonic() - started > 3600:
            raise
        first = str(error).strip().splitlines()[0]
        raise LocalError(f"{first} Give a device less at once: a smaller --micro_batch_seconds (pretrain.py: or `auto`), "
                         "--per_device_train_batch_size (fine-tuning) or --gradient_checkpointing; the run goes on with "
                         "--resume_from_checkpoint auto") from error  # fmt: skip


@console.outlived()
def run_script(main: Callable[[], Any]) -> None:
    """Run an entry point: a `UserError` ends it with exit status 2 and one line on standard error; so does a lost worker of a loader.

    `Stopped` ends it with 75, or with 0 under a launcher that would start it again (`leave`). A console that cannot be written any more changes none of these.
    """
    try:
        with heartbeat.explained(), _memory_explained():
            main()
    except Stopped as stopped:
        leave(stopped)
    except (UserError, OSError, RuntimeError) as error:
        lost = explain_loss(error)
        found = as_user_error(error) if isinstance(error, OSError) else error
        if lost is None and not isinstance(found, UserError):
            raise
        # A UserError raised in a loader's worker brings its traceback along.
        message = lost or str(found).rpartition("UserError: ")[2].strip()
        if lost or isinstance(found, LocalError) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(error_line(message), file=sys.stderr)
        sys.exit(2)
    finally:
        settle()
