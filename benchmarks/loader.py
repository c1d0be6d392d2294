"""How fast audio comes out of files and out of packed shards, and how long training waits for it.

    python benchmarks/loader.py                                        # on synthesized audio
    python benchmarks/loader.py --manifest train.csv --data_root /data  # on one's own

Reading is measured in seconds of audio per second of processor time, in this process, on files that the system has in its
cache: decoding and collating, no disk. FLAC and packed audio take turns on the same effective batches. Then real updates are
made through the `DataLoader`, and the share of the time is taken that they waited for data. The last line is JSON.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from corpus import make_formats, megabytes_per_hour, sample_manifest, synthesize
from corpus_files import Parser, exit_status
from report import environment, json_line, median_spread, print_table

from w2v2.arguments import PretrainArguments
from w2v2.audio import SAMPLING_RATE, read_pcm
from w2v2.batching import Cursor, MicroBatchPlan, PlanStream, plan_update
from w2v2.collate import CropDataset, Framing, build_loader
from w2v2.errors import UserError
from w2v2.launch import start_accelerator
from w2v2.loading import build_config, build_feature_extractor, build_framing, build_model
from w2v2.plan import Utterances, build_batches, load_utterances
from w2v2.schedule import lr_factor
from w2v2.training import Clock, Feed, UpdateSettings, build_optimizer, train_update

TARGETS = {"pcm_over_flac": 20.0, "wait_fraction": 0.02}
WARM_UP = 1  # updates before waiting is counted: the workers start


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


def cpu_seconds(work: Callable, items: Iterable) -> float:
    started = time.process_time()
    for item in items:
        work(item)
    return time.process_time() - started


def compare_reading(sources: dict[str, Source], args: PretrainArguments, pairs: int) -> dict:
    """CPU seconds of every format and way for the same `pairs` effective batches, one after the other in changing order."""
    batches, cursor = build_batches(next(iter(sources.values())).utterances, args), Cursor()
    cut = dict(rank=0, num_ranks=1, micro_batch_samples=round(args.micro_batch_seconds * SAMPLING_RATE))
    seconds = {(name, way): [] for name in sources for way in WAYS}
    heard, crops_read = [], 0
    for source in sources.values():
        source.read_files()  # into the system's cache
    for pair in range(pairs):
        crops, cursor = batches.draw(cursor)
        plans = plan_update(crops, pair, cursor, **cut)
        heard.append(int(crops.num_samples.sum()) / SAMPLING_RATE)
        crops_read += len(crops.utterance)
        for way in WAYS:
            for name in list(sources) if pair % 2 == 0 else reversed(sources):
                seconds[name, way].append(cpu_seconds(getattr(sources[name], way), plans))
    return {"seconds": seconds, "heard": heard, "crops": crops_read}


def reading_report(sources: dict[str, Source], measured: dict) -> dict:
    """The table of formats, and its figures by name."""
    formats, rows = {}, []
    for name, source in sources.items():
        hours = float(source.num_samples.sum()) / SAMPLING_RATE / 3600
        whole = hours * 3600 / cpu_seconds(lambda _, source=source: source.read_files(), [None])
        took = {way: sum(measured["seconds"][name, way]) for way in WAYS}
        speed = {way: sum(measured["heard"]) / seconds for way, seconds in took.items()}
        formats[name] = {
            "megabytes_per_hour": megabytes_per_hour(source.audio, hours),
            "whole_files": whole,
            **speed,
            "microseconds_per_crop": {way: 1e6 * seconds / measured["crops"] for way, seconds in took.items()},
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


def measure_waiting(source: Source, args: PretrainArguments, framing: Framing, num_updates: int) -> dict[str, float]:
    """Share of the updates' time that they wait for data, and seconds of audio per second."""
    accelerator = start_accelerator(args)
    model = build_model(args, build_config(args))
    model, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    batches, updates = build_batches(source.utterances, args), range(WARM_UP + num_updates)
    cut = dict(rank=0, num_ranks=1, micro_batch_samples=round(args.micro_batch_seconds * SAMPLING_RATE))
    loader = build_loader(
        CropDataset(source.utterances.table, framing, args.seed),
        PlanStream(batches, Cursor(), updates, **cut),
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        pin_memory=accelerator.device.type == "cuda",
    )
    clock = Clock(Feed(loader))
    for step in updates:
        rate = args.learning_rate * lr_factor(step, args.max_steps, args.warmup_steps, args.lr_scheduler_type)
        settings = UpdateSettings(step, args.seed, rate, 2.0, 0.1, shared_diversity=False, max_grad_norm=0.0)
        _, totals, _ = train_update(accelerator, model, optimizer, clock.feed.update(), settings)
        clock.heard_samples += totals.heard_samples
        if step == WARM_UP - 1:
            clock.lap()
    return clock.rates()


