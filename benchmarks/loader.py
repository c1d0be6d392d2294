"""How fast audio comes out of files and out of packed shards, and how long training waits for it.

    python benchmarks/loader.py                                        # on synthesized audio
    python benchmarks/loader.py --manifest train.csv --data_root /data  # on one's own

Reading is measured in seconds of audio per second of processor time, in this process, on files that the system has in its
cache: decoding and collating, no disk. FLAC and packed audio take turns on the same effective batches. Then real updates are
made through the `DataLoader`, and the share of the time is taken that they waited for data. The last line is JSON.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from corpus import make_formats, megabytes, sample_manifest, synthesize
from corpus_files import Parser, exit_status
from report import environment, json_line, median_spread, print_table

from w2v2.arguments import PretrainArguments
from w2v2.data.audio import SAMPLING_RATE, read_pcm
from w2v2.data.batching import Cursor, MicroBatchPlan, PlanStream, plan_update
from w2v2.data.collate import CropDataset, Framing
from w2v2.data.loader import build_loader
from w2v2.data.utterances import Utterances, load_utterances
from w2v2.errors import UserError
from w2v2.model.config import build_config
from w2v2.model.loading import build_feature_extractor, build_framing, build_model
from w2v2.train.launch import start_accelerator
from w2v2.train.plan import build_batches
from w2v2.train.schedule import lr_factor
from w2v2.train.update import Feed, UpdateSettings, build_optimizer, train_update

COMPARED = ("flac", "packed")
SETTINGS = ("manifest", "pairs", "num_workers", "updates", "config_name", "device")
LEAST_SECONDS = 0.2  # of processor time that a figure is taken from
TARGETS = {"pcm_over_flac": 20.0, "wait_fraction": 0.02}
WARM_UP = 1  # updates before waiting is counted: the workers start


def cut(args: PretrainArguments) -> dict[str, int]:
    """How one process cuts an effective batch."""
    return dict(rank=0, num_ranks=1, micro_batch_samples=round(args.micro_batch_seconds * SAMPLING_RATE))


class Source:
    """One format of the utterances, and the ways to read them whose cost is compared."""

    def __init__(self, utterances: Utterances, framing: Framing):
        self.audio, self.starts = list(utterances.table["audio"]), list(utterances.table["start"])
        self.num_samples, self.utterances = utterances.num_samples, utterances
        self.dataset = CropDataset(utterances.table, framing, seed=0)

    def read_files(self) -> None:
        for audio, start, num_samples in zip(self.audio, self.starts, self.num_samples.tolist(), strict=True):
            read_pcm(audio, round(start * SAMPLING_RATE), num_samples)

    def read_crops(self, plan: MicroBatchPlan) -> list[np.ndarray]:
        return [
            read_pcm(self.audio[utterance], round(self.starts[utterance] * SAMPLING_RATE) + start, num_samples)
            for utterance, _, start, num_samples in zip(*(column.tolist() for column in plan.crops), strict=True)
        ]

    def stack_crops(self, plan: MicroBatchPlan) -> np.ndarray:
        """From files to one micro-batch of samples in memory, (B, S)."""
        crops = self.read_crops(plan)
        batch = np.zeros((len(crops), max(map(len, crops))), np.result_type(*crops))
        for row, crop in zip(batch, crops, strict=True):
            row[: len(crop)] = crop
        return batch

    def whole_batches(self, plan: MicroBatchPlan):
        """All that a worker does: `CropDataset` with its masks."""
        return self.dataset[plan]


WAYS = ("read_crops", "stack_crops", "whole_batches")


def cpu_seconds(work: Callable, items: list) -> float:
    """Processor time of `work` over all items once, averaged over so many rounds that it can be measured."""
    rounds, started = 0, time.process_time()
    while (spent := time.process_time() - started) < LEAST_SECONDS or not rounds:
        for item in items:
            work(item)
        rounds += 1
    return spent / rounds


def compare_reading(sources: dict[str, Source], args: PretrainArguments, pairs: int) -> dict:
    """CPU seconds of every format and way for the same `pairs` effective batches, FLAC and packed audio in turns."""
    batches, cursor = build_batches(sources["packed"].utterances, args), Cursor()
    seconds = {(name, way): [] for name in sources for way in WAYS}
    heard, num_crops = [], []
    for source in sources.values():
        source.read_files()  # into the system's cache
    for pair in range(pairs):
        crops, cursor = batches.draw(cursor)
        plans = plan_update(crops, pair, cursor, **cut(args))
        heard.append(int(crops.num_samples.sum()) / SAMPLING_RATE)
        num_crops.append(len(crops.utterance))
        formats = [name for name in sources if pair == 0 or name in COMPARED]
        for way in WAYS:
            for name in formats if pair % 2 == 0 else reversed(formats):
                seconds[name, way].append(cpu_seconds(getattr(sources[name], way), plans))
    return {"seconds": seconds, "heard": heard, "num_crops": num_crops}


def reading_report(sources: dict[str, Source], measured: dict) -> dict:
    """The table of formats, and its figures by name."""
    formats, rows = {}, []
    for name, source in sources.items():
        seconds = float(source.num_samples.sum()) / SAMPLING_RATE
        took = {way: sum(measured["seconds"][name, way]) for way in WAYS}
        num_pairs = len(measured["seconds"][name, "read_crops"])
        heard, num_crops = (sum(measured[figure][:num_pairs]) for figure in ("heard", "num_crops"))
        formats[name] = {
            "megabytes_per_hour": megabytes(source.audio) / seconds * 3600,
            "whole_files": seconds / cpu_seconds(lambda read: read(), [source.read_files]),
            **{way: heard / took[way] for way in WAYS},
            "microseconds_per_crop": {way: 1e6 * took[way] / num_crops for way in WAYS},
            "decoding_share": min(1.0, took["read_crops"] / took["whole_batches"]),
        }
        per_crop = formats[name]["microseconds_per_crop"]
        rows.append([name, *list(formats[name].values())[:5], *per_crop.values(), formats[name]["decoding_share"]])
    ways = ["crops", "+ stacked", "CropDataset"]
    print(
        "\nSeconds of audio per second of processor time, microseconds a crop, share of decoding in CropDataset's time"
    )
    print_table(rows, ["format", "MB/h", "whole files", *ways, *[f"µs {way}" for way in ways], "decoding"])
    return formats


def measure_waiting(source: Source, args: PretrainArguments, framing: Framing, num_updates: int) -> dict:
    """Seconds of audio per second, and the share of the updates' time that they wait for data: over all of them, and its spread."""
    if not args.use_cpu:
        os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16")  # as configs/accelerate has it for GPUs
    accelerator = start_accelerator(args)
    model = build_model(args, build_config(args))
    model, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    batches, updates = build_batches(source.utterances, args), range(WARM_UP + num_updates)
    loader = build_loader(
        CropDataset(source.utterances.table, framing, args.seed),
        PlanStream(batches, Cursor(), updates, **cut(args)),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=accelerator.device.type == "cuda",
    )
    feed, heard, waited, took = Feed(loader), [], [], []
    for step in updates:
        rate = args.learning_rate * lr_factor(step, args.max_steps, args.warmup_steps, args.lr_scheduler_type)
        settings = UpdateSettings(step, args.seed, rate, 2.0, 0.1, shared_diversity=False, max_grad_norm=0.0)
        started, before = time.perf_counter(), feed.waited_seconds
        _, totals, _ = train_update(accelerator, model, optimizer, feed.update(), settings)
        took.append(time.perf_counter() - started)
        waited.append(feed.waited_seconds - before)
        heard.append(totals.heard_samples / SAMPLING_RATE)
    took, waited = np.array(took[WARM_UP:]), np.array(waited[WARM_UP:])
    return {
        "audio_seconds_per_second": sum(heard[WARM_UP:]) / took.sum(),
        "wait_fraction": waited.sum() / took.sum(),
        "wait_fraction_spread": median_spread(waited / took),
    }


