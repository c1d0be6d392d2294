"""Folders as runs leave them, written by hand, and pages read back."""

import json
from html.parser import HTMLParser
from pathlib import Path

import jiwer
import numpy as np
import yaml

from w2v2.evaluate.scores import classification_scores, count_edits, error_rates
from w2v2.report.page import write_report

HOSTILE = "<script>alert(1)</script>\"'&"
VOID = {"meta", "link"}  # elements of HTML that are never closed


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_pretraining(folder: Path, updates=60, last_accuracy=0.4, **flags) -> Path:
    """A finished pretraining that learned, with every file that one can have."""
    folder.mkdir(parents=True, exist_ok=True)
    records, random = [], np.random.default_rng(0)
    for step in range(1, updates + 1):
        done = step / updates
        accuracy = 0.05 + done * (last_accuracy - 0.05)
        record = {
            "step": step,
            "epoch": done,
            "audio_hours": step / 10,
            "loss": 5 - done,
            "contrastive_loss": 4.6 - done,
        }
        record |= {"accuracy": accuracy, "constant_guess_accuracy": 0.1, "codebook_perplexity": 20 + 30 * done}
        record |= {"codebook_perplexity_hard": 18 + 30 * done, "code_entropy": 0.5, "distractors_left": 95.0}
        record |= {"codebook_coverage_1": done, "codebook_coverage_2": done / 2, "codebook_entropy_1": 3 * done}
        record |= {"gumbel_temperature": 2.0, "learning_rate": 1e-3 * done, "grad_norm": 1.0, "diversity_loss": 0.5}
        record |= {"masked_frames": 9_000, "batch_hours": 0.1, "cropped_fraction": 0.1, "padded_fraction": 0.05}
        record |= {"audio_seconds_per_second": 50.0, "data_wait_fraction": 0.01, "num_processes": 2}
        records.append(record | {"feature_penalty": 1.0, "skipped_audio": 1, "skipped_updates": 0})
        if step % 20 == 0:
            held_out = ("loss", "contrastive_loss", "accuracy", "constant_guess_accuracy", "codebook_perplexity")
            progress = {key: record[key] for key in ("step", "epoch", "audio_hours")}
            records.append(progress | {f"eval_{key}": record[key] for key in held_out})
    write_lines(folder / "metrics.jsonl", records)
    use = [random.multinomial(1_000, random.dirichlet([0.3] * 40), size=2).tolist() for _ in range(3)]
    lines = [{"step": 20 * n, "audio_hours": 2.0 * n, "counts": counts} for n, counts in enumerate(use, start=1)]
    write_lines(folder / "codebook_use.jsonl", lines)
    start = {"time": "2026-01-01T10:00:00+00:00", "step": 0, "event": "start", "message": "started"}
    start |= {"command": ["pretrain.py", "--run_name", HOSTILE], "versions": {"torch": "2.10"}, "device": "CPU"}
    finish = {"time": "2026-01-01T12:30:00+00:00", "step": updates, "event": "finish", "message": "finished"}
    write_lines(folder / "events.jsonl", [start | {"num_processes": 2, "precision": "no"}, finish])
    skipped = [{"id": HOSTILE, "audio": f"/data/{HOSTILE}.wav", "reason": "no audio in it", "step": 3}]
    write_lines(folder / "skipped_audio.jsonl", skipped)
    heard = {"utterances": 100, "hours": 6.0, "dropped": {"too_short": 4}, "dropped_hours": {"too_short": 0.01}}
    plan = heard | {"validation": heard, "micro_batch_size": {"slots": 1_000}, "num_processes": 2, "max_steps": updates}
    plan |= dict.fromkeys(("micro_batches_per_update", "padded_fraction", "cropped_fraction", "updates_per_epoch"), 1)
    plan |= {"batch_hours": 0.1, "hours_to_hear": 6.0, "epochs": 1, "proposal": {"text": f"{'how sure':14}not at all"}}
    plan["lengths"] = {"seconds": [0.0, 5.0, 10.0], "utterances": [70, 30]}
    source = heard | dict.fromkeys(("repetitions", "repetitions_per_epoch", "draws_per_epoch"), 1) | {"language": ""}
    source |= {"dropped": 0, "dropped_hours": 0.0}
    plan["sources"] = [source | {"name": HOSTILE, "share": 0.75}, source | {"name": "other", "share": 0.25}]
    plan["warnings"] = [{"code": "small_batch", "message": "the batch is small", "remedy": "raise --batch_hours"}]
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    config = {"max_steps": updates, "learning_rate": 1e-3, "train_data": [HOSTILE], "output_dir": str(folder)}
    (folder / "pretrain_config.yaml").write_text(yaml.safe_dump(config | flags), encoding="utf-8")
    model = {"num_codevector_groups": 2, "num_codevectors_per_group": 40}
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    return folder


