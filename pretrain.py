"""Pretrain wav2vec 2.0 (Baevski et al., 2020) from audio alone.

    accelerate launch pretrain.py configs/pretrain/small.yaml --output_dir runs/small

Reads as the method: the utterances and the effective batches drawn from them, the model, the optimizer, then updates, with validation
and checkpoints in between. Everything random is a function of (seed, epoch, utterance), so a run resumes exactly, on any number of
devices.
"""

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from transformers import Wav2Vec2FeatureExtractor

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line, run_script
from w2v2.data.audio import SAMPLING_RATE
from w2v2.data.batching import EffectiveBatches, MicroBatchPlan, PlanStream, plan_validation
from w2v2.data.collate import CropDataset, Framing
from w2v2.data.loader import build_loader
from w2v2.data.utterances import Utterances, check_validation, load_utterances, probe_some
from w2v2.hub.push import HubPusher, draw_plots, write_model_card
from w2v2.model.config import build_config
from w2v2.model.cpu import give_back
from w2v2.model.loading import build_feature_extractor, build_framing, build_model
from w2v2.train import heartbeat, memory, sharding
from w2v2.train.checkpoint import load_optimizer, save_checkpoint, save_model
from w2v2.train.launch import device_name, end_training, start_accelerator, start_trackers
from w2v2.train.log import RunLog, read_metrics
from w2v2.train.micro_batch import Trial, fit, share
from w2v2.train.plan import build_batches, present_plan
from w2v2.train.resuming import choose_checkpoint
from w2v2.train.run_folder import claim
from w2v2.train.schedule import gumbel_temperature, lr_factor, ramp
from w2v2.train.skipped import SkippedAudio, SkippedUpdates
from w2v2.train.state import RunState
from w2v2.train.stop import Stopped, StopRequest
from w2v2.train.update import Clock, Feed, UpdateSettings, build_optimizer, train_update, validate
from w2v2.train.watch import Watch


def main() -> None:
    (args,) = parse_command_line([PretrainArguments])
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    accelerator = start_accelerator(args)
    output_dir = Path(args.output_dir)
    claim(args, accelerator)

    # The model's configuration says how many frames a waveform makes, and what is masked.
    config = build_config(args)
    feature_extractor = build_feature_extractor(args, config)
    framing = build_framing(config, feature_extractor)

    # The utterances, and the effective batches that are drawn from them.
    heartbeat.at("reading the manifests")
    with accelerator.main_process_first():
        training, unreadable = load_utterances(args.train_data, args, framing)
        validation, lost = load_utterances(args.validation_data, args, framing) if args.validation_data else (None, [])
    batches = build_batches(training, args)
    is_fitted = args.micro_batch_seconds == "auto"
    if args.dry_run or not is_fitted:
        present_plan(training, batches, args, accelerator)
    if args.dry_run:
        return

    if validation:
        check_validation(validation, lost, args.max_skipped_fraction)

    # Model and optimizer: fresh, from given weights, or as the checkpoint has them.
    heartbeat.at("building the model")
    checkpoint = choose_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    state = RunState.start(args, training, config, checkpoint)
    num_files = len(training.table) + len(unreadable)
    found = unreadable + probe_some(training)
    skipped = SkippedAudio(
        output_dir, num_files, args.max_skipped_fraction, state.step, found, is_main=accelerator.is_main_process
    )
    set_seed(args.seed)
    model = build_model(args, config, checkpoint)
    model, optimizer = sharding.prepare(accelerator, model, build_optimizer(model, args))
    if checkpoint:
        load_optimizer(checkpoint, accelerator, model, optimizer)
        accelerator.print(f"resuming      {checkpoint}, after {state.step:,} updates")
        if state.changes:
            accelerator.print(f"warning       other batches from here on, as accepted: {', '.join(state.changes)}")

    run = Run(args, accelerator, model, optimizer, feature_extractor, framing, state)
    if is_fitted:
        args.micro_batch_seconds = fit_micro_batch(run, batches, validation)
        present_plan(training, batches, args, accelerator)
    state.micro_batch_seconds, state.num_processes = args.micro_batch_seconds, accelerator.num_processes
    pusher = start_pusher(args, accelerator)
    write_config(args, accelerator)
    with memory.settled():
        feed = Feed(training_loader(run, training, batches))
        with StopRequest(args.max_hours) as stop, ExitStack() as files:
            train(run, training, feed, validation_loader(run, validation), skipped, pusher, stop, files)
            if state.step == args.max_steps:
                finish(run, training, validation, pusher)
    end_training(accelerator)
    if state.step < args.max_steps:
        if pusher:
            pusher.finish(timeout_seconds=10)  # who asked will not wait long
        raise Stopped(
            f"stopped after update {state.step:,} of {args.max_steps:,} ({stop.reason}); it goes on with --resume_from_checkpoint auto"
        )


