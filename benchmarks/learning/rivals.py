"""What is learned by this program and by other loops from the same speech: same utterances, updates and fine-tuning.

    python benchmarks/learning/rivals.py configs/pretrain/small.yaml configs/finetune/small.yaml --seeds 1 2 3 \\
        --accumulation 4 --output_dir runs/rivals -- --train_data train.csv --validation_data dev.csv --data_root SPEECH \\
        -- --train_data labelled.jsonl --validation_data valid.jsonl --test_data test.jsonl --data_root SPEECH

`train_rival.py` says what the other loops are. They get this recipe's schedules, without which none of them learns in
small. All models are validated by pretrain.py, with the same masks, and fine-tuned by finetune_ctc.py. SpeechBrain's
(only where it is installed) loses its sinusoidal positions to that: the stock convolution in their place begins at
zero, which validation shows and fine-tuning has to learn.
Finished runs are kept, and a run that was cut short goes on: give the same command again. The output folder then holds
results.json and rivals.png.
"""

from importlib.util import find_spec
from pathlib import Path

from studies import ACCURACY, DRAWN, ERRORS, draw, fine_tune, keep, parse_words, run, show, start_parser, validate

from w2v2.cli import run_script

SIDES = {
    "ours": "this program",
    "mended": "transformers' example, mended",
    "shipped": "transformers' example, as shipped",
    "speechbrain": "SpeechBrain's own",
}


def pretrain(folder: Path, side: str, args, flags: list[str]) -> None:
    if side == "ours":
        run(folder, "model.safetensors", "pretrain.py", args.pretrain, "--collapse_action", "warn", *flags)
    else:
        rival = ["benchmarks/learning/train_rival.py", side, args.accumulation]
        run(folder, "model.safetensors", *rival, args.pretrain, *flags)


def main() -> None:
    parser = start_parser(__doc__, "pretrain", "finetune_ctc")
    installed = [side for side in SIDES if side != "speechbrain" or find_spec(side)]
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=installed)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of an update in the other loops")
    args, (pretraining, finetuning) = parse_words(parser)
    runs, folder = [], args.output_dir
    for seed in args.seeds:
        for side in args.sides:
            model, seeded = folder / f"{side}_{seed}", ["--seed", str(seed)]
            pretrain(model, side, args, pretraining + seeded)
            found = validate(model, args.pretrain, pretraining + seeded)
            start = ["--model_name_or_path", model]
            found |= fine_tune(folder / f"{side}_{seed}_ctc", args.finetune_ctc, finetuning + seeded, *start)
            runs.append(dict(side=SIDES[side], seed=seed) | found)
            keep(runs, folder)
            draw(runs, "side", DRAWN, folder / "rivals.png")
    show(runs, {"side": "loop"}, ACCURACY | ERRORS)


if __name__ == "__main__":
    run_script(main)