def measure_transfer(source: Source, args: PretrainArguments, framing: Framing) -> float:
    """Seconds of audio per second of one effective batch from files through pinned memory onto the GPU."""
    device = torch.device("cuda")
    stream = PlanStream(build_batches(source.utterances, args), Cursor(), range(3), **cut(args))
    dataset = CropDataset(source.utterances.table, framing, args.seed)
    loader = build_loader(dataset, stream, args.dataloader_num_workers, args.dataloader_prefetch_factor, True)
    feed, heard = Feed(loader), 0
    for update in range(3):
        if update == 1:  # the first starts the workers
            started, heard = time.perf_counter(), 0
        for batch in feed.update():
            heard += batch.to(device).heard_samples
    torch.cuda.synchronize()
    return heard / SAMPLING_RATE / (time.perf_counter() - started)


def make_sources(flags, folder: Path, args: PretrainArguments, framing: Framing) -> dict[str, Source]:
    """The utterances of the manifest, or synthesized ones, in every format."""
    if flags.manifest:
        rows = sample_manifest(flags.manifest, flags.data_root, flags.hours)
    else:
        (folder / "wav").mkdir()
        rows = synthesize(folder / "wav", flags.hours)
    manifests = make_formats(rows, folder)
    return {name: Source(load_utterances([path], args, framing)[0], framing) for name, path in manifests.items()}