@dataclass
class Run:
    """What the stages of a run share."""

    args: PretrainArguments
    accelerator: Accelerator
    model: torch.nn.Module  # prepared: wrapped for several devices
    optimizer: torch.optim.Optimizer  # likewise
    feature_extractor: Wav2Vec2FeatureExtractor
    framing: Framing
    state: RunState

    def load(self, utterances: Utterances, plans: Iterable[MicroBatchPlan]) -> DataLoader:
        """The micro-batches of `plans`, decoded ahead of time."""
        return build_loader(
            CropDataset(utterances.table, self.framing, self.args.seed),
            plans,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    @property
    def cut(self) -> dict[str, int]:
        """How this process's part of an effective batch is cut out of it."""
        return dict(
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            micro_batch_samples=round(self.args.micro_batch_seconds * self.framing.sampling_rate),
        )


def fit_micro_batch(run: Run, batches: EffectiveBatches, validation: Utterances | None) -> float:
    """The number of seconds in the place of `--micro_batch_seconds auto`: the checkpoint's, or what the devices hold.

    Dropout and Gumbel noise follow the cut, so only with the same number does a run go on bit for bit.
    """
    accelerator, state, seconds = run.accelerator, run.state, run.state.micro_batch_seconds
    longest = max([batches.longest] + ([build_batches(validation, run.args).longest] if validation else []))
    is_known = seconds is not None and seconds * SAMPLING_RATE >= longest
    if is_known and state.num_processes == accelerator.num_processes:
        accelerator.print(f"micro-batch   auto: {seconds:.1f} s, as before the checkpoint")
        return seconds
    settings = update_settings(run.args, run.model, state.step)
    trial = Trial(accelerator, run.model, run.optimizer, run.framing, settings, longest, batches.grid_samples)
    seconds, finding = fit(trial, share(batches, longest, accelerator.num_processes))
    accelerator.print(f"micro-batch   auto: {finding}")
    return seconds


def training_loader(run: Run, training: Utterances, batches: EffectiveBatches) -> DataLoader:
    """This process's micro-batches of all updates to come."""
    updates = range(run.state.step, run.args.max_steps)
    return run.load(training, PlanStream(batches, run.state.cursor, updates, **run.cut))


def validation_loader(run: Run, validation: Utterances | None) -> DataLoader | None:
    """This process's part of the validation set, the same every time."""
    return run.load(validation, plan_validation(build_batches(validation, run.args), **run.cut)) if validation else None


def train(
    run: Run,
    training: Utterances,
    feed: Feed,
    validation: DataLoader | None,
    skipped: SkippedAudio,
    pusher: HubPusher | None,
    stop: StopRequest,
    files: ExitStack,
) -> None:
    """Updates until `max_steps`; what is due after an update is logged, validated and saved in this order.

    A run that is asked to stop saves after the update at hand; a validation that is due then is made good at its resumption. What the run
    writes line by line is left to `files` to close, however it ends.
    """
    args, accelerator, state = run.args, run.accelerator, run.state
    start_trackers(accelerator, args, state.step)
    log = RunLog(
        args.output_dir,
        total_steps=args.max_steps,
        first_step=state.step,
        owes_validation=bool(validation) and state.owes_validation,
        trackers=accelerator,
        is_main=accelerator.is_main_process,
        disable_tqdm=args.disable_tqdm,
    )
    skipped_updates = SkippedUpdates(
        args.output_dir, training.table, args.max_non_finite_updates, accelerator, first_step=state.step
    )
    lines = (log.records, skipped.records, skipped_updates.records)
    files.callback(log.close)
    for records in lines:
        files.callback(records.close)
    watch = Watch(args, accelerator.unwrap_model(run.model).config, training, accelerator, first_step=state.step)
    clock = Clock(feed)
    if validation and state.owes_validation:
        settings = update_settings(args, run.model, state.step - 1)
        log.write(state.progress() | validate(accelerator, run.model, validation, settings))
    state.owes_validation = is_stopping = False
    while state.step < args.max_steps and not is_stopping:
        settings = update_settings(args, run.model, state.step)
        metrics, totals, heard = train_update(accelerator, run.model, run.optimizer, feed.update(), settings, stop)
        if totals.num_skipped:
            skipped.add(gather_object(heard.skipped), state.step + 1)
        state.skipped_updates += skipped_updates.note(state.step + 1, metrics, heard)
        state.advance(feed.cursor, totals.heard_samples)
        is_stopping = totals.is_stop_asked and state.step < args.max_steps
        clock.heard_samples += totals.heard_samples
        record = (
            state.progress()
            | metrics
            | {"skipped_audio": len(skipped.ids), "skipped_updates": state.skipped_updates}
            | {"num_processes": accelerator.num_processes}
        )
        log.update(record | clock.rates())
        if state.is_due(args.logging_steps) or state.step == 1:
            log.write(record | clock.lap())
            watch.see(record)
            give_back()  # what micro-batches of many lengths left in the heap
        if validation and state.is_due(args.eval_steps) and is_stopping:
            state.owes_validation = True
        elif validation and state.is_due(args.eval_steps):
            log.write(state.progress() | validate(accelerator, run.model, validation, settings))
            clock.lap()
        if state.is_due(args.save_steps) or is_stopping:
            heartbeat.at(f"saving checkpoint-{state.step}")
            for records in lines:
                records.sync()
            folder = save_checkpoint(
                args.output_dir,
                accelerator,
                run.model,
                run.optimizer,
                run.feature_extractor,
                state,
                watch.keep(args.save_total_limit),
                "stop" if is_stopping else args.save_failure,
            )
            if pusher and folder:
                pusher.push(folder, f"Weights after {state.step} updates")
            clock.lap()
    log.close()
    for records in lines:
        records.close()


def update_settings(args, model, step: int) -> UpdateSettings:
    """What the schedules say for the update that follows `step` finished ones."""
    weight = getattr(model, "module", model).config.diversity_loss_weight
    return UpdateSettings(
        step=step,
        seed=args.seed,
        learning_rate=args.learning_rate * lr_factor(step, args.max_steps, args.warmup_steps, args.lr_scheduler_type),
        gumbel_temperature=gumbel_temperature(
            step, args.max_gumbel_temperature, args.min_gumbel_temperature, args.gumbel_temperature_decay
        ),
        diversity_weight=weight * ramp(step, args.diversity_delay_steps, args.diversity_warmup_steps),
        shared_diversity=args.diversity_scope == "effective_batch",
        max_grad_norm=args.max_grad_norm,
    )


def write_config(args, accelerator) -> None:
    """The resolved flags, for a run to be repeated with; what concerned the output folder's past is left out.

    In the place of `micro_batch_seconds: auto` stands what was found: a repeated run cuts alike.
    """
    once = ("overwrite_output_dir", "resume_from_checkpoint", "accept_changed_batches", "dry_run")
    flags = {name: value for name, value in vars(args).items() if name not in once}
    if accelerator.is_main_process:
        text = yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)
        (Path(args.output_dir) / "pretrain_config.yaml").write_text(text, encoding="utf-8")


