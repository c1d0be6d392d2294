"""Pretrain wav2vec 2.0 (Baevski et al., 2020) from audio alone.

    accelerate launch pretrain.py configs/pretrain/small.yaml --output_dir runs/small

Reads as the method: the utterances and the effective batches drawn from them, the model, the optimizer, then updates,
with validation and checkpoints in between. Batches, crops, masks, distractors and layerdrop follow (seed, epoch,
utterance), dropout and Gumbel noise (seed, update, micro-batch). So a run resumes exactly, and keeps its batches on
another number of devices.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

import gc
import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

from w2v2.arguments import PretrainArguments
from w2v2.audio.crops import SAMPLING_RATE
from w2v2.cli import parse_command_line, run_script
from w2v2.data.batching import MicroBatchPlan, PlanStream, plan_validation
from w2v2.data.collate import CropDataset, Framing
from w2v2.data.filling import FilledCrops
from w2v2.data.loader import build_loader, end_workers
from w2v2.data.sampling import build_batches
from w2v2.data.streaming import FetchAhead, StreamedCrops
from w2v2.data.utterances import Utterances, inspect_some, load_utterances
from w2v2.evaluate.plots import draw_plots
from w2v2.hub.card import write_model_card
from w2v2.hub.push import HubPusher
from w2v2.model.cpu import give_back
from w2v2.model.loading import build_config, load_feature_extractor
from w2v2.model.pretraining import build_model
from w2v2.plan.expectations import BandWatch, advise_stop
from w2v2.plan.plan import RunPlan, describe_mixture, write_config
from w2v2.plan.speed import measure_speed
from w2v2.report.page import report_at_end
from w2v2.train.capture import CapturedStep, check_capture, find_run_sizes
from w2v2.train.checkpoint import load_optimizer, save_checkpoint, save_model
from w2v2.train.collapse import CollapseWatch
from w2v2.train.events import EventLog, name_device
from w2v2.train.identity import check_agreement, identity
from w2v2.train.launch import Stopped, StopRequest, end_training, on_main_process, prepare_model, start_accelerator
from w2v2.train.log import RunLog, announce, read_metrics
from w2v2.train.micro_batch import find_micro_batch
from w2v2.train.records import CodebookUse, SkippedAudio, SkippedUpdates, SkippedValidation
from w2v2.train.run_folder import prepare_run_folder
from w2v2.train.schedule import UpdateSettings
from w2v2.train.state import VALIDATION_SEED, RunState
from w2v2.train.trackers import check_trackers, start_trackers
from w2v2.train.update import Feed, build_optimizer, train_update, validate

SKIPPED = {"train_data": SkippedAudio, "validation_data": SkippedValidation}  # flag → what lists its unreadable files


@dataclass
class Run:
    """What the stages of a run share."""

    args: PretrainArguments
    config: Wav2Vec2Config
    accelerator: Accelerator
    model: torch.nn.Module  # prepared: wrapped for several devices
    optimizer: torch.optim.Optimizer  # likewise
    feature_extractor: Wav2Vec2FeatureExtractor
    framing: Framing
    state: RunState
    training: Utterances
    validation: Utterances | None
    band: BandWatch
    captured: CapturedStep | None = None

    def load(self, utterances: Utterances, plans: Iterable[MicroBatchPlan], seed: int, sizes=None) -> DataLoader:
        """The micro-batches of `plans`, decoded ahead of time, filled up to `sizes`."""
        shards, dataset = utterances.shards, CropDataset(utterances.table, self.framing, seed)
        if shards:
            dataset = StreamedCrops(utterances.table, self.framing, seed, shards)
        return build_loader(
            FilledCrops(dataset, sizes) if sizes else dataset,
            FetchAhead(plans, shards) if shards else plans,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    @property
    def cut_arguments(self) -> dict[str, int]:
        """How this process's part of an effective batch is cut out of it."""
        return dict(
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            micro_batch_samples=round(self.state.micro_batch_seconds * SAMPLING_RATE),
        )


def main() -> None:
    (args,) = parse_command_line([PretrainArguments])
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    check_trackers(args.report_to)
    accelerator = start_accelerator(args)
    events = EventLog(args, accelerator)
    with report_at_end(args, events), events:
        pretrain(args, accelerator, events)


