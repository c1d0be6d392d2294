"""A whole update of this program against the stock loop, on the same utterances, in pairs: audio heard a second, memory, FLOPs.

    python benchmarks/update.py                                  # BASE; on two CPU cores about fifty minutes
    python benchmarks/update.py --config_name large --micro_batch_seconds 200 --batch_seconds 1600 --torch_compile      # on a GPU
    python benchmarks/update.py --profile                        # and where the time goes, stage by stage

Each side lives in a process of its own (so that its peak of memory is its own), and they take turns, now one first, now the other. On a
CPU the ratio is of audio-seconds a CPU-second, which other programs disturb least; on a GPU of audio-seconds a second.
The ratio is of the first contender to the second. `ratio_padded`: utterances of LibriSpeech's lengths; `ratio_equal_lengths`: all of one
length, where there is nothing to pad. `--contenders ours without --without flat_convs` shows what one lever is worth.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from contenders import CONTENDERS, Without, Work  # noqa: E402
from flops import model_flops, peak_flops  # noqa: E402
from report import environment, json_line, median_spread, print_table  # noqa: E402
from stages import stage_table  # noqa: E402

from w2v2.arguments import PretrainArguments  # noqa: E402
from w2v2.data.audio import SAMPLING_RATE  # noqa: E402
from w2v2.model.config import build_config  # noqa: E402

FLAGS = ("config_name", "config_overrides", "gradient_checkpointing", "torch_compile", "positional_conv")


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--config_name", default="base", help="base, large, or any other configuration")
    parser.add_argument("--config_overrides", help="as in pretrain.py")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of updates (after one to warm up)")
    parser.add_argument("--batch_seconds", type=float, default=1600.0 if gpu else 240.0, help="speech in an update")
    parser.add_argument(
        "--micro_batch_seconds", type=float, default=200.0 if gpu else 47.0, help="of padded audio at a time"
    )
    parser.add_argument("--crop_seconds", type=float, default=15.38)
    parser.add_argument("--length_grid_seconds", type=float, default=0.32, help="ours only")
    parser.add_argument("--lengths", nargs="+", default=["librispeech", "equal"], choices=["librispeech", "equal"])
    parser.add_argument("--contenders", nargs="+", default=["ours", "stock"], choices=list(CONTENDERS))
    parser.add_argument("--without", choices=list(Without.LEVERS), help="lever that the contender `without` lacks")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of the transformer, on both sides")
    parser.add_argument("--torch_compile", action="store_true", help="ours only")
    parser.add_argument("--positional_conv", default="auto", choices=["auto", "blocks", "stock"], help="ours only")
    parser.add_argument("--profile", action="store_true", help="time the stages of one micro-batch, too")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def arguments(args) -> PretrainArguments:
    """The program's own flags, as far as the benchmark has them."""
    return PretrainArguments(train_data=["noise"], output_dir="none", **{name: getattr(args, name) for name in FLAGS})


def work_of(args, lengths: str) -> Work:
    return Work(lengths, args.batch_seconds, args.micro_batch_seconds, args.crop_seconds, args.length_grid_seconds)


def serve(args) -> None:
    """One side's process: a line of JSON on standard input asks for an update (or the stage table), a line on standard output answers."""
    lacking = {"without": args.without} if args.worker == "without" else {}
    contender = CONTENDERS[args.worker](arguments(args), torch.device(args.device), **lacking)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = work_of(args, request["lengths"])
        if request["what"] == "stages":
            answer = stage_table(contender, work)
        else:
            answer = contender.timed_update(work, request["update"])
            if args.device == "cuda":
                torch.cuda.empty_cache()
        print("answer " + json.dumps(answer), flush=True)


class Side:
    """The parent's end of one side's process. Its threads sleep where they wait: a CPU-second that is counted is one of work."""

    def __init__(self, name: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, *sys.argv[1:]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={"OMP_WAIT_POLICY": "passive"} | os.environ,
        )  # fmt: skip
        self._next("ready")

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self._next("answer"))

    def _next(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"update.py: a contender ended with status {self.process.wait()} (out of memory?)")


def rate(measured: dict, clock: str) -> float:
    """Audio-seconds heard a second of this clock."""
    return sum(measured["heard"]) / SAMPLING_RATE / measured[clock]


def compare(args, sides: dict[str, Side], lengths: str) -> dict:
    """Pairs of updates: each side's rates, the ratio of each pair, and the peaks of memory."""
    clock = "seconds" if args.device == "cuda" else "cpu_seconds"
    for side in sides.values():
        side.ask(what="update", lengths=lengths, update=0)
    measured = {name: [] for name in sides}
    for pair in range(1, args.pairs + 1):
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            measured[name].append(sides[name].ask(what="update", lengths=lengths, update=pair))
    config = build_config(arguments(args))
    result = {"lengths": lengths, "clock": clock}
    for name, updates in measured.items():
        flops = [model_flops(config, u["heard"]) / u["seconds"] for u in updates]
        result[name] = {
            "audio_seconds_per_second": median_spread(rate(u, "seconds") for u in updates),
            "audio_seconds_per_cpu_second": median_spread(rate(u, "cpu_seconds") for u in updates),
            "peak_gb": updates[-1]["peak_bytes"] / 2**30,
            "tflops": median_spread(f / 1e12 for f in flops)["median"],
            "mfu": median_spread(f / peak for f in flops)["median"] if (peak := peak_flops()) else None,
        }
    if len(sides) == 2:
        first, second = sides
        pairs = zip(measured[first], measured[second], strict=True)
        result["ratio"] = median_spread(rate(a, clock) / rate(b, clock) for a, b in pairs)
        result["memory_ratio"] = result[first]["peak_gb"] / result[second]["peak_gb"]
    return result


def show(results: list[dict], names: list[str]) -> None:
    rows = []
    for result in results:
        for name in names:
            side = result[name]
            heard, cpu = side["audio_seconds_per_second"], side["audio_seconds_per_cpu_second"]
            ratio = result.get("ratio", {}) if name == names[0] else {}
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else ""
            rows.append([result["lengths"], name, heard["median"], cpu["median"], spread, side["peak_gb"], side["tflops"], side["mfu"]])  # fmt: skip
    heads = ["lengths", "side", "audio-s/s", "audio-s/CPU-s", "ratio (min–max)", "peak GB", "TFLOP/s", "MFU"]
    print_table(rows, heads)


def main() -> None:
    args = parse()
    if args.worker:
        return serve(args)
    sides = {name: Side(name) for name in args.contenders}
    results = [compare(args, sides, lengths) for lengths in args.lengths]
    show(results, args.contenders)
    found = environment() | {"results": results}
    if args.profile:
        found["stages"] = {name: side.ask(what="stages", lengths="equal") for name, side in sides.items()}
        stages = list(dict.fromkeys(stage for table in found["stages"].values() for stage in table))
        print("\nMicroseconds for each second of audio, forward and backward, one micro-batch of equal lengths:")
        print_table([[stage, *(found["stages"][n].get(stage) for n in sides)] for stage in stages], ["stage", *sides])
    ours = {result["lengths"]: result for result in results}
    for key, lengths in (("ratio_padded", "librispeech"), ("ratio_equal_lengths", "equal")):
        found[key] = ours[lengths].get("ratio", {}).get("median") if lengths in ours else None
    first = results[0]
    found["memory_ratio"] = first.get("memory_ratio")
    if "ours" in first:
        found["audio_seconds_per_second"] = first["ours"]["audio_seconds_per_second"]["median"]
        found["mfu"] = first["ours"]["mfu"]
    json_line(found)


if __name__ == "__main__":
    main()
