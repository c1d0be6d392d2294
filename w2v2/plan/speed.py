"""The speed of a run, measured in a few of its own updates that leave no trace.

They draw, decode and compute what the run's next updates will, at a learning rate of zero. So the weights stay as they
are to the bit, and the moments are dropped afterwards.
"""

import gc
import resource
import sys
import time
from dataclasses import replace
from statistics import mean

import torch

from w2v2.data.batching import EffectiveBatches, PlanStream, plan_validation
from w2v2.data.loader import end_workers
from w2v2.data.sampling import build_batches
from w2v2.errors import UserError
from w2v2.train.launch import StopRequest
from w2v2.train.log import announce
from w2v2.train.schedule import UpdateSettings
from w2v2.train.state import VALIDATION_SEED
from w2v2.train.update import Feed, train_update, validate

UNCOUNTED = 3  # updates at first, in which memory is allocated and kernels are chosen
LONGEST_PROBE = 120  # seconds, after which no further update is begun
VALIDATED = 4  # micro-batches of a validation that are timed


def measure_speed(run, batches: EffectiveBatches, sizes=None) -> dict[str, float] | None:
    """Time `num_probed` of the run's own; what they mean for all that are left, as `probe` in plan.json (0: None).

    After two minutes no further update begins. Where none counted by then, the last one does.
    `run` is `pretrain.Run`, whose optimizer has no state yet. Call on all ranks.
    """
    if not (num_updates := run.args.num_probed):
        return None
    state, accelerator, scaler = run.state, run.accelerator, run.accelerator.scaler
    scale = scaler.state_dict() if scaler else None
    settings = UpdateSettings.at(state.step, run.args, run.config.diversity_loss_weight)
    settings = replace(settings, learning_rate=0.0)
    # More than are taken: the last ones are decoded beside others, as in the run.
    plans = PlanStream(batches, state.cursor, range(state.step, sys.maxsize), **run.cut_arguments)
    feed, seconds = Feed(run.load(run.training, plans, run.args.seed, sizes)), []
    announce(
        accelerator,
        f"probe         times up to {num_updates} updates of {run.args.batch_hours:g} h, after {UNCOUNTED} that do not count; Ctrl-C leaves",
    )
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).reset_peak_memory_stats(accelerator.device)
    limit = StopRequest(LONGEST_PROBE / 3600)
    for number in range(UNCOUNTED + num_updates):
        if number <= UNCOUNTED:
            feed.restart()  # so its rates are of the updates that count, or else of the last one
        started = time.perf_counter()
        _, totals = train_update(accelerator, run.captured or run.model, run.optimizer, feed.update(), settings, limit)
        seconds.append(time.perf_counter() - started)
        feed.heard_samples += int(totals.counts.heard_samples)
        if totals.counts.stops_asked:
            break
    rates, seconds = feed.rates(), seconds[UNCOUNTED:] or seconds[-1:]
    feed.close()
    validation = time_validation(run) if run.validation else 0.0
    if scaler:
        scaler.load_state_dict(scale)
    run.optimizer.state.clear()
    if run.captured:
        run.captured.num_eager = 0  # the run counts its own
    gc.collect()

    left, every = run.args.max_steps - state.step, run.args.eval_steps
    validations = (-(-run.args.max_steps // every) - state.step // every) if run.validation else 0
    hours = (left * mean(seconds) + validations * validation) / 3600
    return rates | {
        "updates": len(seconds),
        "seconds_per_update": mean(seconds),
        "fastest_update": min(seconds),
        "slowest_update": max(seconds),
        "updates_left": left,
        "validations": validations,
        "validation_seconds": validation,
        "run_hours": hours,
        "device_hours": hours * accelerator.num_processes,
        "peak_memory_gb": find_peak(accelerator.device) / 1e9,
    }


def time_validation(run) -> float:
    """Seconds of a whole validation, from micro-batches out of all of it, heard once before they are timed.

    0 where none of them can be read: the run may read others.
    """
    plans = plan_validation(build_batches(run.validation, run.args, VALIDATION_SEED), **run.cut_arguments)
    some = plans[:: -(-len(plans) // VALIDATED)]
    loader = run.load(run.validation, some, VALIDATION_SEED)
    try:
        for _ in range(2):
            started = time.perf_counter()
            validate(run.accelerator, run.model, loader, 0.0)
            seconds = time.perf_counter() - started
    except UserError as error:
        announce(run.accelerator, f"probe         takes no time of validations into account: {error}")
        return 0.0
    finally:
        end_workers(loader)
    return seconds * len(plans) / len(some)


def find_peak(device: torch.device) -> int:
    """Most bytes that this process has held: of the device since its peak was reset, or of the machine on a CPU."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.get_device_module(device).max_memory_allocated(device)
