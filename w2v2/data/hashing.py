"""Stateless randomness: 64-bit hashes of (seed, stream, epoch, utterance, counter) in place of generators.

A hash has no state that could break resuming: the crop of utterance 17 in epoch 3 is the same for every process that
asks. The mixer is splitmix64's finaliser (Steele, Lea and Flood, 2014), in int64 tensors that wrap around.
"""

from collections.abc import Callable

import numpy as np
import torch


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)

# Streams: the purposes of a hash. They are negative, so none equals an epoch, an utterance or a counter.
SPEED, SHARDS, WINDOW, MIX, ORDER, CROP, MASK, DISTRACTOR, LAYERDROP, NOISE = range(-11, -1)


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical (not arithmetic) shift of int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def derive(key: torch.Tensor | int, *parts: torch.Tensor | int) -> torch.Tensor:
    """Hash `key` with each of `parts` in turn; all broadcast together. Returns int64, uniform over all 64 bits.

    A part that is a plain number stays on the host: a copy to a device would make the host wait for the device.
    """
    h = torch.as_tensor(key, dtype=torch.int64)
    for part in parts:
        step = (part + 1) * _GOLDEN if torch.is_tensor(part) else _signed((int(part) + 1) * _GOLDEN % (1 << 64))
        h = _mix(_mix(h) + step)
    return h


def derive_many(key: int | np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`derive(key, part)` as a function of int64 arrays. It is fast for short ones: the key is mixed once, in numpy."""
    mixed = _mix(key) if isinstance(key, np.ndarray) else int(_mix(torch.tensor(key)))
    return lambda part: _mix(mixed + (part + 1) * _GOLDEN)


def below(h: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
    """Uniform integers in [0, n) from hashes; 1 <= n < 2**31."""
    return (_shift_right(h, 33) * n) >> 31


def uniform(h: torch.Tensor) -> torch.Tensor:
    """Uniform float64 in [0, 1) from hashes."""
    return _shift_right(h, 11).double() * 2.0**-53


def positive(h: torch.Tensor) -> torch.Tensor:
    """The hash as a non-negative int64 (its upper 63 bits): to sort by, or to seed a generator with."""
    return _shift_right(h, 1)
