"""A plan in lines for people."""

from collections.abc import Iterator
from typing import Any

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import LATENT_STRIDE
from w2v2.data.shards import describe_shards


def describe(plan: dict[str, Any]) -> str:
    """The plan of plan.json: a line for each thing to know, two for a warning, the second with what to do."""
    rows = [*_describe_data(plan), *_describe_updates(plan)]
    rows += [describe_shards(plan["streaming"])] if "streaming" in plan else []
    rows += [_describe_resources(plan["resources"])] if "resources" in plan else []
    rows += _describe_speed(plan["probe"]) if "probe" in plan else []
    if "proposal" in plan:
        rows.append(plan["proposal"]["text"])
    elif "budget" in plan:
        rows.append(f"budget        {plan['budget']['text']}")
    for warning in plan["warnings"]:
        message, remedy = warning["message"], warning["remedy"]
        if remedy:
            rows += [f"warning       {message}", f"{'':14}{remedy}"]
        elif warning["code"] != "manifest":  # the reader of manifests has said its own already
            rows.append(f"note          {message}")
    return "\n".join(rows)


def _describe_data(plan: dict[str, Any]) -> Iterator[str]:
    for name, part in {"data": plan, "validation": plan.get("validation")}.items():
        if part:
            left_out = [
                f"{count:,} {reason}" + _say_more(part["dropped_hours"].get(reason))
                for reason, count in part["dropped"].items()
            ]
            said = f" (left out: {'; '.join(left_out)})" if left_out else ""
            yield f"{name:14}{part['hours']:,.2f} h in {part['utterances']:,} utterances{said}"
    for source in plan.get("sources", []):
        left_out = f"{source['dropped']:,}{_say_more(source['dropped_hours'])}"
        said = f" (left out: {left_out})" if source["dropped"] else ""
        yield (
            f"source        {name_source(source)}: {source['share']:.2%} of what is heard; {source['hours']:,.2f} h in "
            f"{source['utterances']:,} utterances{said}, each heard {source['repetitions_per_epoch']:,.2f} times an epoch, "
            f"{source['repetitions']:,.1f} in the run"
        )


def _describe_updates(plan: dict[str, Any]) -> Iterator[str]:
    seconds = plan["micro_batch_size"]["slots"] * LATENT_STRIDE / SAMPLING_RATE
    draws = sum(source["draws_per_epoch"] for source in plan.get("sources", []))
    epoch = f" ({draws:,} draws, about as many hours as the sources hold)" if draws else ""
    yield (
        f"update        {plan['batch_hours']:.3f} h of speech in {plan['micro_batches_per_update']:.1f} micro-batches of at most "
        f"{seconds:.1f} s on each of {plan['num_processes']} device(s), {plan['padded_fraction']:.1%} padding, "
        f"{plan['cropped_fraction']:.1%} cropped away"
    )
    each = plan["updates_per_epoch"]
    pace = f"{each:,.1f} updates an epoch{epoch}" if each >= 1 else f"{1 / each:,.1f} epochs{epoch} an update"
    heard = f"{plan['max_steps']:,} updates hear {say_hours(plan['hours_to_hear'])}"
    yield f"run           {heard}: {pace}, {plan['epochs']:,.1f} epochs"


def _describe_resources(found: dict[str, float]) -> str:
    return (
        f"takes         {say_size(found['disk_gb'])} of disk ({found['checkpoints']} checkpoints of {say_size(found['checkpoint_gb'])}; "
        f"{say_size(found['free_disk_gb'])} are free), and of a device's memory {say_size(found['memory_gb'])} for "
        f"{found['parameters'] / 1e6:,.1f} M parameters besides a micro-batch's activations"
    )


def _describe_speed(probe: dict[str, float]) -> Iterator[str]:
    """What the probe measured, and what it means for the run."""
    yield (
        f"speed         {probe['seconds_per_update']:.3g} s an update ({probe['fastest_update']:.3g} to {probe['slowest_update']:.3g} in "
        f"{probe['updates']}), {probe['audio_seconds_per_second']:,.0f} x real time, {probe['data_wait_fraction']:.0%} of it waiting for "
        f"audio; this process held {say_size(probe['peak_memory_gb'])} of memory at most"
    )
    validations = f" and {probe['validations']:,} validation(s) of {say_time(probe['validation_seconds'])}"
    yield (
        f"time          {say_time(3600 * probe['run_hours'])} for {probe['updates_left']:,} updates"
        f"{validations if probe['validations'] else ''}: {probe['device_hours']:.3g} device-hours; start and saves are left out"
    )


def _say_more(hours: float | None) -> str:
    return "" if hours is None else f", {say_hours(hours)}"


def name_source(source: dict[str, Any]) -> str:
    return source["name"] + (f" ({source['language']})" if source["language"] else "")


def say_hours(hours: float) -> str:
    return f"{hours:,.2f} h" if hours < 100 else f"{hours:,.0f} h"


def say_time(seconds: float) -> str:
    """In the largest unit that it has two of."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def say_size(gigabytes: float) -> str:
    if gigabytes < 1:
        return f"{1e3 * gigabytes:.0f} MB"
    return f"{gigabytes:,.0f} GB" if gigabytes >= 100 else f"{gigabytes:.2f} GB"
