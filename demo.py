"""The whole way on synthesized speech: corpus, pretraining, fine-tuning from it and from random weights, one table.

    make demo        (or: python demo.py)

Interrupted, it goes on where it stopped. Everything it makes lies in data/demo and runs/demo.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from w2v2.train.log import read_metrics

ROOT = Path(__file__).resolve().parent
CORPUS, RUNS = Path("data/demo"), Path("runs/demo")
PRETRAINED, TRIGRAM = RUNS / "pretrained", RUNS / "trigram.arpa"
STARTS = {
    RUNS / "ctc_pretrained": ["--model_name_or_path", str(PRETRAINED)],
    RUNS / "ctc_random": ["--model_name_or_path=", "--config_name", str(PRETRAINED)],
}
LABELLED_HOURS = 0.1667  # of the twenty minutes that are transcribed: few labels are what pretraining is for
CORES = os.cpu_count() or 1


def run(title: str, *commands: list[str]) -> None:
    """Run scripts of this repository side by side; all but the first write to a file of RUNS, not to the screen."""
    print(f"\n=== {title}", flush=True)
    started = time.monotonic()
    environment = os.environ | ({"OMP_NUM_THREADS": str(max(1, CORES // len(commands)))} if len(commands) > 1 else {})
    (ROOT / RUNS).mkdir(parents=True, exist_ok=True)
    processes = []
    for number, command in enumerate(commands):
        log = RUNS / f"{Path(command[-1]).name}.log" if number else None
        print(f"$ python {shlex.join(command)}" + (f" > {log}" if log else ""), flush=True)
        out = open(ROOT / log, "w") if log else None
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=out)
        processes.append((process, log or "the lines above"))
    for process, log in processes:
        if process.wait():
            for other, _ in processes:
                other.terminate()
            sys.exit(f"{title} failed with status {process.returncode}: see {log}")
    print(f"=== {title}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # there are no flags
    run("corpus", ["data_scripts/make_demo_corpus.py", str(CORPUS)])
    processes = min(CORES, 4) if not torch.accelerator.is_available() else 1  # an update has five micro-batches
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2_processes.yaml"]
    launcher += ["--num_processes", str(processes)]
    run("pretraining", [*(launcher if processes > 1 else []), "pretrain.py", "configs/pretrain/demo.yaml"])
    labels = str(CORPUS / "train_labelled.csv")
    run("trigram", ["data_scripts/build_ngram.py", labels, "--order", "3", "--output", str(TRIGRAM)])
    command = ["finetune_ctc.py", "configs/finetune/demo.yaml", "--lm", str(TRIGRAM), "--tune_lm", "true"]
    command += ["--train_hours", str(LABELLED_HOURS), "--resume_from_checkpoint", "auto"]
    commands = [
        [*command, *weights, "--output_dir", str(folder)]
        for folder, weights in STARTS.items()
        if not (ROOT / folder / "results.json").exists()
    ]
    run("fine-tuning from pretrained and from random weights", *commands)
    report(*(json.loads((ROOT / folder / "results.json").read_text()) for folder in STARTS))


def report(pretrained: dict, random: dict) -> None:
    """The table, and a sentence that says what its figures mean."""
    ours, theirs, minutes = pretrained["test"], random["test"], 60 * pretrained["run"]["train_hours"]
    last = [record for record in read_metrics(ROOT / PRETRAINED / "metrics.jsonl") if "eval_loss" in record][-1]
    accuracy, guess = last["eval_accuracy"], last.get("eval_constant_guess_accuracy", math.nan)
    perplexity = last["eval_codebook_perplexity"]
    searched = ours["lm"]["wer"], theirs["lm"]["wer"]
    saved = 1 - searched[0] / searched[1] if searched[1] else 0.0
    said = middle(ROOT / RUNS / "ctc_pretrained" / "predictions.jsonl")
    text = f"""| | pretrained | random weights |
|---|---|---|
| test WER, with a trigram of all transcripts | {searched[0]:.1%} | {searched[1]:.1%} |
| test WER, greedy | {ours["wer"]:.1%} | {theirs["wer"]:.1%} |
| test CER, greedy | {ours["cer"]:.1%} | {theirs["cer"]:.1%} |
| validation accuracy (a constant guess: {guess:.1%}) | {accuracy:.1%} | |
| codebook perplexity, soft / hard | {perplexity:.1f} / {last["eval_codebook_perplexity_hard"]:.1f} | |
| hours of audio heard | {last["audio_hours"]:.2f} | 0 |

On voices it never heard, the model tells {accuracy:.0%} of the true frames from their distractors, where always \
guessing the utterance's commonest codes would earn {guess:.0%}, with the equivalent of {perplexity:.0f} codes in even \
use. Fine-tuned and searched like random weights, on the same {minutes:.0f} transcribed minutes, it makes \
{compare(saved)}. Half of the test sentences are written better than this one, half worse:

    said:     {said["reference"]}
    greedy:   {said["hypothesis"]}
    trigram:  {said["lm_hypothesis"]}

One run of minutes on synthesized speech shows that the machinery works, not how good wav2vec 2.0 can be: docs/results.md has longer runs, \
several seeds and real speech.

Curves: {PRETRAINED / "plots"}; model card: {PRETRAINED / "README.md"}
"""
    (ROOT / RUNS / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")


def middle(predictions: Path) -> dict[str, Any]:
    """The test utterance of median word error rate with the trigram."""
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    rows = sorted((row for row in rows if row["set"] == "test"), key=lambda row: (row["lm_wer"], row["id"]))
    return rows[len(rows) // 2]


def compare(saved: float) -> str:
    return f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} word errors"


if __name__ == "__main__":
    main()