def pretrain(args: PretrainArguments, accelerator: Accelerator, events: EventLog) -> None:
    """The run, stage by stage."""
    if args.cuda_graph:
        check_capture(args, accelerator)
    checkpoint = prepare_run_folder(args, accelerator)

    # 1. The model's configuration: how many frames a waveform makes, and what is masked.
    config = build_config(args)
    feature_extractor = load_feature_extractor(config.name_or_path, config)
    framing = Framing(config, feature_extractor.do_normalize)

    # 2. The utterances, and the effective batches that are drawn from them.
    with accelerator.main_process_first():
        manifests = {flag: found for flag in SKIPPED if (found := args.list_sources(flag))}
        data = {
            flag: load_utterances(found, args, framing, streaming=args.streaming and flag == "train_data")
            for flag, found in manifests.items()
        }
    training, validation = data["train_data"][0], data.get("validation_data", (None, []))[0]
    batches = build_batches(training, args)
    plan = RunPlan(args, config, accelerator, data)
    if args.dry_run and not args.num_probed:
        return plan.present(args.micro_batch_seconds)

    # 3. Model and optimizer: fresh, from given weights, or as the checkpoint has them.
    state = RunState.start(args, training, config, checkpoint, accelerator.mixed_precision)
    check_agreement([state.identity, validation and identity(args, validation)])
    set_seed(args.seed)
    model = build_model(args, config, checkpoint)
    model, optimizer = prepare_model(accelerator, model, build_optimizer(model, args), bare=args.cuda_graph)
    band = BandWatch(args, config, accelerator, state.step)
    run = Run(
        args, config, accelerator, model, optimizer, feature_extractor, framing, state, training, validation, band
    )

    # 4. The size of a micro-batch: how much audio a device holds, and so how the effective batch is cut; and its speed.
    state.micro_batch_seconds = args.micro_batch_seconds or find_micro_batch(run, batches)
    state.num_processes = accelerator.num_processes
    sizes = None
    if args.cuda_graph:
        sizes, run.captured = find_run_sizes(run, batches), CapturedStep(accelerator, model)
        seconds = sizes.slots * framing.slot / SAMPLING_RATE
        announce(accelerator, f"cuda graph    of micro-batches of {seconds:.1f} s, up to {sizes.utterances} utterances")
    gc.collect()
    gc.freeze()  # a million objects of libraries and model, which every full collection would look through again
    gc.collect()
    plan.present(state.micro_batch_seconds, measure_speed(run, batches, sizes))
    if args.dry_run:
        return
    if checkpoint:
        load_optimizer(checkpoint, accelerator, model, optimizer)
    looks = on_main_process(
        accelerator, lambda: {flag: inspect_some(found.at_hand) for flag, (found, _) in data.items()}
    )
    skipped = {
        flag: SKIPPED[flag](args, accelerator, len(found.table) + len(unread), unread + looks[flag], state.step)
        for flag, (found, unread) in data.items()
    }
    pusher = HubPusher(args) if args.push_to_hub and accelerator.is_main_process else None
    if accelerator.is_main_process:
        write_config(args, state.micro_batch_seconds)

    # 5. Updates until `max_steps`, or until the run is asked to stop.
    events.begin(state, checkpoint)
    plans = PlanStream(batches, state.cursor, range(state.step, args.max_steps), **run.cut_arguments)
    feed = Feed(run.load(training, plans, args.seed, sizes))
    with StopRequest(args.max_hours) as stop:
        train(run, feed, skipped, pusher, stop)
        if state.step == args.max_steps:
            finish(run, pusher)
    if run.captured and run.captured.num_eager:
        announce(
            accelerator, f"cuda graph    {run.captured.num_eager:,} micro-batches did not fit into it and ran without"
        )
    end_training(accelerator)
    if state.step < args.max_steps:
        if pusher:
            pusher.finish(timeout_seconds=10)  # who asked for the stop will not wait long
        raise Stopped(
            f"stopped after update {state.step:,} of {args.max_steps:,} ({stop.reason}); it goes on with --resume_from_checkpoint auto"
        )


