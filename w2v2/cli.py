"""The command line of every script: a YAML file and flags in, exit status out.

`pretrain.py CONFIG.yaml --flag value` — the YAML's values are put in front of the command line's, so the command line
wins and both go through the same checks.
"""

import contextlib
import difflib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from torch import distributed
from transformers import HfArgumentParser

import w2v2
from w2v2.data.loader import explain_loss
from w2v2.errors import HUB_TOKEN, LocalError, UserError, as_user_error, error_line
from w2v2.train.launch import Stopped, leave_group

INTERRUPTED = 130  # exit status after a Ctrl-C that nothing else heeded, as of shells
RESUMABLE = 75  # exit status of a run that stopped when asked and can go on (EX_TEMPFAIL of sysexits.h)


class _Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line. It leaves the fields' limits to `check_ranges`."""

    _group: Any = None  # that arguments are added to

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """Flags by their headings: those of a class before those of its subclasses, and the library's last."""
        hints, left = get_type_hints(dtype), {f.name: f for f in fields(dtype) if f.init}
        owners = filter(is_dataclass, reversed(dtype.__mro__))
        for owner in sorted(owners, key=lambda owner: not owner.__module__.startswith("w2v2.")):
            own = {f.name: f for f in fields(owner)}
            heading = f"Further flags of {owner.__name__}"
            for name in filter(left.__contains__, inspect.get_annotations(owner)):
                heading, field = own[name].metadata.get("heading", heading), left.pop(name)
                known = (group for group in self._action_groups if group.title == heading)
                self._group = next(known, None) or self.add_argument_group(heading)
                field.type = hints[name]
                self._parse_dataclass_field(self, field)

    def add_argument(self, *names: str, limits=None, words: dict | None = None, heading=None, **options) -> Any:
        if words:
            options["type"] = lambda text: words[text] if text in words else float(text)
            options["type"].__name__ = f"number or `{'`, `'.join(words)}`"  # argparse names it: invalid … value
        return (self._group or super()).add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _name_unknown(kind: str, names: Iterable[str], known: Sequence[str]) -> str:
    """All of them at once, each with the nearest that there is."""
    told, ending = [], ""
    for name in dict.fromkeys(names):
        close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1, cutoff=0.5)
        told += [f"{name} (did you mean {'--' * (kind == 'flag')}{close[0]}?)" if close else name]
        ending = ending if close else "; --help lists what there is"
    return f"unknown {kind}{'s' * (len(told) > 1)} {', '.join(told)}{ending}"


