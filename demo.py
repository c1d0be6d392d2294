"""The whole way on synthesized speech: corpus, pretraining, fine-tuning from it and from random weights, one table.

    make demo        (or: python demo.py)

Interrupted, it goes on where it stopped. Everything it makes lies in data/demo and runs/demo.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from w2v2.model.cpu import multiplies_bfloat16
from w2v2.train.log import read_metrics

ROOT = Path(__file__).resolve().parent
CORPUS, RUNS = Path("data/demo"), Path("runs/demo")
TRIGRAM = RUNS / "trigram.arpa"


def run(title: str, *command: str, **environment: str) -> None:
    settings = "".join(f"{name}={value} " for name, value in environment.items())
    print(f"\n=== {title}\n$ {settings}python {' '.join(command)}", flush=True)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment)
    if finished.returncode:
        sys.exit(f"{title} failed with status {finished.returncode}: see the lines above")
    print(f"=== {title}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def finetune(title: str, output_dir: Path, *weights: str) -> dict[str, Any]:
    """Test scores of one fine-tuning run, greedy and with the trigram."""
    if not (ROOT / output_dir / "results.json").exists():
        command = ["finetune_ctc.py", "configs/finetune/demo.yaml", *weights, "--output_dir", str(output_dir)]
        run(title, *command, "--lm", str(TRIGRAM), "--tune_lm", "true", "--resume_from_checkpoint", "auto")
    return json.loads((ROOT / output_dir / "results.json").read_text())["test"]


def main() -> None:
    run("corpus", "data_scripts/make_demo_corpus.py", str(CORPUS))
    is_told = "ACCELERATE_MIXED_PRECISION" in os.environ
    is_fast = not is_told and not torch.accelerator.is_available() and multiplies_bfloat16()
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16"} if is_fast else {}
    run("pretraining", "pretrain.py", "configs/pretrain/demo.yaml", **precision)
    labels = str(CORPUS / "train_labelled.csv")
    run("trigram", "data_scripts/build_ngram.py", labels, "--order", "3", "--output", str(TRIGRAM))
    pretrained = RUNS / "pretrained"
    weights = ["--model_name_or_path", str(pretrained)]
    ours = finetune("fine-tuning the pretrained model", RUNS / "ctc_pretrained", *weights)
    weights = ["--model_name_or_path=", "--config_name", str(pretrained)]
    theirs = finetune("fine-tuning random weights", RUNS / "ctc_random", *weights)
    report(ours, theirs, ROOT / pretrained)


def report(ours: dict, theirs: dict, pretrained: Path) -> None:
    """The table, and a sentence that says what its figures mean."""
    last = [record for record in read_metrics(pretrained / "metrics.jsonl") if "eval_loss" in record][-1]
    accuracy, guess = last["eval_accuracy"], last.get("eval_constant_guess_accuracy", math.nan)
    perplexity = last["eval_codebook_perplexity"]
    searched = ours["lm"]["wer"], theirs["lm"]["wer"]
    saved = 1 - searched[0] / searched[1] if searched[1] else 0.0
    said = middle(ROOT / RUNS / "ctc_pretrained" / "predictions.jsonl")
    text = f"""| | pretrained | random weights |
|---|---|---|
| test WER, with a trigram of the transcripts | {searched[0]:.1%} | {searched[1]:.1%} |
| test WER, greedy | {ours["wer"]:.1%} | {theirs["wer"]:.1%} |
| test CER, greedy | {ours["cer"]:.1%} | {theirs["cer"]:.1%} |
| validation accuracy (a constant guess: {guess:.1%}) | {accuracy:.1%} | |
| codebook perplexity, soft / hard | {perplexity:.1f} / {last["eval_codebook_perplexity_hard"]:.1f} | |
| hours of audio heard | {last["audio_hours"]:.2f} | 0 |

On voices it never heard, the model tells {accuracy:.0%} of the true frames from their distractors, where always \
guessing the utterance's commonest codes would earn {guess:.0%}, with the equivalent of {perplexity:.0f} codes in even \
use. Fine-tuned and searched like random weights, on the same transcribed speech, it makes {compare(saved)}. \
Half of the test sentences are written better than this one, half worse:

    said:     {said["reference"]}
    greedy:   {said["hypothesis"]}
    trigram:  {said["lm_hypothesis"]}

One run of minutes on synthesized speech shows that the machinery works, not how good wav2vec 2.0 can be: docs/results.md has longer runs, \
several seeds and real speech.

Curves: {(pretrained / "plots").relative_to(ROOT)}; model card: {(pretrained / "README.md").relative_to(ROOT)}
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