def train(run: Run, feed: Feed, skipped: dict[str, SkippedAudio], pusher: HubPusher | None, stop: StopRequest) -> None:
    """Updates, each followed by what is due: a line of the log, a checkpoint (when asked to stop too), a validation."""
    args, accelerator, state = run.args, run.accelerator, run.state
    start_trackers(accelerator, args, state.step)
    with ExitStack() as files:
        log = RunLog(args, accelerator, state.step)
        skipped_updates = SkippedUpdates(args, accelerator, run.training.table, state.step)
        use = CodebookUse(args, accelerator, state.step)
        records = [log.records, skipped_updates.records, use.records, *(audio.records for audio in skipped.values())]
        for close in (feed.close, log.close, *(lines.sync for lines in records)):
            files.callback(close)
        watch = CollapseWatch(args, run.config, run.training, accelerator, first_step=state.step)
        validation, is_stopping = None, False
        if run.validation:
            plans = plan_validation(build_batches(run.validation, args, VALIDATION_SEED), **run.cut_arguments)
            validation = run.load(run.validation, plans, VALIDATION_SEED)
            files.callback(end_workers, validation)
            if state.step and state.is_due(args.eval_steps) and on_main_process(accelerator, log.lacks_validation):
                run_validation(run, validation, log, use, skipped["validation_data"])  # it ended right after its save
        feed.restart()
        while state.step < args.max_steps and not is_stopping:
            # ------------------------------------------------------------------------------- one update
            settings = UpdateSettings.at(state.step, args, run.config.diversity_loss_weight)
            metrics, totals = train_update(
                accelerator, run.captured or run.model, run.optimizer, feed.update(), settings, stop
            )
            counts = totals.counts
            state.advance(feed.cursor, int(counts.heard_samples))
            if not validation:
                use.add(totals)
            # ------------------------------------------------------------------------------- what it skipped
            if counts.num_skipped:
                skipped["train_data"].add(gather_object(totals.skipped), state.step)
            state.skipped_updates += skipped_updates.note(state.step, metrics, totals)
            # ------------------------------------------------------------------------------- what is due
            is_stopping = counts.stops_asked > 0 and state.step < args.max_steps
            feed.heard_samples += int(counts.heard_samples)
            record = state.progress() | metrics | {"skipped_audio": len(skipped["train_data"].ids)}
            record |= {"skipped_updates": state.skipped_updates, "num_processes": accelerator.num_processes}
            log.update(record | feed.rates())
            if state.is_due(args.logging_steps) or state.step == 1:
                log.write(record | feed.rates())
                feed.restart()
                watch.see(record)  # raises where the codes have collapsed, or nothing is learned
                give_back()  # micro-batches of many lengths leave gaps in the heap
            if state.is_due(args.save_steps) or is_stopping:
                use.write(state.progress())
                for lines in records:
                    lines.sync()
                on_failure = "stop" if is_stopping else args.save_failure
                folder = save_checkpoint(args.output_dir, run, watch.keep(args.save_total_limit), on_failure)
                if pusher and folder:
                    pusher.push(folder, f"Weights after {state.step} updates")
                feed.restart()  # neither saving nor validation counts as throughput
            if validation and state.is_due(args.eval_steps):
                run_validation(run, validation, log, use, skipped["validation_data"])
                feed.restart()


def run_validation(run: Run, validation: DataLoader, log: RunLog, use: CodebookUse, skipped: SkippedAudio) -> None:
    """Log a validation after the update at hand, with that update's weight of the diversity loss."""
    weight = UpdateSettings.at(run.state.step - 1, run.args, run.config.diversity_loss_weight).diversity_weight
    metrics, totals = validate(run.accelerator, run.model, validation, weight)
    if totals.counts.num_skipped:
        skipped.add(gather_object(totals.skipped), run.state.step)
    use.add(totals)
    use.write(run.state.progress())
    record = run.state.progress() | metrics
    log.write(record)
    run.band.see(record)


def finish(run: Run, pusher: HubPusher | None) -> None:
    """The folder that users load, with its card, curves and resolved configuration; then the last push."""
    args, accelerator, output_dir = run.args, run.accelerator, Path(run.args.output_dir)
    save_model(output_dir, accelerator, run.model, run.feature_extractor)
    announce(accelerator, f"model         {output_dir}, for AutoModel.from_pretrained")
    if not accelerator.is_main_process:
        return
    metrics = read_metrics(output_dir / "metrics.jsonl")
    draw_plots(output_dir, metrics)
    for line in advise_stop(metrics, args, run.config):
        announce(accelerator, f"more hours    {line}")
    dropped = {reason.replace("_", " "): count for reason, count in run.training.dropped.items() if count}
    summary = dict(
        dropped=", ".join(f"{count:,} {reason}" for reason, count in dropped.items()),
        mixture=describe_mixture(run.training, args),
        utterances=len(run.training.table),
        hours=run.training.hours,
        devices=f"{accelerator.num_processes} × {name_device(accelerator.device)}",
        num_parameters=accelerator.unwrap_model(run.model).num_parameters(),
    )
    if run.validation:
        summary |= dict(validation_utterances=len(run.validation.table), validation_hours=run.validation.hours)
    config = vars(args) | args.describe_sources() | {"micro_batch_seconds": run.state.micro_batch_seconds}
    write_model_card(output_dir, config=config, summary=summary, metrics=metrics)
    if pusher:
        pusher.push(output_dir, f"Model after {args.max_steps} updates")
        announce(accelerator, f"pushed to     {pusher.finish() or 'nowhere: see the warnings above'}")


if __name__ == "__main__":
    run_script(main)
