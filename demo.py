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

import torch

from w2v2.model.cpu import multiplies_bfloat16
from w2v2.train.log import read_metrics

ROOT = Path(__file__).resolve().parent
CORPUS, RUNS = Path("data/demo"), Path("runs/demo")


def run(title: str, *command: str, **environment: str) -> None:
    settings = "".join(f"{name}={value} " for name, value in environment.items())
    print(f"\n=== {title}\n$ {settings}python {' '.join(command)}", flush=True)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | environment)
    if finished.returncode:
        sys.exit(f"{title} failed with status {finished.returncode}: see the lines above")
    print(f"=== {title}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def finetune(title: str, output_dir: Path, *weights: str) -> dict[str, float]:
    """Test scores of one fine-tuning run."""
    if not (ROOT / output_dir / "results.json").exists():
        command = ["finetune_ctc.py", "configs/finetune/demo.yaml", *weights, "--output_dir", str(output_dir)]
        run(title, *command, "--resume_from_checkpoint", "auto")
    return json.loads((ROOT / output_dir / "results.json").read_text())["test"]


def main() -> None:
    run("corpus", "data_scripts/make_demo_corpus.py", str(CORPUS))
    is_told = "ACCELERATE_MIXED_PRECISION" in os.environ
    is_fast = not is_told and not torch.accelerator.is_available() and multiplies_bfloat16()
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16"} if is_fast else {}
    run("pretraining", "pretrain.py", "configs/pretrain/demo.yaml", **precision)
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
    words, letters = (1 - ours[rate] / theirs[rate] if theirs[rate] else 0.0 for rate in ("wer", "cer"))
    text = f"""| | pretrained | random weights |
|---|---|---|
| test WER | {ours["wer"]:.1%} | {theirs["wer"]:.1%} |
| test CER | {ours["cer"]:.1%} | {theirs["cer"]:.1%} |
| validation accuracy (a constant guess: {guess:.1%}) | {accuracy:.1%} | |
| codebook perplexity, soft / hard | {perplexity:.1f} / {last["eval_codebook_perplexity_hard"]:.1f} | |
| hours of audio heard | {last["audio_hours"]:.2f} | 0 |

On voices it never heard, the model tells {accuracy:.0%} of the true frames from their distractors, where always \
guessing the utterance's commonest codes would earn {guess:.0%}, with the equivalent of {perplexity:.0f} codes in even \
use; fine-tuned on the same \
transcribed speech as random weights, it makes {compare(letters, "character")} and {compare(words, "word")}. One run of minutes on \
synthesized speech shows that the machinery works, not how good wav2vec 2.0 can be: docs/results.md has longer runs, \
several seeds and real speech.

Curves: {(pretrained / "plots").relative_to(ROOT)}; model card: {(pretrained / "README.md").relative_to(ROOT)}
"""
    (ROOT / RUNS / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")


def compare(saved: float, unit: str) -> str:
    return f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'} {unit} errors"


if __name__ == "__main__":
    main()
