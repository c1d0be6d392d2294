"""Writes the page: one HTML file that asks nothing of the network and runs no script."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import w2v2
from w2v2.errors import UserError, hide_secrets, one_line
from w2v2.finetune.stock_flags import default_of
from w2v2.report.comparison import compare_runs
from w2v2.report.finetuning import report_finetuning
from w2v2.report.pretraining import report_pretraining
from w2v2.report.probing import report_probe, report_verification
from w2v2.report.run_files import PRETRAINING, PROBE, VERIFICATION, name_runs, read_run
from w2v2.report.sections import Section, Summary
from w2v2.train.durable import write_file
from w2v2.train.events import EventLog
from w2v2.train.log import STREAM_MAY_DIE

REPORT_FILE = "report.html"
MOST_BYTES = 1_900_000  # of a page of several runs
TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    folders: Sequence[str | os.PathLike], output: str | os.PathLike, defaults: Mapping[str, Any], num_audio: int = 0
) -> None:
    """Write the page of these runs. `defaults` are those of pretrain.py's flags; `num_audio` utterances can be heard.

    Raises `UserError` for a folder that holds no run, and for a page that cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    name_runs(runs)
    report = {PROBE: report_probe, VERIFICATION: report_verification}
    report[PRETRAINING] = partial(report_pretraining, defaults=defaults)
    summaries = [report.get(run.kind, partial(report_finetuning, num_audio=num_audio))(run) for run in runs]
    comparison = compare_runs(runs, summaries)
    page = render(summaries, comparison)
    if len(page) > MOST_BYTES and len(runs) > 1:
        for summary in summaries:
            summary.sections = []
            summary.remarks.append("Its own charts are left out, as the page would pass 2 MB: make its own report.")
        page = render(summaries, comparison)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_file(Path(output), page)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): name another file with --output") from None


def render(summaries: Sequence[Summary], comparison: Sequence[Section] = ()) -> bytes:
    """The page in UTF-8. Whatever was written by people is escaped, and has no secrets."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: hide_secrets(value) if type(value) is str else value,  # what macros return is no str
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        summaries=summaries, comparison=comparison, is_comparison=len(summaries) > 1, version=w2v2.__version__
    )
    return page.encode("utf-8", "backslashreplace")


@contextlib.contextmanager
def report_at_end(args, events: EventLog) -> Iterator[None]:
    """Write `output_dir/report.html` when the block ends, however it does, if the run had begun by then."""
    try:
        yield
    finally:
        if events.has_begun:
            report_run(args)


def find_defaults(flags: type) -> dict[str, Any]:
    """The defaults of a dataclass of flags."""
    return {one.name: default_of(one) for one in fields(flags)}


def report_run(args) -> None:
    """Write `output_dir/report.html`, or say in one line why there is none: a page that fails ends no run.

    `args` are a dataclass of flags, those of pretrain.py among them.
    """
    path = Path(args.output_dir, REPORT_FILE)
    try:
        write_report([args.output_dir], path, find_defaults(type(args)))
        said = f"report        {path}"
    except Exception as error:
        said = f"warning       {REPORT_FILE} was not written: {one_line(error)}"
    with STREAM_MAY_DIE:
        print(said, flush=True)
