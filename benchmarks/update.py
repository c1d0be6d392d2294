"""A whole update of this program against other loops, on the same utterances, in turns: audio heard a second, memory,
FLOPs.

    python benchmarks/update.py                                  # BASE; on two CPU cores more than an hour
    python benchmarks/update.py --config_name large --micro_batch_seconds 200 --batch_seconds 1600     # on a GPU
    python benchmarks/update.py --contenders ours:bf16 ours stock:bf16 stock      # other than bf16 on a GPU, else fp32
    python benchmarks/update.py --contenders ours:2 ours         # two processes against one
    python benchmarks/update.py --profile                        # and where the time goes, stage by stage

Each side lives in processes of its own (so that its peak of memory is its own), and they take turns, now one first, now
the other. On a CPU the ratio is of audio-seconds a CPU-second, which other programs disturb least; on a GPU of
audio-seconds a second. A side's ratio is how many times as fast the first one was. Lengths `librispeech`: utterances
of LibriSpeech's lengths; `equal`: all of one length, where there is nothing to pad. MFU counts the formula's
operations, `MFU executed` those that this program executes (`flops.py`). `--contenders ours without --without
flat_convs` shows what one lever is worth.
"""

import argparse
import copy
import functools
import importlib
import os
import re
from importlib.util import find_spec

import torch
from accelerate.utils.other import get_free_port
from common import environment, fresh_process, make_parser, median_spread, print_json, print_table
from contenders import LEVERS
from flops import executed_flops, model_flops, peak_flops

from w2v2.arguments import PretrainArguments
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.model.loading import build_config

CONTENDERS = {  # name → module and class
    "ours": ("contenders", "Ours"),
    "without": ("contenders", "Without"),
    "stock": ("stock_loop", "Stock"),
    "stock_tuned": ("stock_loop", "StockTuned"),
    "speechbrain": ("speechbrain_loop", "SpeechBrain"),
}
PROGRAM = ("ours", "without")
SPECIFICATION = "NAME[:fp32|bf16][:PROCESSES]"
FLAGS = (
    "config_name",
    "config_overrides",
    "gradient_checkpointing",
    "torch_compile",
    "fused_kernels",
    "cuda_graph",
    "positional_conv",
)