def start_pusher(args, accelerator) -> HubPusher | None:
    if not args.push_to_hub or not accelerator.is_main_process:
        return None
    return HubPusher(
        args.output_dir,
        repo_id=args.hub_model_id,
        private=args.hub_private_repo or None,  # None: as the account's default says
        every_save=args.hub_strategy == "every_save",
    )


def finish(run: Run, training: Utterances, validation: Utterances | None, pusher: HubPusher | None) -> None:
    """The folder that users load, with its card, curves and resolved configuration; then the last push."""
    args, accelerator, output_dir = run.args, run.accelerator, Path(run.args.output_dir)
    heartbeat.at("saving the model")
    save_model(output_dir, accelerator, run.model, run.feature_extractor)
    if not accelerator.is_main_process:
        return
    metrics = read_metrics(output_dir / "metrics.jsonl")
    draw_plots(output_dir, metrics)
    summary = dict(utterances=len(training.table), hours=training.hours)
    summary["devices"] = f"{accelerator.num_processes} × {device_name(accelerator.device)}"
    summary["num_parameters"] = accelerator.unwrap_model(run.model).num_parameters()
    if validation:
        summary |= dict(validation_utterances=len(validation.table), validation_hours=validation.hours)
    write_model_card(output_dir, config=vars(args), summary=summary, metrics=metrics)
    if pusher:
        pusher.push(output_dir, f"Model after {args.max_steps} updates")
        print(f"pushed to     {pusher.finish() or 'nowhere: see the warnings above'}")


if __name__ == "__main__":
    run_script(main)