def write_results(folder: Path, results, predictions, config, **files) -> Path:
    """What both fine-tuning scripts leave; `files` are further ones by their stem."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "finetune_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_lines(folder / "predictions.jsonl", predictions)
    for name, records in files.items():
        write_lines(folder / f"{name}.jsonl", records)
    return folder


def write_recognition(folder: Path, texts=None, **config) -> Path:
    """A recogniser's run over `texts`: id → (reference, hypothesis) of its validation set."""
    texts = texts or {HOSTILE: ("the cat sat", f"the {HOSTILE} sat"), "b": ("a dog", "a dog"), "c": ("one two", "")}
    lines = [
        {"set": "validation", "id": name, "reference": ours, "hypothesis": theirs, "wer": jiwer.wer(ours, theirs)}
        for name, (ours, theirs) in texts.items()
    ]
    pairs = [line["reference"] for line in lines], [line["hypothesis"] for line in lines]
    scores = error_rates(*pairs) | {"utterances": len(lines), "loss": 1.0, "edits": count_edits(*pairs)}
    run = {"updates": 20, "best_update": 10, "train_hours": 1.5, "train_utterances": 40, "warnings": [HOSTILE]}
    metrics = [{"step": 10, "loss": 3.0, "learning_rate": 1e-4}]
    metrics.append({"step": 10, "eval_loss": 2.0, "eval_wer": 0.5, "eval_cer": 0.3})
    return write_results(folder, {"validation": scores, "run": run}, lines, config, metrics=metrics)


def write_classification(folder: Path, **config) -> Path:
    truth, guesses = "anger anger joy joy joy".split(), f"anger joy joy joy {HOSTILE}".split()
    lines = [
        {"set": "test", "id": f"u{n}", "reference": ours, "prediction": theirs, "probability": 0.5 + n / 10}
        for n, (ours, theirs) in enumerate(zip(truth, guesses, strict=True))
    ]
    scores = classification_scores(truth, guesses) | {"utterances": 5}
    results = {"test": scores, "run": {"labels": ["anger", "joy", HOSTILE], "updates": 5, "best_update": 5}}
    return write_results(folder, results, lines, config)


def write_probe(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    models = [
        {"name": name, "source": source, "hours": hours, "best_layer": 1, "uar": score,
         "layers": [{"layer": 0, "uar": 0.2}, {"layer": 1, "uar": score}]}
        for name, source, hours, score in ((HOSTILE, "runs/a", 3.0, 0.6), ("late", "runs/b", 9.0, 0.7), ("random weights", None, None, 0.3))
    ]  # fmt: skip
    whole = {"measure": "uar", "chance": 0.25, "models": models, "run": {"target": "emotion", "utterances": 80}}
    (folder / "probe.json").write_text(json.dumps(whole), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """A page's elements and texts; every element has to be closed in turn."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.elements, self.texts = [], [], []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts if text)

    def of(self, tag: str) -> list[str]:
        """The texts directly in elements of this name."""
        return [text for name, text in self.texts if name == tag]


def read_page(folder: Path, *more: Path, defaults=None, num_audio=0) -> Page:
    output = folder / "page.html"
    write_report([folder, *more], output, defaults or {}, num_audio)
    return Page(output)
