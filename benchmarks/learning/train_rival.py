"""Pretrain with another program's loop, on the effective batches that pretrain.py draws of the same flags.

    python benchmarks/learning/train_rival.py shipped 4 configs/pretrain/small.yaml --train_data … --output_dir runs/shipped

`shipped` is transformers' run_wav2vec2_pretraining_no_trainer.py: it divides the accumulated gradient by the masked
frames of each micro-batch, so nearly all of it is the last one's. `mended` divides once, by the masked frames of all.
`speechbrain` is SpeechBrain's own model and loss. Whichever it is, an effective batch is cut into as many micro-batches
as the second word says, and learning rate, AdamW, Gumbel temperature and weight of the diversity loss are the flags'.
The folder is for stock classes.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stock_loop import Stock
from transformers import set_seed

from w2v2.arguments import PretrainArguments
from w2v2.cli import parse_command_line, run_script
from w2v2.data.batching import Crops, Cursor
from w2v2.data.collate import CropDataset, Framing
from w2v2.data.sampling import build_batches
from w2v2.data.utterances import load_utterances
from w2v2.errors import UserError
from w2v2.model.loading import build_config
from w2v2.train.schedule import UpdateSettings
from w2v2.train.update import build_optimizer

CUT, SAVE_STEPS = "cut_short.pt", 200
FLAGS = argparse.Namespace(device="cpu", precision="fp32")  # of a benchmark's contender


class Mended(Stock):
    """Masks lie in real frames. As its documentation says, a group-normed model hears padding without an attention mask."""

    by_length = False  # micro-batches take utterances as they come

    def __init__(self, args, flags):
        super().__init__(args, flags)
        self.extractor.return_attention_mask = True
        self.config = self.model.config  # a copy, which the loss reads

    def inputs(self, batch):
        inputs = super().inputs(batch)
        if self.config.feat_extract_norm != "layer":
            del inputs["attention_mask"]
        return inputs

    def run(self):
        self.divide(sum(self.accumulate(batch) for batch in self.batches))
        self.step_on()

    def accumulate(self, batch, share: float = 1.0) -> int:
        """Add a micro-batch's gradient; returns its masked frames."""
        inputs = self.inputs(batch)
        (share * self.model(**inputs).loss).backward()
        return int(inputs["mask_time_indices"].sum())

    def step_on(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def divide(self, num_masked: int) -> None:
        torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], float(num_masked))

    def set_temperature(self, temperature: float) -> None:
        self.model.set_gumbel_temperature(temperature)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.extractor.return_attention_mask = self.config.feat_extract_norm == "layer"
        self.extractor.save_pretrained(folder)


class Shipped(Mended):
    def run(self):
        for batch in self.batches:
            self.divide(self.accumulate(batch, 1 / len(self.batches)))
        self.step_on()


def load_side(name: str, args: PretrainArguments):
    if name == "speechbrain":
        from speechbrain_loop import SpeechBrain  # an extra package

        return SpeechBrain(args, FLAGS)
    return {"mended": Mended, "shipped": Shipped}[name](args, FLAGS)


def read_waveforms(dataset: CropDataset, crops: Crops) -> list[np.ndarray]:
    """The crops' samples, (S,) float32 each."""
    columns = dataset.table[crops.utterance]
    entries = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    parts = map(dataset.read, entries, crops.start.tolist(), crops.num_samples.tolist())
    return [x / np.float32(32_768) if x.dtype == np.int16 else x for x in parts]


def train(name: str, accumulation: int, args: PretrainArguments) -> None:
    folder, config = Path(args.output_dir), build_config(args)
    framing, weight = Framing(config, normalize=False), config.diversity_loss_weight
    table = load_utterances(args.list_sources("train_data"), args, framing)[0]
    batches, dataset = build_batches(table, args), CropDataset(table.table, framing, args.seed)
    side = load_side(name, args)
    side.optimizer = build_optimizer(side.model, args)
    first, cursor, cut = 0, Cursor(), folder / CUT
    if cut.exists():
        state = torch.load(cut, weights_only=True)
        first, cursor = state["step"], Cursor(*state["cursor"])
        side.model.load_state_dict(state["model"])
        side.optimizer.load_state_dict(state["optimizer"])
    for step in range(first, args.max_steps):
        crops, cursor = batches.draw(cursor)
        order = np.argsort(-crops.num_samples, kind="stable") if side.by_length else np.arange(len(crops.num_samples))
        if len(order) < accumulation:
            raise UserError(f"an effective batch of {len(order)} utterances is no {accumulation} micro-batches")
        waveforms = read_waveforms(dataset, crops)
        settings = UpdateSettings.at(step, args, weight)
        side.optimizer.param_groups[0]["lr"] = settings.learning_rate
        side.config.diversity_loss_weight = settings.diversity_weight
        side.set_temperature(settings.gumbel_temperature)
        set_seed((args.seed * args.max_steps + step) % 2**32)
        side.batches = [side.collate([waveforms[i] for i in part]) for part in np.array_split(order, accumulation)]
        side.run()
        if (step + 1) % SAVE_STEPS == 0:
            print(f"update {step + 1:,} of {args.max_steps:,}", flush=True)
            state = dict(step=step + 1, cursor=list(cursor), model=side.model.state_dict())
            torch.save(state | {"optimizer": side.optimizer.state_dict()}, folder / "unfinished")
            os.replace(folder / "unfinished", cut)
    side.config.diversity_loss_weight = weight
    side.save(folder)
    cut.unlink(missing_ok=True)


def main() -> None:
    name, accumulation, *words = sys.argv[1:]
    (args,) = parse_command_line([PretrainArguments], words)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    train(name, int(accumulation), args)


if __name__ == "__main__":
    run_script(main)
