"""Utterances of any lengths side by side in one tensor, and the gaps behind them.

Shapes: B utterances, T frames of one, N places of all of them and of the gaps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Rows(NamedTuple):
    """Where each utterance lies, and its gap."""

    lengths: tuple[int, ...]  # of each utterance, on the host
    gaps: tuple[int, ...]  # behind each, on the host
    bounds: torch.Tensor  # (2 · B + 1,) int32, where utterances and gaps begin in turn, and the end, on the device
    longest: int  # of all of them

    @classmethod
    def build(cls, lengths: torch.Tensor, gaps: torch.Tensor) -> "Rows":
        """Of so many frames, and places behind them: (B,) and (B,) int64."""
        both = torch.stack([lengths, gaps], 1)  # (B, 2)
        bounds = F.pad(both.flatten().cumsum(0), (1, 0)).int()
        return cls(tuple(lengths.tolist()), tuple(gaps.tolist()), bounds, int(both.max()))

    def move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        return self._replace(bounds=move(self.bounds))

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, …) → (T, …) of each utterance. One split, because each slice would fill its gradient up with zeros."""
        return list(x.split([n for pair in zip(self.lengths, self.gaps, strict=True) for n in pair])[::2])

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """(T, …) of each utterance → (N, …), zeros in the gaps."""
        gaps = [parts[0].new_zeros(gap, *parts[0].shape[1:]) for gap in self.gaps]
        return torch.cat([x for pair in zip(parts, gaps, strict=True) for x in pair])

    def choose(self, kept: torch.Tensor) -> "Rows":
        """Those utterances that are `kept`, (B,) bool, side by side."""
        chosen = kept.nonzero()[:, 0].cpu()
        return Rows.build(torch.tensor(self.lengths)[chosen], torch.tensor(self.gaps)[chosen])
