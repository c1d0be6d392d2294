"""Everything that wants a GPU, measured in one go of under ten minutes, as a section of docs/performance.md.

    python benchmarks/gpu_session.py                     # on a GPU; appends to docs/performance.md
    python benchmarks/gpu_session.py --session second    # what did not fit into the first
    python benchmarks/gpu_session.py --list              # the steps, and how long each should take on an H200
    python benchmarks/gpu_session.py --dry_run           # the same steps with tiny shapes on any CPU, printed only

One process does the steps in turn, so that it starts once. A step that fails, or takes longer than its limit, is
reported, and the others go on in a new process. The section so far is written after each.
"""

import gc
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import levers
import pandas
import torch
import update
from common import ROOT, environment, make_parser, print_table
from gpu_steps import SESSIONS, START, UPDATES, Step, words

from w2v2.train.update import accumulate

# -- ways to measure: what each finds is a table's `row`, a column of `stages`, or `text`


def measure_update(flags: list[str]) -> dict:
    """Updates of one effective batch again and again: another would take as long."""
    args, contender = start(flags)
    contender.prepare("librispeech", 0)
    updates = [contender.timed_run() for _ in range(1 + UPDATES)][1:]
    found = update.describe(args, updates, is_ours=args.sides[0][1] in update.PROGRAM)
    heard, mfu = found["audio_seconds_per_second"], [found["mfu"], found["mfu_executed"]]
    row = [*(f"{heard[name]:,.0f}" for name in ("median", "min", "max")), f"{found['peak_gb']:.1f}"]
    row += ["" if share is None else f"{share:.1%}" for share in mfu]
    return {"row": row} | ({"stages": contender.stage_table()} if args.profile else {})


def measure_parity(flags: list[str]) -> dict:
    """Gradients of an update with the graph against those without, and of two updates without."""
    _, contender = start(flags)
    contender.prepare("librispeech", 0)
    found = []
    for step in (contender.model, contender.model, contender.passes):
        contender.model.zero_grad()
        totals, _ = accumulate(contender.accelerator, step, contender.batches, contender.settings)
        found.append((totals.sums.loss, torch.cat([p.grad.flatten() for p in contender.model.parameters()])))
    (loss, gradient), *others = found
    lines = []
    for name, (other, own) in zip(("eager again", "captured"), others, strict=True):
        apart = float((own - gradient).norm() / gradient.norm())
        lines.append(
            f"{name}: loss {float(other / loss) - 1:+.1e}, gradient {apart:.1e} of its norm from the eager one"
        )
    return {"text": "\n".join(lines)}


def measure_levers(flags: list[str]) -> dict:
    args = update.parse(flags)
    size = (0.64, 16) if args.device == "cpu" else (args.micro_batch_seconds,)
    rows = levers.measure(torch.device(args.device), *size)
    table = pandas.DataFrame(rows, columns=["", "µs", "µs a second of audio", "rate"])
    return {"text": table.to_string(index=False, float_format=lambda x: f"{x:,.1f}")}


def start(flags: list[str]):
    """The parsed flags, and their one contender in this process."""
    args = update.parse(flags)
    (_, name, args.precision, _), = args.sides  # fmt: skip
    return args, update.start_contender(name, args)


WAYS = {"update": measure_update, "parity": measure_parity, "levers": measure_levers}


def work(connection) -> None:
    """A process that measures: answers (way, flags) with what it found and None, or with nothing and the error."""
    for way, flags in iter(connection.recv, None):
        try:
            answer = WAYS[way](flags), None
        except Exception as error:
            answer = {}, f"{type(error).__name__}: {error}".splitlines()[0]
        connection.send(answer)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Worker:
    """Measures steps in a process of its own, and in a new one after a step that failed."""

    process = None

    def ask(self, step: Step, flags: list[str], seconds: float) -> tuple[dict, str | None]:
        """What a step found, and why there is nothing."""
        if step.way == "script":
            return run_script(flags, seconds)
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=work, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.connection.send((step.way, flags))
        try:
            found, error = (
                self.connection.recv() if self.connection.poll(seconds) else ({}, f"stopped after {seconds:.0f} s")
            )
        except EOFError:
            found, error = {}, "the process was lost"
        if error:
            self.end()
        return found, error

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
        self.process = None


def run_script(flags: list[str], seconds: float) -> tuple[dict, str | None]:
    """A script's tables; its last line is JSON."""
    command = [sys.executable, str(Path(__file__).with_name(flags[0])), *flags[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {}, f"stopped after {seconds:.0f} s"
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"text": done.stdout.strip().rpartition("\n")[0].strip()}, None


# -- all of it


class Section:
    """A session's part of the document, as far as it is known."""

    def __init__(self, name: str):
        here = environment()
        versions = ", ".join(f"{package} {number}" for package, number in here["versions"].items())
        self.head = f"\n## {here['date'][:10]}, {here['gpu'] or here['cpu']}, {name} session\n\n`{here['command']}`; {versions}."
        self.rows, self.stages, self.notes = [], {}, []

    def add(self, step: Step, found: dict, error: str | None, seconds: float) -> None:
        self.rows.append([step.title, f"{seconds:.0f}", *found.get("row", [error or "below"])])
        if "stages" in found:
            self.stages[step.title] = found["stages"]
        if "text" in found:
            self.notes.append(f"**{step.title}** (`{step.flags}`)\n\n```\n{found['text']}\n```\n")

    def __str__(self) -> str:
        head = ["step", "took s", "audio-s/s", "least", "most", "peak GB", "MFU", "executed"]
        parts = [self.head + "\n", table(head, self.rows)]
        if self.stages:
            names = next(iter(self.stages.values()))
            rows = [[name, *(f"{stages[name]:.1f}" for stages in self.stages.values())] for name in names]
            parts += ["Microseconds for each second of audio, one micro-batch of equal lengths:\n"]
            parts += [table(["stage", *self.stages], rows)]
        return "\n".join([*parts, *self.notes])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show_expected(steps: tuple[Step, ...]) -> None:
    rows, total = [["start", START, START, ""]], START
    for step in steps:
        total += step.expected()
        rows.append([step.title, step.expected(), total, step.flags])
    print_table(rows, ["step", "seconds", "until then", "flags"])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--session", default="first", choices=list(SESSIONS), help="which steps")
    parser.add_argument("--list", action="store_true", help="say what is measured and how long it should take")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on the CPU, nothing written")
    parser.add_argument("--minutes", type=float, default=9.5, help="no step begins that would end after this")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md", help="where to append")
    args = parser.parse_args()
    steps = SESSIONS[args.session]
    if args.list:
        return show_expected(steps)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is at hand: --dry_run tries the steps on the CPU")
    deadline, worker, all_went_well = time.monotonic() + 60 * args.minutes, Worker(), True
    section, before = Section(args.session), args.output.read_text(encoding="utf-8") if not args.dry_run else ""
    for step in steps:
        started = time.monotonic()
        if started + step.expected() > deadline:
            found, error = {}, "not begun: the time was up"
        else:
            limit = min(deadline - started, step.limit() if not args.dry_run else 600)
            found, error = worker.ask(step, words(step, args.dry_run), limit)
        all_went_well &= error is None
        section.add(step, found, error, time.monotonic() - started)
        print(f"{step.title}: {error or found}", flush=True)
        if not args.dry_run:
            args.output.write_text(before + str(section), encoding="utf-8")
    worker.end()
    print(section)
    sys.exit(not all_went_well)


if __name__ == "__main__":
    main()