def measure_transfer(source: Source, args: PretrainArguments, framing: Framing) -> float:
    """Seconds of audio per second of one effective batch from files through pinned memory onto the GPU."""
    device = torch.device("cuda")
    cut = dict(rank=0, num_ranks=1, micro_batch_samples=round(args.micro_batch_seconds * SAMPLING_RATE))
    stream = PlanStream(build_batches(source.utterances, args), Cursor(), range(3), **cut)
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


def run(flags, folder: Path) -> dict:
    """All measurements, printed as they come. Returns the JSON line's values."""
    if flags.manifest:
        rows = sample_manifest(flags.manifest, flags.data_root, flags.hours)
    else:
        (folder / "wav").mkdir()
        rows = synthesize(folder / "wav", flags.hours)
    manifests = make_formats(rows, folder)
    on_gpu = flags.device == "cuda"
    common = dict(
        train_data=["-"], output_dir=str(folder), config_name=flags.config_name, report_to=["none"], use_cpu=not on_gpu
    )
    common |= dict(dataloader_num_workers=flags.num_workers)
    reading = PretrainArguments(**common)
    training = (
        PretrainArguments(**common) if on_gpu else PretrainArguments(**common, batch_hours=0.04, micro_batch_seconds=20)
    )
    config = build_config(reading)
    framing = build_framing(config, build_feature_extractor(reading, config))
    sources = {
        name: Source(load_utterances([manifest], reading, framing)[0], framing) for name, manifest in manifests.items()
    }
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

    compared = ("flac", "packed")
    waiting = {name: measure_waiting(sources[name], training, framing, flags.updates) for name in compared}
    print(f"\n{flags.updates} updates of {flags.config_name} on the {flags.device}, {flags.num_workers} worker(s)")
    print_table([[n, *waiting[n].values()] for n in compared], ["", "audio s / s", "share of the time spent waiting"])
    transfer = {name: measure_transfer(sources[name], reading, framing) for name in compared} if on_gpu else None
    if transfer:
        print("\nFrom files to the GPU through pinned memory, seconds of audio per second")
        print_table(transfer.items(), ["", "audio s / s"])
    return {
        "pcm_over_flac": ratios["stack_crops"]["median"],
        "wait_fraction": waiting["packed"]["data_wait_fraction"],
        "packed_over_flac": ratios,
        "waiting": waiting,
        "audio_seconds_per_cpu_second": formats,
        "files_to_gpu": transfer,
        "settings": {
            name: getattr(flags, name)
            for name in ("manifest", "pairs", "num_workers", "updates", "config_name", "device")
        }
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
    parser.add_argument("--hours", type=float, default=1.6, help="most audio that is used (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="effective batches to compare on (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=1, help="of the DataLoader (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=6, help="to count waiting in (default: %(default)s)")
    parser.add_argument("--config_name", default="small", help="model to train (default: %(default)s)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    return exit_status(parser.prog, lambda: benchmark(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
