"""A linear CTC head on frozen frames: how much of the characters a linear map reads from each layer, without context.

Shapes: N utterances, T frames of one, U characters of one, D width, V entries of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import nn

from w2v2.evaluate.scores import error_rates
from w2v2.finetune.labels import Split
from w2v2.finetune.text import encode, greedy_decode

BATCH_SIZE = 16
LEARNING_RATE = 0.01


class FrameSet:
    """Frames of all utterances at one layer, (frames, D) on the disk, standardised by those of the `train` rows."""

    def __init__(self, frames: np.ndarray, starts: np.ndarray, train: Sequence[int]):
        self.frames, self.starts = frames, starts
        self.scaler = StandardScaler()
        for row in train:
            self.scaler.partial_fit(self._frames_of(row))

    def _frames_of(self, row: int) -> np.ndarray:
        """(T, D); doubles, for sums over hours of them."""
        return self.frames[self.starts[row] : self.starts[row + 1]].astype(np.float64)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames (N, T, D), padded with zeros, and their numbers (N,)."""
        pieces = [torch.from_numpy(self.scaler.transform(self._frames_of(row))).float() for row in rows]
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True), torch.tensor([len(piece) for piece in pieces])


@dataclass(frozen=True)
class CharacterProbe:
    """What is read, and how heads are trained: Adam on utterances drawn at random, a linear decay to zero."""

    texts: Sequence[str]
    vocabulary: dict[str, int]
    num_updates: int
    seed: int

    def probe_layers(self, layers: Sequence[np.ndarray], starts: np.ndarray, split: Split) -> list[dict[str, float]]:
        """For each layer the test's `cer` and `wer`, and `validation`, the validation utterances' CER; fractions."""
        results = []
        for number, frames in enumerate(layers):
            data = FrameSet(frames, starts, split.train)
            head = self.train_head(data, split.train)
            validation, test = (
                error_rates([self.texts[row] for row in rows], self.transcribe(head, data, rows))
                for rows in (split.validation, split.test)
            )
            results.append({"layer": number, **test, "validation": validation["cer"]})
        return results

    def train_head(self, data: FrameSet, rows: Sequence[int]) -> nn.Linear:
        """A linear layer D → V, a function of the seed."""
        random = np.random.default_rng(self.seed)
        torch.manual_seed(self.seed)
        head = nn.Linear(data.frames.shape[1], len(self.vocabulary))
        optimizer = torch.optim.Adam(head.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.num_updates)
        labels = {row: torch.tensor(encode(self.texts[row], self.vocabulary)) for row in rows}  # (U,) each
        for _ in range(self.num_updates):
            chosen = random.choice(rows, min(BATCH_SIZE, len(rows)), replace=False)
            frames, num_frames_N = data.batch(chosen)
            log_probabilities = head(frames).log_softmax(-1).transpose(0, 1)  # (N, T, V) -> (T, N, V)
            written = [labels[row] for row in chosen.tolist()]
            num_labels_N = torch.tensor([len(label) for label in written])
            loss = F.ctc_loss(log_probabilities, torch.cat(written), num_frames_N, num_labels_N, zero_infinity=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return head

    @torch.no_grad()
    def transcribe(self, head: nn.Linear, data: FrameSet, rows: Sequence[int]) -> list[str]:
        """Greedy decoding of these utterances, in order."""
        texts = []
        for first in range(0, len(rows), BATCH_SIZE):
            frames, num_frames_N = data.batch(rows[first : first + BATCH_SIZE])
            paths = head(frames).argmax(-1)  # (N, T, V) -> (N, T)
            for path, num_frames in zip(paths, num_frames_N, strict=True):
                texts.append(greedy_decode(path[:num_frames].tolist(), self.vocabulary))
        return texts
