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

from studies import ACCURACY, DRAWN, ERRORS, draw, judge, keep, parse_words, pretrain, run, show, start_parser

from w2v2.cli import run_script

SIDES = {
    "ours": "this program",
    "mended": "transformers' example, mended",
    "shipped": "transformers' example, as shipped",
    "speechbrain": "SpeechBrain's own",
}


def main() -> None:
    parser = start_parser(__doc__, "pretrain", "finetune_ctc")
    installed = [side for side in SIDES if side != "speechbrain" or find_spec(side)]
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=installed)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of an update in the other loops")
    args, (pretraining, finetuning) = parse_words(parser)
    if "speechbrain" in args.sides and not find_spec("speechbrain"):
        parser.error("--sides speechbrain: the package is missing: pip install speechbrain")
    runs = []
    for seed in args.seeds:
        for side in args.sides:
            model, flags = args.output_dir / f"{side}_{seed}", [*pretraining, "--seed", str(seed)]
            if side == "ours":
                pretrain(model, args.pretrain, flags)
            else:
                rival = ["benchmarks/learning/train_rival.py", side, args.accumulation]
                run(model, "model.safetensors", *rival, args.pretrain, *flags)
            runs.append(dict(side=SIDES[side], seed=seed) | judge(model, args, pretraining, finetuning, seed))
            keep(runs, args.output_dir)
            draw(runs, "side", DRAWN, args.output_dir / "rivals.png")
    show(runs, {"side": "loop"}, ACCURACY | ERRORS)


if __name__ == "__main__":
    run_script(main)
