"""A whole update of this program against the stock loop, on the same utterances, in pairs: audio heard a second,
memory, FLOPs.

    python benchmarks/update.py                                  # BASE; on two CPU cores about fifty minutes
    python benchmarks/update.py --config_name large --micro_batch_seconds 200 --batch_seconds 1600     # on a GPU
    python benchmarks/update.py --profile                        # and where the time goes, stage by stage

Each side lives in a process of its own (so that its peak of memory is its own), and they take turns, now one first,
now the other. On a CPU the ratio is of audio-seconds a CPU-second, which other programs disturb least; on a GPU of
audio-seconds a second. The ratio is of the first contender to the second. `ratio_padded`: utterances of LibriSpeech's
lengths; `ratio_equal_lengths`: all of one length, where there is nothing to pad. `--contenders ours without --without
flat_convs` shows what one lever is worth.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor

import torch
from common import environment, fresh_process, make_parser, median_spread, print_json, print_table
from contenders import LEVERS, Ours, Without
from flops import model_flops, peak_flops
from stock_loop import Stock

from w2v2.arguments import PretrainArguments
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.model.loading import build_config

CONTENDERS = {"ours": Ours, "stock": Stock, "without": Without}
FLAGS = ("config_name", "config_overrides", "gradient_checkpointing", "torch_compile", "positional_conv")


def parse(argv=None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    gpu = torch.cuda.is_available()
    micro_batch, update = (200.0, 1600.0) if gpu else (47.0, 240.0)
    parser.add_argument("--config_name", default="base", help="base, large, or any other configuration")
    parser.add_argument("--config_overrides", help="as in pretrain.py")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of updates (after one to warm up)")
    parser.add_argument("--batch_seconds", type=float, default=update, help="speech in an update")
    parser.add_argument("--micro_batch_seconds", type=float, default=micro_batch, help="of padded audio at a time")
    parser.add_argument("--crop_seconds", type=float, default=15.38)
    parser.add_argument("--length_grid_seconds", type=float, default=0.32, help="ours only")
    parser.add_argument("--lengths", nargs="+", default=["librispeech", "equal"], choices=["librispeech", "equal"])
    parser.add_argument("--contenders", nargs="+", default=["ours", "stock"], choices=list(CONTENDERS))
    parser.add_argument("--without", choices=list(LEVERS), help="lever that the contender `without` lacks")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of the transformer, on both sides")
    parser.add_argument("--torch_compile", action="store_true", help="ours only")
    parser.add_argument("--positional_conv", default="auto", choices=["auto", "blocks", "stock"], help="ours only")
    parser.add_argument("--profile", action="store_true", help="time the stages of one micro-batch, too")
    args = parser.parse_args(argv)
    if ("without" in args.contenders) != bool(args.without):
        parser.error("--contenders without and --without LEVER belong together")
    return args


def program_flags(args) -> PretrainArguments:
    """The program's own flags, as far as the benchmark has them."""
    return PretrainArguments(train_data=["noise"], output_dir="none", **{name: getattr(args, name) for name in FLAGS})


def start_side(name: str, args) -> None:
    """One side's process: `ask` calls its contender's methods there."""
    global contender
    contender = CONTENDERS[name](program_flags(args), args)


def ask(method: str, *values) -> dict:
    return getattr(contender, method)(*values)


def rate(measured: dict, clock: str) -> float:
    """Audio-seconds heard a second of this clock."""
    return sum(measured["heard"]) / SAMPLING_RATE / measured[clock]


def compare(args, sides: dict[str, ProcessPoolExecutor], lengths: str) -> dict:
    """Pairs of updates: each side's rates, the ratio of each pair, and the peaks of memory."""
    clock = "seconds" if args.device == "cuda" else "cpu_seconds"
    measured = {name: [] for name in sides}
    for pair in range(args.pairs + 1):
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            measured[name].append(sides[name].submit(ask, "timed_update", lengths, pair).result())
    config, peak = build_config(program_flags(args)), peak_flops()
    result = {"lengths": lengths, "clock": clock}
    for name, (_, *updates) in measured.items():  # the first warms up
        flops = median_spread(model_flops(config, u["heard"]) / u["seconds"] for u in updates)["median"]
        result[name] = {
            "audio_seconds_per_second": median_spread(rate(u, "seconds") for u in updates),
            "audio_seconds_per_cpu_second": median_spread(rate(u, "cpu_seconds") for u in updates),
            "peak_gb": updates[-1]["peak_bytes"] / 2**30,
            "tflops": flops / 1e12,
            "mfu": flops / peak if peak else None,
        }
    if len(sides) == 2:
        first, second = sides
        pairs = zip(measured[first][1:], measured[second][1:], strict=True)
        result["ratio"] = median_spread(rate(a, clock) / rate(b, clock) for a, b in pairs)
        result["memory_ratio"] = result[first]["peak_gb"] / result[second]["peak_gb"]
    return result


def show(results: list[dict], names: list[str]) -> None:
    rows = []
    for result in results:
        words = "{median:.2f} ({min:.2f}–{max:.2f})".format(**result["ratio"]) if "ratio" in result else ""
        for name in names:
            side = result[name]
            rates = [side[f"audio_seconds_per_{clock}"]["median"] for clock in ("second", "cpu_second")]
            ratio = words if name == names[0] else ""
            rows.append([result["lengths"], name, *rates, ratio, side["peak_gb"], side["tflops"], side["mfu"]])
    heads = ["lengths", "side", "audio-s/s", "audio-s/CPU-s", "ratio (min–max)", "peak GB", "TFLOP/s", "MFU"]
    print_table(rows, heads)


def main() -> None:
    args = parse()
    sides = {name: fresh_process(start_side, name, args) for name in args.contenders}
    results = [compare(args, sides, lengths) for lengths in args.lengths]
    show(results, args.contenders)
    found = environment() | {"results": results}
    if args.profile:
        found["stages"] = tables = {name: side.submit(ask, "stage_table").result() for name, side in sides.items()}
        print("\nMicroseconds for each second of audio, forward and backward, one micro-batch of equal lengths:")
        stages = tables[args.contenders[0]]
        print_table([[stage, *(table[stage] for table in tables.values())] for stage in stages], ["stage", *tables])
    ratios = {result["lengths"]: result["ratio"]["median"] for result in results if "ratio" in result}
    found |= {"ratio_padded": ratios.get("librispeech"), "ratio_equal_lengths": ratios.get("equal")}
    found["memory_ratio"] = results[0].get("memory_ratio")
    if ours := results[0].get("ours"):
        found |= {"audio_seconds_per_second": ours["audio_seconds_per_second"]["median"], "mfu": ours["mfu"]}
    print_json(found)


if __name__ == "__main__":
    main()