def run(flags, folder: Path) -> dict:
    """All measurements, printed as they come. Returns the JSON line's values."""
    on_gpu = flags.device == "cuda"
    common = dict(train_data=["-"], output_dir=str(folder), config_name=flags.config_name, report_to=["none"])
    common |= dict(use_cpu=not on_gpu, dataloader_num_workers=flags.num_workers)
    reading = PretrainArguments(**common)
    training = PretrainArguments(
        **common,
        batch_hours=flags.batch_hours or (1.6 if on_gpu else 0.04),
        micro_batch_seconds=flags.micro_batch_seconds or (200 if on_gpu else 40),
    )
    config = build_config(reading)
    framing = build_framing(config, build_feature_extractor(reading, config))
    sources = make_sources(flags, folder, reading, framing)
    hours = sources["packed"].utterances.hours
    reading.batch_hours = min(reading.batch_hours, hours)
    print(f"{hours:.2f} hours in {len(sources['packed'].audio):,} utterances")

    measured = compare_reading(sources, reading, flags.pairs)
    formats = reading_report(sources, measured)
    ratios = {
        way: median_spread(np.divide(measured["seconds"]["flac", way], measured["seconds"]["packed", way]))
        for way in WAYS
    }
    names = dict(zip(WAYS, ("crops", "crops stacked into micro-batches", "all of CropDataset"), strict=True))
    print(f"\nPacked over FLAC, {flags.pairs} effective batches of {np.mean(measured['heard']) / 3600:.2f} h")
    print_table([[names[way], *ratios[way].values()] for way in WAYS], ["", "median", "least", "most"])

    waiting = {name: measure_waiting(sources[name], training, framing, flags.updates) for name in COMPARED}
    print(f"\n{flags.updates} updates of {flags.config_name} on the {flags.device}, {flags.num_workers} worker(s)")
    print_table(
        [[name, *list(found.values())[:2], *found["wait_fraction_spread"].values()] for name, found in waiting.items()],
        ["", "audio s / s", "share of the time spent waiting", "median", "least", "most"],
    )
    transfer = {name: measure_transfer(sources[name], reading, framing) for name in COMPARED} if on_gpu else None
    if transfer:
        print("\nFrom files to the GPU through pinned memory, seconds of audio per second")
        print_table(transfer.items(), ["", "audio s / s"])
    return {
        "pcm_over_flac": ratios["stack_crops"]["median"],
        "wait_fraction": waiting["packed"]["wait_fraction"],
        "packed_over_flac": ratios,
        "waiting": waiting,
        "audio_seconds_per_cpu_second": formats,
        "files_to_gpu": transfer,
        "settings": {name: getattr(flags, name) for name in SETTINGS}
        | {name: getattr(training, name) for name in ("batch_hours", "micro_batch_seconds")}
        | {"hours": hours, "utterances": len(sources["packed"].audio)},
    }


def benchmark(flags) -> None:
    if flags.pairs < 1 or flags.updates < 1 or not flags.hours > 0:
        raise UserError("--pairs, --updates and --hours must be positive")
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here: use --device cpu")
    with tempfile.TemporaryDirectory(prefix="loader_benchmark_") as folder:
        values = run(flags, Path(folder))
    ratio, waiting = values["pcm_over_flac"], values["wait_fraction"]
    print(f"\npcm_over_flac {ratio:.1f} (target: {TARGETS['pcm_over_flac']:g} or more)", end="; ")
    print(f"wait_fraction {waiting:.4f} (target: {TARGETS['wait_fraction']:g} or less)")
    json_line({"benchmark": "loader", **values, **environment()})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--manifest", help="what pretrain.py takes as --train_data (default: synthesized audio)")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    parser.add_argument("--hours", type=float, default=0.5, help="most audio that is used (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="effective batches to compare on (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="of the DataLoader (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=6, help="in which waiting is counted (default: %(default)s)")
    parser.add_argument("--config_name", default="small", help="model to train (default: %(default)s)")
    parser.add_argument("--batch_hours", type=float, help="of these updates (default: 0.04, on a GPU 1.6)")
    parser.add_argument("--micro_batch_seconds", type=float, help="of these updates (default: 40, on a GPU 200)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    return exit_status(parser.prog, lambda: benchmark(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
