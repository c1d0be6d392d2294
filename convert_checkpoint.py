"""Turn a pretraining checkpoint of fairseq or SpeechBrain into a folder that `from_pretrained` and `pretrain.py` take.

    python convert_checkpoint.py checkpoint_best.pt --output_dir models/mine
    python convert_checkpoint.py results/save/CKPT+2024-01-31+12-00-00+00 --output_dir models/mine --config_name base

A `.pt` file is taken for fairseq's; a `CKPT+…` folder or a `.ckpt` file for SpeechBrain's interface to transformers, whose
architecture `--config_name` names (a folder, a Hub id or a name in configs/models): what the recipe had as `wav2vec2_hub`.
SpeechBrain's own architecture has other positions; `--without_positions` takes over the rest, for further pretraining.
Neither program has to be installed, and nothing in the checkpoint is executed. docs/interoperate.md says what is refused.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from w2v2.cli import run_script
from w2v2.convert.fairseq import convert_fairseq
from w2v2.convert.speechbrain import convert_speechbrain, convert_without_positions
from w2v2.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        raise UserError(message)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="fairseq's .pt file, or SpeechBrain's CKPT+… folder or .ckpt file"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--config_name", default="base", help="SpeechBrain only: the architecture (default: base)")
    parser.add_argument(
        "--without_positions", action="store_true", help="SpeechBrain's own architecture, but for its positions"
    )
    parser.add_argument("--num_attention_heads", type=int, default=8, help="with it: the recipe's `nhead` (default: 8)")
    parser.add_argument(
        "--conv_stride",
        type=int,
        nargs="+",
        default=[5, 2, 2, 2, 2, 2, 2],
        help="with it: the recipe's strides of the convs",
    )
    args = parser.parse_args(argv)
    if not args.checkpoint.exists():
        raise UserError(f"{args.checkpoint}: no such file or folder")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists already: give a new folder")
    disable_progress_bar()  # over the writing of one file
    if args.without_positions:
        model, extractor = convert_without_positions(args.checkpoint, args.num_attention_heads, args.conv_stride)
    elif args.checkpoint.is_dir() or args.checkpoint.suffix == ".ckpt":
        model, extractor = convert_speechbrain(args.checkpoint, args.config_name)
    else:
        model, extractor = convert_fairseq(args.checkpoint)
    save_whole(model, extractor, args.output_dir)
    norm = "normalised" if extractor.do_normalize else "as they are"
    print(f"{args.output_dir}: {model.num_parameters():,} parameters, waveforms {norm}")


def save_whole(model, extractor, folder: Path) -> None:
    """Write the folder under another name first: what has its name is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    try:
        model.save_pretrained(unfinished)
        extractor.save_pretrained(unfinished)
        open_as_usual(Path(unfinished))
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def open_as_usual(folder: Path) -> None:
    """The permissions of new files and folders; temporary folders, and safetensors, keep others out."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


if __name__ == "__main__":
    sys.exit(run_script(main))
