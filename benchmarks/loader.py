"""How fast audio comes out of files of several formats and out of packed shards, and how long training waits for it.

    python benchmarks/loader.py                                        # on synthesized audio
    python benchmarks/loader.py --manifest train.csv --data_root /data  # on one's own
    python benchmarks/loader.py --form tar                             # streamed from tars, too (or parquet)

Reading is measured in seconds of audio per second of processor time, in this process, on files that the system has in
its cache: decoding and collating, no disk. The formats take turns on the same effective batches. Then pretrain.py makes
a few updates from FLAC and from shards, and its log says which share of the time they waited. With `--form` the same
utterances are also streamed: as 16-bit WAV files in tars or Parquet files, and compared with packed WAV shards on the
same batches. The last line is JSON.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import pandas
import torch

from w2v2.arguments import PretrainArguments
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.audio.files import split_address
from w2v2.cli import run_script
from w2v2.data.batching import Cursor, MicroBatchPlan, PlanStream, plan_update
from w2v2.data.collate import CropDataset, Framing, PretrainBatch, lay_out
from w2v2.data.loader import build_loader
from w2v2.data.sampling import build_batches
from w2v2.data.streaming import StreamedCrops
from w2v2.data.utterances import load_utterances
from w2v2.errors import UserError
from w2v2.model.loading import build_config, load_feature_extractor
from w2v2.train.log import read_metrics

# Suffix, and FFmpeg's name of a codec that libsndfile does not write.
FORMATS = {
    "wav": (".wav", None),
    "flac": (".flac", None),
    "mp3": (".mp3", "libmp3lame"),
    "opus": (".opus", "libopus"),
    "aac": (".m4a", "aac"),
}
COMPARED = ("flac", "packed")
WAYS = ("read_crops", "stack_crops", "whole_batches")  # methods of Source
LEAST_SECONDS = 0.2  # of processor time that a figure is taken from


# -- reading


class Source:
    """One format of the utterances, and the ways to read them whose cost is compared."""

    def __init__(self, manifest: str, args: PretrainArguments, framing: Framing, streaming: bool = False):
        self.utterances = load_utterances([manifest], args, framing, streaming)[0]
        self.rows, shards = self.utterances.table.to_list(), self.utterances.shards
        inputs = (self.utterances.table, framing, 0)
        self.dataset = StreamedCrops(*inputs, shards) if shards else CropDataset(*inputs)

    def count_bytes(self) -> int:
        """Of all files that are read."""
        return sum(map(os.path.getsize, {split_address(row["audio"])[0] for row in self.rows}))

    def read_files(self) -> None:
        for row in self.rows:
            self.dataset.read(row, 0, row["num_samples"])

    def read_crops(self, plan: MicroBatchPlan) -> list[np.ndarray]:
        crops = zip(*(column.tolist() for column in plan.crops), strict=True)
        return [self.dataset.read(self.rows[utterance], start, n) for utterance, _, start, n in crops]

    def stack_crops(self, plan: MicroBatchPlan) -> torch.Tensor:
        """From files to one micro-batch of samples in memory, side by side."""
        waveforms = self.read_crops(plan)
        ends = np.cumsum([0, *map(len, waveforms)]).tolist()
        return lay_out(waveforms, ends[:-1], ends[-1])

    def whole_batches(self, plan: MicroBatchPlan) -> PretrainBatch:
        """All that a worker does: `CropDataset` with its masks."""
        return self.dataset[plan]


def cpu_seconds(work: Callable, items: list) -> float:
    """Processor time of `work` over all items once, averaged over so many rounds that it can be measured."""
    rounds, started = 0, time.process_time()
    while (spent := time.process_time() - started) < LEAST_SECONDS or not rounds:
        for item in items:
            work(item)
        rounds += 1
    return spent / rounds


def compare_reading(sources: dict[str, Source], args: PretrainArguments, pairs: int) -> tuple[dict, dict, dict]:
    """Every format's figures on the same `pairs` effective batches, in turns; by way, packed over FLAC and, where shards
    are streamed, these over packed.
    """
    batches, cursor = build_batches(sources["packed"].utterances, args), Cursor()
    took = {(name, way): [] for name in sources for way in WAYS}
    heard, num_crops, formats = 0.0, 0, {}
    for pair in range(pairs):
        crops, cursor = batches.draw(cursor)
        plans = plan_update(crops, pair, cursor, **cut(args))
        heard += int(crops.num_samples.sum()) / SAMPLING_RATE
        num_crops += len(crops.utterance)
        for way in WAYS:
            for name in list(sources)[:: 1 if pair % 2 else -1]:
                took[name, way].append(cpu_seconds(getattr(sources[name], way), plans))
    for name, source in sources.items():
        spent, hours = {way: sum(took[name, way]) for way in WAYS}, source.utterances.hours
        formats[name] = {
            "megabytes_per_hour": source.count_bytes() / 1e6 / hours,
            "whole_files": 3600 * hours / cpu_seconds(Source.read_files, [source]),
            **{way: heard / spent[way] for way in WAYS},
            "microseconds_per_crop": {way: 1e6 * spent[way] / num_crops for way in WAYS},
            "decoding_share": min(1.0, spent["read_crops"] / spent["whole_batches"]),
        }

    def divide(slow: str, fast: str) -> dict:
        return {way: common.median_spread(np.divide(took[slow, way], took[fast, way])) for way in WAYS}

    return formats, divide("flac", "packed"), divide("packed", "streamed") if "streamed" in sources else {}


def cut(args: PretrainArguments) -> dict[str, int]:
    """How one process cuts an effective batch."""
    return dict(rank=0, num_ranks=1, micro_batch_samples=round(args.micro_batch_seconds * SAMPLING_RATE))


def measure_transfer(source: Source, args: PretrainArguments) -> float:
    """Seconds of audio per second of two effective batches from files through pinned memory onto the GPU."""
    plans = list(PlanStream(build_batches(source.utterances, args), Cursor(), range(3), **cut(args)))
    num_workers, prefetch = args.dataloader_num_workers, args.dataloader_prefetch_factor
    started, heard = time.perf_counter(), 0
    for batch in build_loader(source.dataset, plans, num_workers, prefetch, pin_memory=True):
        if batch.plan.update == 0:  # the workers start
            started = time.perf_counter()
        else:
            heard += batch.to(torch.device("cuda")).heard_samples
    torch.cuda.synchronize()
    return heard / SAMPLING_RATE / (time.perf_counter() - started)


# -- waiting


def measure_waiting(manifest: str, flags, folder: Path, streaming: bool = False) -> dict:
    """Updates of pretrain.py: seconds of audio per second, and the share of their time that they wait for data."""
    values = dict(
        train_data=manifest, output_dir=folder, config_name=flags.config_name, max_steps=flags.updates + 1,
        logging_steps=1, warmup_steps=0.5, save_steps=10**6, collapse_action="none", report_to="none",
        batch_hours=flags.batch_hours, micro_batch_seconds=flags.micro_batch_seconds,
        dataloader_num_workers=flags.num_workers, use_cpu=flags.device == "cpu", streaming=streaming,
    )  # fmt: skip
    command = [sys.executable, common.ROOT / "pretrain.py", *(f"--{name}={value}" for name, value in values.items())]
    precision = {} if flags.device == "cpu" else {"ACCELERATE_MIXED_PRECISION": "bf16"}
    run = subprocess.run(command, env=precision | os.environ, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"pretrain.py: {run.stderr.strip().splitlines()[-1]}")
    updates = pandas.DataFrame(read_metrics(folder / "metrics.jsonl")[1:])  # in the first one the workers start
    heard, waited = 3600 * updates["batch_hours"], updates["data_wait_fraction"]
    took = heard / updates["audio_seconds_per_second"]
    return {
        "audio_seconds_per_second": heard.sum() / took.sum(),
        "wait_fraction": np.average(waited, weights=took),
        "wait_fraction_spread": common.median_spread(waited),
    }


# -- all of it


def measure(flags, folder: Path) -> dict:
    """All measurements, printed as they come. Returns the JSON line's values."""
    on_gpu = flags.device == "cuda"
    flags.batch_hours = flags.batch_hours or (1.6 if on_gpu else 0.04)
    flags.micro_batch_seconds = flags.micro_batch_seconds or (200 if on_gpu else 40)
    args = PretrainArguments(
        train_data=["-"], output_dir=str(folder), config_name=flags.config_name,
        report_to=["none"], use_cpu=not on_gpu, dataloader_num_workers=flags.num_workers,
    )  # fmt: skip
    config = build_config(args)
    framing = Framing(config, load_feature_extractor(config.name_or_path, config).do_normalize)
    rows = common.make_rows(folder / "wav", flags.hours, flags.manifest, flags.data_root)
    manifests = {name: common.write_files(rows, folder, *kind) for name, kind in FORMATS.items()}
    manifests["packed"] = common.pack(rows, folder)
    sources = {name: Source(path, args, framing) for name, path in manifests.items()}
    if flags.form:
        manifests["streamed"] = common.write_shards(rows, folder / "shards", flags.form)
        sources["streamed"] = Source(manifests["streamed"], args, framing, streaming=True)
    hours, num_utterances = sources["packed"].utterances.hours, len(sources["packed"].rows)
    args.batch_hours = min(args.batch_hours, hours)
    print(f"{hours:.2f} hours in {num_utterances:,} utterances\n\nSeconds of audio per second of processor time")
    formats, ratios, streamed = compare_reading(sources, args, flags.pairs)
    columns = ["megabytes_per_hour", "whole_files", *WAYS, "decoding_share"]
    common.print_table([[name, *(found[c] for c in columns)] for name, found in formats.items()], ["", *columns])
    print(f"\nPacked over FLAC, {flags.pairs} effective batches")
    common.print_table([[way, *ratio.values()] for way, ratio in ratios.items()], ["", "median", "least", "most"])
    if streamed:
        print(f"\nStreamed from {flags.form} over packed, {flags.pairs} effective batches")
        common.print_table([[way, *ratio.values()] for way, ratio in streamed.items()], ["", "median", "least", "most"])
    waiting = {
        name: measure_waiting(manifests[name], flags, folder / f"run_{name}", streaming=name == "streamed")
        for name in [*COMPARED, *(["streamed"] if flags.form else [])]
    }
    print(f"\n{flags.updates} updates of {flags.config_name} on the {flags.device}, {flags.num_workers} worker(s)")
    rows = [[name, found["audio_seconds_per_second"], found["wait_fraction"]] for name, found in waiting.items()]
    common.print_table(rows, ["", "audio s / s", "share of the time spent waiting"])
    return {
        "pcm_over_flac": ratios["stack_crops"]["median"],
        "wait_fraction": waiting["packed"]["wait_fraction"],
        "packed_over_flac": ratios,
        "streamed_over_packed": streamed,
        "waiting": waiting,
        "audio_seconds_per_cpu_second": formats,
        "files_to_gpu": {name: measure_transfer(sources[name], args) for name in COMPARED} if on_gpu else None,
        "settings": vars(flags) | {"hours": hours, "utterances": num_utterances},
    }


