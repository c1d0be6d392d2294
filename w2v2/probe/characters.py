"""A linear CTC head on frozen frames: how much of the characters a linear map reads from each layer, without context.

Shapes: N utterances, T frames of one, D width, V entries of the vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from w2v2.evaluate.error_rates import error_rates
from w2v2.finetune.text import encode, greedy_decode

BATCH_SIZE = 16
LEARNING_RATE = 0.01


class FrameSet:
    """The frames of all utterances at one layer, (frames, D) as mapped from the disk, standardised by those of `train` rows."""

    def __init__(self, frames: np.ndarray, starts: np.ndarray, train: Sequence[int]):
        self.frames, self.starts = frames, starts
        self.mean, self.deviation = self._moments(train)

    def _moments(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        count, total, squares = 0, 0.0, 0.0
        for row in rows:
            x = self.frames[self.starts[row] : self.starts[row + 1]].astype(np.float64)
            count, total, squares = count + len(x), total + x.sum(0), squares + (x**2).sum(0)
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-10))
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames (N, T, D), padded with zeros, and their numbers (N,)."""
        pieces = [
            (torch.from_numpy(self.frames[self.starts[row] : self.starts[row + 1]].astype(np.float32)) - self.mean)
            / self.deviation
            for row in rows
        ]
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True), torch.tensor([len(piece) for piece in pieces])


def train_head(
    data: FrameSet, texts: Sequence[str], vocabulary: dict[str, int], rows: Sequence[int], num_updates: int, seed: int
) -> nn.Linear:
    """A linear layer D → V fitted with Adam on utterances drawn at random, a linear decay to zero; a function of the seed."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    head = nn.Linear(len(data.mean), len(vocabulary))
    optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_updates)
    labels = {row: torch.tensor(encode(texts[row], vocabulary)) for row in rows}
    for _ in range(num_updates):
        chosen = random.choice(rows, min(BATCH_SIZE, len(rows)), replace=False)
        frames, lengths = data.batch(chosen)
        log_probabilities = head(frames).log_softmax(-1).transpose(0, 1)  # (T, N, V)
        written = [labels[row] for row in chosen.tolist()]
        label_lengths = torch.tensor([len(label) for label in written])
        loss = F.ctc_loss(log_probabilities, torch.cat(written), lengths, label_lengths, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


@torch.no_grad()
def transcribe(head: nn.Linear, data: FrameSet, vocabulary: dict[str, int], rows: Sequence[int]) -> list[str]:
    """Greedy decoding of these utterances, in order."""
    texts = []
    for first in range(0, len(rows), BATCH_SIZE):
        frames, lengths = data.batch(rows[first : first + BATCH_SIZE])
        for path, length in zip(head(frames).argmax(-1), lengths, strict=True):
            texts.append(greedy_decode(path[:length].tolist(), vocabulary))
    return texts


def probe_characters(
    layers: Sequence[np.ndarray], starts: np.ndarray, texts: Sequence[str], vocabulary: dict[str, int],
    train: Sequence[int], validation: Sequence[int], test: Sequence[int], *, num_updates: int, seed: int,
) -> list[dict[str, float]]:  # fmt: skip
    """For each layer the test's `cer` and `wer`, and `validation`, the validation utterances' CER; fractions."""
    results = []
    for number, frames in enumerate(layers):
        data = FrameSet(frames, starts, train)
        head = train_head(data, texts, vocabulary, train, num_updates, seed)
        rates = [
            error_rates([texts[row] for row in rows], transcribe(head, data, vocabulary, rows))
            for rows in (validation, test)
        ]
        results.append({"layer": number, **rates[1], "validation": rates[0]["cer"]})
    return results