def _find_yaml(name: str, recipes: str) -> Path:
    """The file itself, or else a shipped one: `configs/pretrain/small.yaml`, or `small` alone."""
    shipped = w2v2.ROOT / "configs" / recipes
    for path in (Path(name), w2v2.ROOT / name, shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise UserError(f"{name}: no such configuration file{names and f', and none of those shipped: {names}'}")


def _yaml_as_flags(path: Path, parser: HfArgumentParser, types: dict[str, Any]) -> list[str]:
    """Command-line form of a flat YAML file; keys are checked here, values by the parser.

    An empty value (`null`, `[]`) has no such form: it becomes the parser's default where the flag can be empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values, written = yaml.safe_load(text) or {}, yaml.BaseLoader(text).get_single_data()  # the latter: texts alone
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `flag: value` lines, found a {type(values).__name__}")
    if unknown := [str(name) for name in values if name not in types]:
        raise UserError(f"{path}: {_name_unknown('key', unknown, list(types))}")
    flags = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: key {name!r} holds a mapping: a flag takes a value or a list")
        if value is None or value == []:
            if not (type(None) in get_args(types[name]) if value is None else get_origin(types[name]) is list):
                raise UserError(f"{path}: key {name!r} has no value: give it one, or leave the key out")
            parser.set_defaults(**{name: value})
        else:
            # YAML reads no, on, 007 and 1:30 as numbers and truth values; a text is what the file says.
            value = written.get(name, value) if _is_text(types[name]) else value
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def _is_text(hint: Any) -> bool:
    """Whether a flag holds text, alone or in a list."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    return hint is str or bool(parts) and all(map(_is_text, parts))


def parse_command_line(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Instances of `dataclass_types` from `[CONFIG.yaml] --flag value …` (default: the process's own arguments).

    Raises `UserError` for unknown flags or keys (with the nearest names), a wrong value, a missing required one.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = dict(allow_abbrev=False, conflict_handler="resolve")
    parser = _Parser(list(dataclass_types), usage="%(prog)s [CONFIG.yaml] [--flag value …]", **options)
    hints = {name: hint for types in dataclass_types for name, hint in get_type_hints(types).items()}
    known = [f.name for types in dataclass_types for f in fields(types) if f.init]
    if argv and not argv[0].startswith("-"):
        path = _find_yaml(argv[0], getattr(dataclass_types[-1], "recipes", ""))
        argv = _yaml_as_flags(path, parser, {name: hints[name] for name in known}) + argv[1:]
    if rest := parser.parse_known_args(argv)[1]:
        if not rest[0].startswith("-"):
            raise UserError(f"unexpected argument {rest[0]!r}: write [CONFIG.yaml] --flag value …, the file first")
        unknown = (word.split("=")[0] for word in rest if re.match("-+[^-\\d.]", word))  # the others are their values
        raise UserError(_name_unknown("flag", unknown, known))
    for index, value in enumerate(argv):
        if HUB_TOKEN.search(value):
            name = next((text.split("=")[0] for text in argv[index::-1] if text.startswith("--")), "an argument")
            raise UserError(
                f"{name} holds what looks like a token of the Hub: flags are written to the run's files; set the "
                "environment variable HF_TOKEN, or call `hf auth login`"
            )
    return tuple(parser.parse_args_into_dataclasses(argv, look_for_args_file=False))


def run_script(main: Callable[[], Any]) -> None:
    """Run an entry point.

    A user's slip, a full disk or memory, or a lost loader process is one line on standard error and status 2; a rank
    that lost another one says so and ends with status 1. `Stopped` gives status 75, or 0 under torchrun's
    `--max_restarts`, which starts other statuses again. A Ctrl-C that nothing else heeded is one line and status 130. Any other error is a bug and keeps its traceback.
    """
    logging.raiseExceptions = False  # a stream that cannot be written any more ends no run
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        main()
    except Stopped as stopped:
        if is_first:
            _print_line(f"{os.path.basename(sys.argv[0])}: {stopped}")
        sys.exit(0 if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0 else RESUMABLE)
    except KeyboardInterrupt:
        _print_line(f"{os.path.basename(sys.argv[0])}: interrupted")
        sys.exit(INTERRUPTED)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        lost = _lost_rank(error)
        message = lost or _explain(error)
        if message is None:
            raise
        # What one rank alone may meet is said by that rank, anything else by the first of its machine.
        if is_first or isinstance(error, LocalError) or not isinstance(error, UserError):
            _print_line(error_line(message))
        sys.exit(1 if lost else 2)
    finally:
        leave_group()
        _flush_streams()


def _print_line(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _lost_rank(error: BaseException) -> str | None:
    """What to say of an exchange that failed because another rank has ended or hangs; None for any other error."""
    text = str(error)
    if not distributed.is_initialized() or not (isinstance(error, distributed.DistError) or "gloo" in text):
        return None
    hangs = "another rank hangs, longer than --ddp_timeout allows" if "imed out" in text else "another rank has ended"
    return (
        f"{hangs} ({text.splitlines()[0].rpartition('] ')[2].split('. ')[0]}): look for the first error among the ranks' "
        "lines; --resume_from_checkpoint auto goes on from the last checkpoint"
    )


def _explain(error: Exception) -> str | None:
    """The line for an error that the user can mend; None for a bug."""
    if isinstance(error, UserError):
        return re.split(r"w2v2\.errors\.\w+: ", str(error))[-1].strip()  # a loader's worker sends its traceback along
    if found := _memory_error(error):
        return (
            f"{found} Use a smaller --micro_batch_seconds (pretrain.py: or `auto`), a smaller "
            "--per_device_train_batch_size or --eval_micro_batch_seconds (fine-tuning) or --gradient_checkpointing; the "
            "run goes on with --resume_from_checkpoint auto"
        )
    if isinstance(error, OSError):
        return (found := as_user_error(error)) and str(found)
    return explain_loss(error)


def _memory_error(error: Exception) -> str | None:
    """What an accelerator, torch's and numpy's allocators on the CPU, and the system say where memory is out."""
    text = str(error).strip() or "no memory is left"
    if type(error).__name__ == "OutOfMemoryError":
        return text.splitlines()[0]
    marks = ("can't allocate memory", "Cannot allocate memory", "MemoryError")  # in a worker's traceback, too
    if isinstance(error, MemoryError) or any(mark in text for mark in marks):
        return f"Out of memory on the CPU: {text.splitlines()[-1].rpartition('Error: ')[2].rstrip('.')}."
    return None


def _flush_streams() -> None:
    """Flush; a dead stream goes nowhere from now on, as its last flush would change the exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
