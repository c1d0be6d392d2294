"""The whole way on synthesized speech: corpus, pretraining, fine-tuning from the pretrained and from random weights, one table.

    make demo        (or: python demo.py)

Interrupted, it goes on where it stopped. Everything it makes lies in data/demo and runs/demo.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from w2v2.hub.curves import chance_accuracy
from w2v2.train.log import read_metrics

ROOT = Path(__file__).resolve().parent
CORPUS, RUNS = Path("data/demo"), Path("runs/demo")


def run(title: str, *command: str) -> None:
    print(f"\n=== {title}\n$ python {' '.join(command)}", flush=True)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, *command], cwd=ROOT)
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
    run("pretraining", "pretrain.py", "configs/pretrain/demo.yaml")
    pretrained = RUNS / "pretrained"
    ours = finetune(
        "fine-tuning the pretrained model", RUNS / "ctc_pretrained", "--model_name_or_path", str(pretrained)
    )
    theirs = finetune(
        "fine-tuning random weights", RUNS / "ctc_random", "--model_name_or_path=", "--config_name", str(pretrained)
    )
    report(ours, theirs, ROOT / pretrained)


def report(ours: dict, theirs: dict, pretrained: Path) -> None:
    """The table, and a sentence that says what its figures mean."""
    last = [record for record in read_metrics(pretrained / "metrics.jsonl") if "eval_loss" in record][-1]
    chance = chance_accuracy(pretrained)
    lines = [
        "| | pretrained | random weights |",
        "|---|---|---|",
        f"| test WER | {ours['wer']:.1%} | {theirs['wer']:.1%} |",
        f"| test CER | {ours['cer']:.1%} | {theirs['cer']:.1%} |",
        f"| validation accuracy (chance {chance:.2%}) | {last['eval_accuracy']:.1%} | |",
        f"| codebook perplexity, soft / hard | {last['eval_codebook_perplexity']:.1f} / "
        f"{last['eval_codebook_perplexity_hard']:.1f} | |",
        f"| hours of audio heard | {last['audio_hours']:.2f} | 0 |",
        "",
        meaning(last["eval_accuracy"] / chance, last["eval_codebook_perplexity"], ours, theirs),
        "",
        f"Curves: {(pretrained / 'plots').relative_to(ROOT)}; model card: {(pretrained / 'README.md').relative_to(ROOT)}",
    ]
    text = "\n".join(lines)
    (ROOT / RUNS / "results.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")


def meaning(times_chance: float, perplexity: float, ours: dict, theirs: dict) -> str:
    """What the figures say, whichever way they came out."""
    learned = (
        f"On voices it never heard, the model tells the true frame from its distractors {times_chance:.0f} times as often as "
        f"chance, with the equivalent of {perplexity:.0f} codes in even use"
    )
    words, letters = (1 - ours[rate] / theirs[rate] if theirs[rate] else 0.0 for rate in ("wer", "cer"))
    use = (
        f"fine-tuned on the same transcribed speech as random weights, it makes {abs(letters):.0%} "
        f"{'fewer' if letters >= 0 else 'more'} character errors and {abs(words):.0%} {'fewer' if words >= 0 else 'more'} word errors"
    )
    return (
        f"{learned}; {use}. One run of minutes on synthesized speech shows that the machinery works, not how good wav2vec 2.0 "
        "can be: docs/results.md has longer runs, several seeds and real speech."
    )


if __name__ == "__main__":
    main()
