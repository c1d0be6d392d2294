"""Utterances of any lengths side by side in one tensor, and the gaps behind them.

Shapes: B utterances, T frames of one, N places of all of them and of the gaps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Rows(NamedTuple):
    """Where each utterance lies, and its gap. Tensors are on the device, the rest on the host."""

    row: torch.Tensor  # (N,) int64, the utterance of each place; a gap belongs to the utterance before it
    first: torch.Tensor  # (B,) int64, the place where each utterance begins
    frames: torch.Tensor  # (B,) int64, of each utterance
    bounds: torch.Tensor  # (2 · B + 1,) int32, where utterances and gaps begin in turn, and the end
    lengths: tuple[int, ...]  # `frames`
    gaps: tuple[int, ...]  # behind each
    longest: int  # of all utterances and gaps

    @classmethod
    def build(cls, frames: torch.Tensor, gaps: torch.Tensor) -> "Rows":
        """Of so many frames, and places behind them: (B,) and (B,) int64."""
        both = torch.stack([frames, gaps], 1)  # (B, 2)
        bounds = F.pad(both.flatten().cumsum(0), (1, 0))
        row = torch.arange(len(frames)).repeat_interleave(both.sum(1))
        lengths, gaps = both.T.tolist()
        return cls(row, bounds[:-1:2], frames, bounds.int(), tuple(lengths), tuple(gaps), max(lengths + gaps))

    @property
    def inside(self) -> torch.Tensor:
        """(N,) bool: the places that hold a frame of their utterance, and are no gap."""
        return torch.arange(len(self.row), device=self.row.device) - self.first[self.row] < self.frames[self.row]

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        """Each tensor in place of another."""
        return Rows(*(move(x) if torch.is_tensor(x) else x for x in self))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, …) → (T, …) of each utterance. One split, because each slice would fill its gradient up with zeros."""
        return list(x.split([n for pair in zip(self.lengths, self.gaps, strict=True) for n in pair])[::2])

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """(T, …) of each utterance → (N, …), zeros in the gaps."""
        gaps = [parts[0].new_zeros(gap, *parts[0].shape[1:]) for gap in self.gaps]
        return torch.cat([x for pair in zip(parts, gaps, strict=True) for x in pair])

    def choose(self, kept: torch.Tensor) -> "Rows":
        """Those utterances that are `kept`, (B,) bool, side by side."""
        return Rows.build(*torch.tensor([self.lengths, self.gaps])[:, kept.nonzero()[:, 0].cpu()])