def parse(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    gpu = torch.cuda.is_available()
    micro_batch, update = (200.0, 1600.0) if gpu else (47.0, 240.0)
    parser.add_argument("--config_name", default="base", help="base, large, or any other configuration")
    parser.add_argument("--config_overrides", help="as in pretrain.py")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of updates (after one to warm up)")
    parser.add_argument("--batch_seconds", type=float, default=update, help="speech in an update")
    parser.add_argument("--micro_batch_seconds", type=float, default=micro_batch, help="of audio at a time")
    parser.add_argument("--crop_seconds", type=float, default=15.38)
    parser.add_argument("--length_grid_seconds", type=float, default=0.32, help="ours only")
    parser.add_argument("--lengths", nargs="+", default=["librispeech", "equal"], choices=["librispeech", "equal"])
    parser.add_argument(
        "--contenders", nargs="+", default=["ours", "stock", "stock_tuned"], metavar=SPECIFICATION,
        help=f"sides, the first against each other one: {', '.join(CONTENDERS)}",
    )  # fmt: skip
    parser.add_argument("--tuned_micro_batch_seconds", type=float, help="of stock_tuned: the most that fits")
    parser.add_argument("--without", choices=list(LEVERS), help="lever that the contender `without` lacks")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of the transformer, ours and stock")
    parser.add_argument("--torch_compile", action="store_true", help="ours only")
    parser.add_argument("--fused_kernels", action="store_true", help="ours only")
    parser.add_argument("--cuda_graph", action="store_true", help="ours only")
    parser.add_argument("--positional_conv", default="auto", choices=["auto", "blocks", "stock"], help="ours only")
    parser.add_argument("--profile", action="store_true", help="time the stages of one micro-batch, too")
    args = parser.parse_args(argv)
    args.sides = []
    for words in args.contenders:
        found = re.fullmatch(r"(\w+?)(?::(fp32|bf16))?(?::(\d+))?", words)
        name, precision, processes = found.groups() if found else (None, None, None)
        if name not in CONTENDERS:
            parser.error(f"--contenders {words}: {SPECIFICATION}, NAME one of {', '.join(CONTENDERS)}")
        if processes and name not in PROGRAM:
            parser.error(f"--contenders {words}: only {' and '.join(PROGRAM)} run in several processes")
        if name == "speechbrain" and not find_spec("speechbrain"):
            parser.error("--contenders speechbrain: the package is missing: pip install speechbrain")
        args.sides.append(
            (words, name, precision or ("bf16" if args.device == "cuda" else "fp32"), int(processes or 1))
        )
    if any(name == "without" for _, name, *_ in args.sides) != bool(args.without):
        parser.error("--contenders without and --without LEVER belong together")
    return args


def program_flags(args) -> PretrainArguments:
    """The program's own flags, as far as the benchmark has them."""
    values = {name: getattr(args, name) for name in FLAGS}
    values |= dict(use_cpu=args.device == "cpu", report_to=["none"])
    return PretrainArguments(train_data=["noise"], output_dir="none", **values)


class Side:
    """A contender's processes. A number of several is added up, or is that of the slowest or largest."""

    def __init__(self, args, name: str, precision: str, processes: int):
        flags, port = copy.copy(args), str(get_free_port())
        flags.precision, self.size = precision, processes
        self.processes = []
        for rank in map(str, range(processes)):
            launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.processes.append(fresh_process(start_side, name, flags, launch if processes > 1 else {}))

    def ask(self, method: str, *values) -> list[dict]:
        """What each process's contender answers."""
        return [answer.result() for answer in [process.submit(ask, method, *values) for process in self.processes]]

    def timed_update(self, lengths: str, update: int) -> dict:
        found = self.ask("timed_update", lengths, update)
        return {
            "seconds": max(rank["seconds"] for rank in found),
            "cpu_seconds": sum(rank["cpu_seconds"] for rank in found),
            "heard": [n for rank in found for n in rank["heard"]],
            "peak_bytes": max(rank["peak_bytes"] for rank in found),
        }


def start_side(name: str, flags, launch: dict[str, str]) -> None:
    """One process of a side: `ask` calls its contender's methods there."""
    global contender
    os.environ.update(launch)
    contender = start_contender(name, flags)


def start_contender(name: str, flags):
    module, kind = CONTENDERS[name]
    return getattr(importlib.import_module(module), kind)(program_flags(flags), flags)


def ask(method: str, *values) -> dict:
    return getattr(contender, method)(*values)


def rate(measured: dict, clock: str) -> float:
    """Audio-seconds heard a second of this clock."""
    return sum(measured["heard"]) / SAMPLING_RATE / measured[clock]


def describe(args, updates: list[dict], is_ours: bool, size: int = 1) -> dict:
    """Rates, memory and MFU of a side of so many processes, from its timed updates."""
    config, top = build_config(program_flags(args)), peak_flops()
    top = top and top * size

    def flops(count) -> float:
        return median_spread(count(config, u["heard"]) / u["seconds"] for u in updates)["median"]

    executed = functools.partial(executed_flops, on_gpu=args.device == "cuda")
    return {
        "audio_seconds_per_second": median_spread(rate(u, "seconds") for u in updates),
        "audio_seconds_per_cpu_second": median_spread(rate(u, "cpu_seconds") for u in updates),
        "peak_gb": updates[-1]["peak_bytes"] / 2**30,
        "tflops": flops(model_flops) / 1e12,
        "mfu": top and flops(model_flops) / top,
        "mfu_executed": flops(executed) / top if top and is_ours else None,
    }


def compare(args, sides: dict[str, Side], lengths: str) -> dict:
    """Updates in turns: each side's rates, the first one's over each other's in the same turn, and peaks of memory."""
    clock = "seconds" if args.device == "cuda" else "cpu_seconds"
    measured = {name: [] for name in sides}
    for turn in range(args.pairs + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            measured[name].append(sides[name].timed_update(lengths, turn))
    measured = {name: updates[1:] for name, updates in measured.items()}  # the first warms up
    first = measured[next(iter(sides))]
    found = {}
    for name, updates in measured.items():
        found[name] = describe(args, updates, is_ours=name.partition(":")[0] in PROGRAM, size=sides[name].size)
        if updates is not first:
            pairs = zip(first, updates, strict=True)
            found[name]["ratio"] = median_spread(rate(a, clock) / rate(b, clock) for a, b in pairs)
            found[name]["memory_ratio"] = first[-1]["peak_bytes"] / updates[-1]["peak_bytes"]
    return {"lengths": lengths, "clock": clock, "sides": found}


def show(results: list[dict]) -> None:
    rows = []
    for result in results:
        for name, side in result["sides"].items():
            rates = [side[f"audio_seconds_per_{clock}"]["median"] for clock in ("second", "cpu_second")]
            ratio = "{median:.2f} ({min:.2f}–{max:.2f})".format(**side["ratio"]) if "ratio" in side else ""
            numbers = [side[key] for key in ("peak_gb", "memory_ratio", "tflops", "mfu", "mfu_executed") if key in side]
            if "ratio" not in side:
                numbers.insert(1, None)
            rows.append([result["lengths"], name, *rates, ratio, *numbers])
    heads = ["lengths", "side", "audio-s/s", "audio-s/CPU-s", "first is faster (min–max)", "peak GB", "first's memory"]
    print_table(rows, [*heads, "TFLOP/s", "MFU", "MFU executed"])


def main() -> None:
    args = parse()
    sides = {words: Side(args, *side) for words, *side in args.sides}
    results = [compare(args, sides, lengths) for lengths in args.lengths]
    show(results)
    found = environment(*{"speechbrain"} & {name for _, name, *_ in args.sides}) | {"results": results}
    if args.profile:
        found["stages"] = tables = {words: side.ask("stage_table")[0] for words, side in sides.items()}
        print("\nMicroseconds for each second of audio, forward and backward, one micro-batch of equal lengths:")
        stages = tables[args.contenders[0]]
        print_table([[stage, *(table.get(stage) for table in tables.values())] for stage in stages], ["stage", *tables])
    print_json(found)


if __name__ == "__main__":
    main()
