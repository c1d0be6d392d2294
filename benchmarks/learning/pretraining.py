"""What does a change of the pretraining recipe do? Each variant of a study is pretrained, validated and fine-tuned alike.

    python benchmarks/learning/pretraining.py configs/pretrain/small.yaml configs/finetune/small.yaml --study ablations \\
        --seeds 1 2 3 --output_dir runs/studies -- --train_data train.csv --validation_data dev.csv --data_root SPEECH \\
        -- --train_data labelled.jsonl --validation_data valid.jsonl --test_data test.jsonl --data_root SPEECH

`pretraining.yaml` holds the studies. Whatever a variant changes, its model is validated with the recipe's own masks and
distractors. Without the second YAML file nothing is fine-tuned. Finished runs are kept, also for other studies, and a
run that was cut short goes on: give the same command again. `runs/studies/ablations` then holds results.json and a picture.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from studies import ACCURACY, DRAWN, ERRORS, draw, judge, keep, list_hours, parse_words, pretrain, show, start_parser

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line, run_script
from w2v2.errors import UserError


def read_variants(path: Path, study: str, names: Sequence[str] | None) -> dict[str, dict]:
    """The study's variants, all or those named. Raises UserError for a name that is not there."""
    studies = yaml.safe_load(path.read_text(encoding="utf-8"))
    if study not in studies:
        raise UserError(f"--study {study}: {path} has {', '.join(studies)}")
    if missing := set(names or ()) - studies[study].keys():
        raise UserError(f"--variants {missing.pop()}: {study} in {path} has {', '.join(studies[study])}")
    return {name: changes for name, changes in studies[study].items() if name in (names or studies[study])}


def find_flags(changes: dict, args: PretrainArguments, folder: Path) -> list[str]:
    """A variant's changes of `args` as flags of pretrain.py."""
    words = []
    for name, value in changes.items():
        if name == "hours":
            name, value = "train_data", list_hours(value, args, folder)
        elif factor := re.fullmatch(r"x([\d.]+)", str(value)):
            before = getattr(args, name)
            if name == "warmup_steps" and before < 1:
                continue  # a fraction of the run
            value = before * float(factor[1])
            value = max(1, round(value)) if isinstance(before, int) and before else value
        words += [f"--{name}", str(value)]
    return words


def main() -> None:
    parser = start_parser(__doc__, "pretrain")
    parser.add_argument("finetune_ctc", nargs="?", help="YAML file of finetune_ctc.py")
    parser.add_argument("--study", required=True, help="one of those in --studies")
    parser.add_argument("--studies", type=Path, default=Path(__file__).with_suffix(".yaml"), help="YAML file")
    parser.add_argument("--variants", nargs="+", help="some of the study's; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    args, (pretraining, finetuning) = parse_words(parser)
    variants = read_variants(args.studies, args.study, args.variants)
    where = args.output_dir / args.study
    where.mkdir(exist_ok=True)
    (recipe,) = parse_command_line([PretrainArguments], [args.pretrain, *pretraining, "--output_dir", str(where)])
    flags = {name: find_flags(changes, recipe, args.output_dir) for name, changes in variants.items()}
    runs = []
    for seed in args.seeds:
        for name in variants:
            model = args.output_dir / (re.sub(r"\W+", "_", name) + f"_{seed}")
            pretrain(model, args.pretrain, [*pretraining, *flags[name], "--seed", str(seed)])
            runs.append({"variant": name, "seed": seed} | judge(model, args, pretraining, finetuning, seed))
            keep(runs, where)
            draw(runs, "variant", DRAWN, where / f"{args.study}.png")
    show(runs, {"variant": args.study}, ACCURACY | ERRORS)


if __name__ == "__main__":
    run_script(main)
