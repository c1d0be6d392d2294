"""What is in a corpus, and what of it pretraining would leave out or had better not hear.

    python data_scripts/describe_data.py data/train.csv --output_dir data/description
    python data_scripts/describe_data.py corpora/*.csv --sample 20000

MANIFEST is a manifest, a tar or a folder, as pretrain.py takes them. Lengths, speakers and languages are those of all utterances;
sampling rates, channels and codecs those of all files, by their headers. The content of --sample utterances, evenly
spread, is decoded, of each its first 30 seconds: level, clipping, silence and repetitions. Repetitions are found among
these alone: exact ones by their samples, near ones (another codec, level or edges) by their fingerprints.

Everything is printed; --output_dir also gets description.json and description.png: histograms, and spectrograms of
typical and of suspicious utterances (these need librosa: pip install librosa).
"""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from corpus_files import Parser, open_atomic
from description_plots import draw_description
from listening import LOOKED_SECONDS, REASONS, look_into, mark_repetitions

from w2v2.audio.crops import MAX_PADDING, MAX_SHIFT, SAMPLING_RATE, AudioError
from w2v2.audio.decoding import open_sound
from w2v2.audio.inspection import map_files
from w2v2.errors import UserError, number, printable
from w2v2.manifests.manifest import read_manifests

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
MOST_NAMED = 10  # languages, codecs, examples
HOUR = 3600 * SAMPLING_RATE  # samples


def read_header(path: str) -> dict:
    """Rate, channels, codec, and the length in samples at 16 kHz where the header tells it; or why there is none."""
    try:
        with open_sound(path) as file:
            length = file.num_frames and file.num_frames * SAMPLING_RATE // file.rate
            return {"rate": file.rate, "channels": file.channels, "codec": file.codec, "length": length}
    except AudioError as error:
        return {"error": error.reason}


def describe_files(table: pa.Table, unmeasured: list[dict]) -> tuple[dict, np.ndarray]:
    """What the headers of all files say; and of each row, whether its file cannot serve it."""
    paths = pc.unique(table["audio"]).to_pylist()
    names = ("rate", "channels", "codec")
    counts, lengths, errors = {name: Counter() for name in names}, {}, {}
    for path, header in zip(paths, map_files(paths, read_header, "Reading headers"), strict=True):
        if "error" in header:
            errors[path] = header["error"]
            continue
        for name in names:
            counts[name][str(header[name])] += 1
        if header["length"]:
            lengths[path] = header["length"] + MAX_SHIFT + MAX_PADDING
    ends = np.round(table["start"].to_numpy() * SAMPLING_RATE) + table["num_samples"].to_numpy()
    most = np.array([-1 if path in errors else lengths.get(path, np.inf) for path in table["audio"].to_pylist()])
    bad = errors | {row["audio"]: row["reason"] for row in unmeasured}
    examples = [{"audio": path, "reason": reason} for path, reason in list(bad.items())[:MOST_NAMED]]
    files = {"files": len({*paths, *bad}), "unreadable": len(bad), "unreadable_examples": examples}
    return files | {name: dict(counts[name].most_common()) for name in names}, ends > most


def summarize(table: pa.Table, group: str | None = None) -> dict:
    """Utterances and hours, of all or of each value of a column, the largest first."""
    if group is None:
        return {"utterances": len(table), "hours": pc.sum(table["num_samples"]).as_py() / HOUR}
    sums = table.group_by(group).aggregate([("num_samples", "sum"), ("num_samples", "count")]).to_pylist()
    sums.sort(key=lambda one: (-one["num_samples_sum"], one[group]))
    return {
        one[group]: {"utterances": one["num_samples_count"], "hours": one["num_samples_sum"] / HOUR} for one in sums
    }


def spread(values) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES) if len(values) else ()
    return {f"{p}%": float(value) for p, value in zip(PERCENTILES, found, strict=False)}


def count_lengths(seconds: np.ndarray) -> list[dict]:
    """Utterances and hours by length, in steps of twice as many seconds."""
    edges = 2.0 ** np.arange(np.floor(np.log2(seconds.min())), np.floor(np.log2(seconds.max())) + 1)
    rows = [(low, (low <= seconds) & (seconds < 2 * low)) for low in edges.tolist()]
    return [
        {"from": low, "below": 2 * low, "utterances": int(own.sum()), "hours": float(seconds[own].sum() / 3600)}
        for low, own in rows
    ]


def describe_content(table: pa.Table, sample: int) -> tuple[dict, list[dict], list[dict]]:
    """What is heard in so many utterances, evenly spread; and these rows with what was found of each."""
    chosen = np.unique(np.linspace(0, len(table) - 1, min(len(table), sample)).astype(int))
    rows = table.take(chosen).to_pylist()
    looks = list(map_files(rows, look_into, "Listening"))
    mark_repetitions(looks)
    content = {"utterances": len(rows), "share": len(rows) / len(table), "seconds_of_each": LOOKED_SECONDS}
    for name in ("level", "peak", "silence"):
        content[name] = spread([look[name] for look in looks if name in look])
    content["suspicious"] = {}
    for reason in REASONS:
        some = [(row, look) for row, look in zip(rows, looks, strict=True) if reason in look["reasons"]]
        hours = sum(row["num_samples"] for row, _ in some) / HOUR
        examples = [
            {"id": row["id"], "audio": row["audio"], "reason": look.get("error", REASONS[reason])}
            for row, look in some[:MOST_NAMED]
        ]
        content["suspicious"][reason] = {"utterances": len(some), "hours": hours, "examples": examples}
    return content, rows, looks