def main(argv: list[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = common.make_parser(__doc__, reads_audio=True)
    parser.add_argument("--form", choices=["tar", "parquet"], help="stream shards of this form, too")
    parser.add_argument("--hours", type=float, default=0.5, help="most audio that is used")
    parser.add_argument("--pairs", type=int, default=5, help="effective batches to compare on")
    parser.add_argument("--num_workers", type=int, default=1, help="of the DataLoader")
    parser.add_argument("--updates", type=int, default=6, help="in which waiting is counted")
    parser.add_argument("--config_name", default="small", help="model to train")
    parser.add_argument("--batch_hours", type=float, help="of these updates; None: 0.04, on a GPU 1.6")
    parser.add_argument("--micro_batch_seconds", type=float, help="of these updates; None: 40, on a GPU 200")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu", help="to train on")
    flags = parser.parse_args(argv)
    if flags.pairs < 1 or flags.updates < 1 or not flags.hours > 0:
        raise UserError("--pairs, --updates and --hours must be positive")
    if flags.device == "cuda" and not gpu:
        raise UserError("--device cuda: torch sees no GPU here: use --device cpu")
    with tempfile.TemporaryDirectory(prefix="loader_benchmark_") as folder:
        values = measure(flags, Path(folder))
    print(f"\npcm_over_flac {values['pcm_over_flac']:.1f}; wait_fraction {values['wait_fraction']:.4f}")
    common.print_json({"benchmark": "loader", **values, **common.environment("av")})


if __name__ == "__main__":
    run_script(main)
