"""Turn a pretraining checkpoint of fairseq or SpeechBrain into a folder that `from_pretrained` and `pretrain.py` take.

    python convert_checkpoint.py checkpoint_best.pt --output_dir models/mine
    python convert_checkpoint.py results/save/CKPT+2024-01-31+12-00-00+00 --output_dir models/mine --config_name base
    python convert_checkpoint.py runs/mine --to fairseq --output_dir models/fairseq

A `.pt` file is taken for fairseq's; a `CKPT+…` folder or a `.ckpt` file for SpeechBrain's interface to transformers,
whose architecture `--config_name` names (a folder, a Hub id or a name in configs/models): what the recipe had as
`wav2vec2_hub`. SpeechBrain's own architecture has other positions; `--without_positions` takes over the rest, for
further pretraining. `--to fairseq` goes the other way, from a folder to `checkpoint.pt`. Neither program has to be
installed, and nothing in the checkpoint is executed.
docs/interoperate.md says what is refused.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from w2v2.cli import run_script
from w2v2.convert.fairseq import convert_fairseq, export_fairseq
from w2v2.convert.speechbrain import convert_speechbrain, convert_without_positions
from w2v2.errors import Parser, UserError, number
from w2v2.train.durable import publish, unfinished


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="fairseq's .pt file, SpeechBrain's CKPT+… folder or .ckpt file, or a folder")
    add("--to", choices=["fairseq"], help="turn a pretrained folder into OUTPUT_DIR/checkpoint.pt of fairseq")
    add("--output_dir", type=Path, required=True, help="a new folder")
    add("--config_name", default="base", help="SpeechBrain only: the architecture (default: base)")
    add("--without_positions", action="store_true", help="SpeechBrain's own architecture, but for its positions")
    add("--num_attention_heads", type=number(int, min=1), default=8, help="with it: the recipe's `nhead` (default: 8)")
    strides = [5, 2, 2, 2, 2, 2, 2]
    add(
        "--conv_stride",
        type=number(int, min=1),
        nargs="+",
        default=strides,
        help="with it: the recipe's strides of the convs",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.checkpoint.exists():
        raise UserError(f"{args.checkpoint}: no such file or folder")
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir} exists already: give a new folder")
    disable_progress_bar()  # over the writing of one file
    if args.to:
        if args.without_positions:
            raise UserError("--without_positions is for checkpoints of SpeechBrain: leave it out with --to")
        checkpoint = export_fairseq(args.checkpoint)
        with unfinished(args.output_dir) as folder:
            torch.save(checkpoint, folder / "checkpoint.pt")
            publish(folder, args.output_dir)
        print(f"{args.output_dir}/checkpoint.pt: {sum(x.numel() for x in checkpoint['model'].values()):,} parameters")
        return
    if args.without_positions:
        model, extractor = convert_without_positions(args.checkpoint, args.num_attention_heads, args.conv_stride)
    elif args.checkpoint.is_dir() or args.checkpoint.suffix == ".ckpt":
        model, extractor = convert_speechbrain(args.checkpoint, args.config_name)
    else:
        model, extractor = convert_fairseq(args.checkpoint)
    with unfinished(args.output_dir) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors keeps others out
        publish(folder, args.output_dir)
    norm = "normalised" if extractor.do_normalize else "not normalised"
    print(f"{args.output_dir}: {model.num_parameters():,} parameters, waveforms {norm}")


if __name__ == "__main__":
    run_script(main)