def describe(args) -> None:
    """The whole job. UserError for a user's slip."""
    if args.max_seconds is not None and args.max_seconds < args.min_seconds:
        raise UserError(
            f"--max_seconds {args.max_seconds:g} is below --min_seconds {args.min_seconds:g}: change one of them"
        )
    options = {"data_root": args.data_root, "cache_dir": args.output_dir and args.output_dir / "cache"}
    table, unmeasured, _ = read_manifests(args.manifests, **options, further=["language"])
    # 1. All utterances and files.
    seconds = table["num_samples"].to_numpy() / SAMPLING_RATE
    files, is_unreadable = describe_files(table, unmeasured)
    found = summarize(table) | {"seconds": spread(seconds), "histogram": count_lengths(seconds)}
    for name in ("language", "speaker", "label"):
        if name in table.column_names:
            groups = summarize(table, name)
            found[name] = {"number": len(groups.keys() - {""}), "largest": dict(list(groups.items())[:MOST_NAMED])}
    most = np.inf if args.max_seconds is None else args.max_seconds
    left_out = {"too_short": seconds < args.min_seconds, "too_long": seconds > most, "unreadable": is_unreadable}
    found["files"], found["left_out"] = files, {}
    for name, rows in left_out.items():
        found["left_out"][name] = {"utterances": int(rows.sum()), "hours": float(seconds[rows].sum() / 3600)}
    found["left_out"]["unmeasured"] = {"utterances": len(unmeasured), "hours": None}
    # 2. The content of some.
    found["sample"], rows, looks = describe_content(table, args.sample)
    # 3. Text, JSON, picture.
    print(write_text(found, args))
    if args.output_dir:
        with open_atomic(args.output_dir / "description.json") as file:
            json.dump(found, file, indent=1, allow_nan=False)
        draw_description(args.output_dir / "description.png", seconds, rows, looks)


def write_text(found: dict, args) -> str:
    """The description for people."""
    lines = [f"{found['utterances']:,} utterances, {found['hours']:.2f} hours"]
    lines += [f"length (s)          {write_spread(found['seconds'], '.1f')}"]
    largest = max(one["hours"] for one in found["histogram"])
    for one in found["histogram"]:
        bar = "█" * round(30 * one["hours"] / largest)
        lines.append(f"  {one['from']:>6g} – {one['below']:<6g} {one['utterances']:>10,}, {one['hours']:.3f} h {bar}")
    for name in ("language", "speaker", "label"):
        if name in found:
            largest = (f"{key or 'none'} {one['hours']:.2f} h" for key, one in found[name]["largest"].items())
            lines.append(f"{found[name]['number']:,} {name}s, the largest: {', '.join(largest)}")
    files = found["files"]
    lines.append(f"{files['files']:,} files, by their headers:")
    for name in ("rate", "channels", "codec"):
        lines.append(f"  {name:<17} " + ", ".join(f"{key} ({n:,})" for key, n in files[name].items()))
    lines.append("Left out by pretrain.py, of all utterances:")
    limits = {"too_short": f"below --min_seconds {args.min_seconds:g}", "too_long": "above --max_seconds",
              "unreadable": "not, or shorter than the manifest says", "unmeasured": "not, of unknown length"}  # fmt: skip
    for name, one in found["left_out"].items():
        hours = "" if one["hours"] is None else f", {one['hours']:.3f} h"
        lines.append(f"  {name:<17} {one['utterances']:>8,}{hours}: {limits[name]}")
    lines += [f"    {one['audio']}: {one['reason']}" for one in files["unreadable_examples"]]
    sample = found["sample"]
    of_pairs = "" if sample["share"] == 1 else f" (a repetition's chance to be among these is {sample['share']:.2%})"
    lines.append(f"Heard: {LOOKED_SECONDS} s of each of {sample['utterances']:,} utterances{of_pairs}:")
    units = {"level": ("dBFS", ".1f"), "peak": ("", ".3f"), "silence": ("of frames", ".2f")}
    for name, (unit, form) in units.items():
        lines.append(f"  {name + ' ' + unit:<17} {write_spread(sample[name], form)}")
    for name, one in sample["suspicious"].items():
        example = f", such as {one['examples'][0]['id']}" if one["examples"] else ""
        lines.append(f"  {name:<17} {one['utterances']:>8,}, {one['hours']:.3f} h: {REASONS[name]}{example}")
    return "\n".join(map(printable, lines))


def write_spread(values: dict, form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items()) or "–"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "manifests", nargs="+", metavar="MANIFEST", help="manifests, tars or folders, as for pretrain.py"
    )
    parser.add_argument("--output_dir", type=Path, help="folder for description.json and description.png")
    parser.add_argument("--data_root", help="folder that relative audio paths and $data_root stand for")
    parser.add_argument("--sample", type=number(int, min=1), default=2_000, help="utterances whose content is decoded")
    parser.add_argument("--min_seconds", type=number(float, min=0), default=2.0, help="as for pretrain.py")
    parser.add_argument("--max_seconds", type=number(float, above=0), help="as for pretrain.py")
    return parser.run(describe, argv)


if __name__ == "__main__":
    sys.exit(main())
