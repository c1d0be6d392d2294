"""An update by seconds and a transcription, on one process or two: `test_ctc.py` compares them, and launches this."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tiny_config
from datasets import Dataset
from transformers import TrainerCallback, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from w2v2.errors import UserError
from w2v2.finetune import ctc_data
from w2v2.finetune.arguments import FineTuningArguments
from w2v2.finetune.beam_search import BeamDecoder, Setting
from w2v2.finetune.ctc import CTCTrainer
from w2v2.finetune.text import build_vocabulary, make_processor
from w2v2.model.feature_encoder import hide_padding
from w2v2.train.launch import leave_group

WORDS = ["AB", "BA CAB", "C", "A B", "CABAC", "BB AA"]
VOCABULARY = build_vocabulary(WORDS)
ARPA = ("\\data\\\nngram 1=6\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\n-99\t<s>\t-0.3\n-1\t</s>\n-0.5\tAB\t-0.2\n"
        "-0.7\tC\n-0.9\tBA\n\n\\2-grams:\n-0.2\tAB C\n\n\\end\\\n")  # fmt: skip
CASES = {"mean": 2.5, "sum": 2.5, "frozen": 1.5}  # seconds of a micro-batch


def write_speech(folder: Path, num: int = 8) -> Dataset:
    """Noise of different lengths with texts of different lengths."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(num):
        path, length = str(folder / f"{i}.wav"), 8_000 + 2_347 * i
        soundfile.write(path, random.uniform(-0.3, 0.3, length), 16_000)
        rows.append({"id": str(i), "audio": path, "start": 0.0, "num_samples": length, "text": WORDS[i % len(WORDS)]})
    return Dataset.from_list(rows)


QUIET = dict(train_data=["t"], validation_data=["v"], config_name="c", report_to=["none"], use_cpu=True,
             dataloader_num_workers=0, max_steps=4, eval_steps=2, save_steps=2, logging_steps=1,
             per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-3)  # fmt: skip


def make_trainer(table, output_dir, model_changes=None, vocabulary=VOCABULARY, chunk_seconds=40.0, **flags):
    """A trainer without anything random but the order of utterances, unless `model_changes` says so."""
    args = FineTuningArguments(output_dir=str(output_dir), **(QUIET | flags))
    Path(output_dir).mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    head = dict(vocab_size=len(vocabulary), pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    off = dict(mask_time_prob=0.0, mask_feature_prob=0.0, final_dropout=0.0, bos_token_id=None, eos_token_id=None)
    model = hide_padding(Wav2Vec2ForCTC(tiny_config(**(head | off | (model_changes or {})))))
    model.freeze_feature_encoder()
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False)
    kwargs = dict(vocabulary=vocabulary, feature_extractor=extractor, min_samples=400)
    kwargs["skip_log"] = Path(output_dir) / "skipped_audio.jsonl"
    train = ctc_data.SpeechDataset(table, substitute=True, **kwargs)
    validation = ctc_data.SpeechDataset(ctc_data.longest_first(table), substitute=False, **kwargs)
    processor = make_processor(vocabulary, extractor)
    parts = (model, args, ctc_data.collate_speech, train, validation, processor)
    return CTCTrainer(*parts, vocabulary=vocabulary, chunk_seconds=chunk_seconds)


def one_update(table, output_dir, case="mean", **flags):
    """What an update by plain gradient descent changes in each weight, over the learning rate; its gradient norm and
    loss, as logged.
    """
    changes = dict(ctc_loss_reduction="sum" if case == "sum" else "mean")
    flags = dict(max_steps=1, eval_strategy="no", save_strategy="no", optim="sgd", warmup_steps=0.0, learning_rate=1.0,
                 load_best_model_at_end=False, freeze_encoder_steps=1 if case == "frozen" else 0) | flags  # fmt: skip
    trainer = make_trainer(table, output_dir, changes, **flags)
    gradient = {}
    trainer.add_callback(_Keep(trainer, gradient))
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return gradient, {name: entry[name] for name in ("loss", "grad_norm")}


def transcribe(table, output_dir, arpa, **flags):
    """Greedy texts, and those of a beam search with two settings."""
    trainer = make_trainer(table.map(lambda row: {"text": ""}), output_dir, **flags)
    trainer.decoder = BeamDecoder(arpa, VOCABULARY, [Setting(0.1, 3.0), Setting(1.0, 0.0)])
    return trainer.predict(trainer.eval_dataset).predictions, trainer.beam_texts


class _Keep(TrainerCallback):
    def __init__(self, trainer, gradient):
        self.trainer, self.gradient = trainer, gradient

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = self.trainer.model.named_parameters()
        self.gradient.update({name: p.grad.clone() for name, p in named if p.grad is not None})


def main(folder: str, out: str) -> None:
    table, found = Dataset.load_from_disk(f"{folder}/table"), {}
    for case, seconds in CASES.items():
        flags = dict(batch_seconds=1_000.0, micro_batch_seconds=seconds)
        found[case] = one_update(table, Path(folder) / case, case, **flags)
    found["texts"] = transcribe(table, Path(folder) / "texts", f"{folder}/lm.arpa", per_device_eval_batch_size=3)
    rank = torch.distributed.get_rank()
    with pytest.raises(UserError) as refused:
        make_trainer(table.select(range(len(table) - rank)), Path(folder) / "unequal").train()
    found["unequal"] = str(refused.value)
    if rank == 0:
        torch.save(found, out)
    leave_group()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
