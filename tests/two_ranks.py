"""One effective batch in pieces, on one process or dealt to two: what `test_training.py` compares, and the script it
launches twice.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python tests/two_ranks.py OUT.pt
"""

import sys
from dataclasses import replace

import torch
from accelerate import Accelerator
from conftest import make_batch, tiny_config
from torch.distributed.tensor import DTensor

from w2v2.model.pretraining import PretrainingModel
from w2v2.train.launch import leave_group
from w2v2.train.update import UpdateSettings, accumulate

LENGTHS = [24_000, 22_000, 16_400, 16_400, 12_345, 9_000, 6_000]  # samples, longest first, as a cut has them
FIVE = [2, 1, 2, 1, 1]  # utterances in each of five pieces: every piece has another number of masked frames
NOISY = dict(hidden_dropout=0.1, attention_dropout=0.1, feat_quantizer_dropout=0.1, layerdrop=0.4)
DEALS = {"3/2": [[0, 2, 4], [1, 3]], "4/1": [[0, 1, 2, 3], [4]], "5/0": [[0, 1, 2, 3, 4], []]}


def settings(**changes) -> UpdateSettings:
    values = dict(step=3, seed=11, learning_rate=0.1, gumbel_temperature=1.5, diversity_weight=0.1)
    return UpdateSettings(**(values | dict(shared_diversity=True, max_grad_norm=0.0) | changes))


def build_model(dtype=torch.float64, **changes) -> PretrainingModel:
    """The same weights whenever and wherever it is called; the codes are far from uniform."""
    torch.manual_seed(4)
    model = PretrainingModel(tiny_config(**changes)).to(dtype).train()
    with torch.no_grad():
        model.quantizer.weight_proj.bias.normal_(std=2.0)
    return model


def pieces(config, sizes, dtype=torch.float64) -> list:
    """The effective batch of `LENGTHS`, cut into micro-batches of so many utterances each."""
    assert sum(sizes) == len(LENGTHS)
    batches, first = [], 0
    for piece, size in enumerate(sizes):
        batch = make_batch(config, LENGTHS[first : first + size], first=first, piece=piece, dtype=dtype)
        batches.append(replace(batch, plan=batch.plan._replace(batch_samples=sum(LENGTHS), num_rounds=len(sizes))))
        first += size
    return batches


def dummy(batch):
    """Silence in the shape of the batch's last utterance, without weight."""
    last = replace(batch, samples=torch.zeros_like(batch.samples), weight=0.0, original_samples=0, heard_samples=0)
    return replace(last, plan=batch.plan._replace(dummy=True, piece=99))


def dealt(config, deal: str, rank: int) -> list:
    """This rank's micro-batches of the effective batch of `FIVE` pieces, with dummies up to the longest rank's number."""
    whole, ranks = pieces(config, FIVE), DEALS[deal]
    rounds = max(map(len, ranks))
    batches = [whole[i] for i in ranks[rank]] + [dummy(whole[-1])] * (rounds - len(ranks[rank]))
    return [replace(batch, plan=batch.plan._replace(num_rounds=rounds)) for batch in batches]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradient(accelerator, model, batches, update: UpdateSettings):
    """(gradient of the whole effective batch, divided as an update divides it; the totals)."""
    model.zero_grad()
    totals, scale = accumulate(accelerator, model, batches, update)
    factor = scale / float(totals.sums.num_masked)
    bare = accelerator.unwrap_model(model)
    return {name: full(p.grad) * factor for name, p in bare.named_parameters()}, totals


def main(out: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = {}
    for deal in DEALS:
        for shared in (True, False):
            model = accelerator.prepare(build_model(**NOISY))
            mine = dealt(model.module.config, deal, accelerator.process_index)
            found[deal, shared], totals = gradient(accelerator, model, mine, settings(shared_diversity=shared))
            found[deal, shared]["metrics"] = totals.metrics()
    if accelerator.is_main_process:
        torch.save(found, out)
    leave_group()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
