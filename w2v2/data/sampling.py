"""Sources of unequal size → how often each is heard, and an order of an epoch that mixes them.

1. *Shares.* p(language) ∝ (its hours)^α, and within it p(source) ∝ (its hours)^β, times the source's weight.
   α, β = 1 leaves every source its natural share; towards 0 small ones are heard more often (XLS-R: 0.5).
2. *Epoch.* It hears about as many hours as the sources hold together. A share becomes a number of draws.
3. *Interleave.* An epoch is cut into blocks, each with every source's due draws, shuffled. A draw of a source is the
   next utterance in its own order: it hears all of its utterances before it repeats one.

Shapes: k sources, N positions, m blocks. All is closed form: no table grows with the utterances.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from w2v2.audio.crops import SAMPLING_RATE
from w2v2.data.batching import FEISTEL_ROUNDS, EffectiveBatches, EpochOrder, Order, find_half_bits, permute
from w2v2.data.hashing import MIX, ORDER, below, derive, derive_many, positive
from w2v2.data.streaming import ShardOrder
from w2v2.data.utterances import Utterances
from w2v2.errors import UserError
from w2v2.manifests.sources import Source

BLOCK = 16  # positions: an effective batch holds many blocks, and so every source's due share, up to two blocks'


def build_order(utterances: Utterances, args) -> Order:
    """The order of the flags: every utterance once an epoch, shard by shard if streamed, or sources mixed by their shares."""
    if shards := utterances.shards:
        return ShardOrder(shards.num_rows, shards.window_shards, args.seed)
    if not utterances.sources:
        return EpochOrder(len(utterances.num_samples), args.seed)
    if args.sampling_alpha_language != 1 and not any(source.language for source in utterances.sources):
        raise UserError(
            f"--sampling_alpha_language {args.sampling_alpha_language:g}: no source of {args.train_data[0]} names its "
            "language: add `language` to each"
        )
    shares = find_shares(utterances.sources, args.sampling_alpha_corpus, args.sampling_alpha_language)
    return MixedOrder(utterances.sources, count_draws(utterances.sources, shares), args.seed)


def build_batches(utterances: Utterances, args, seed: int | None = None) -> EffectiveBatches:
    """The flags in hours and seconds, as samples; drawn by the flags' seed and shares, or by `seed`, all alike."""
    return EffectiveBatches(
        utterances.num_samples,
        batch_samples=round(args.batch_hours * 3600 * SAMPLING_RATE),
        crop_samples=round(args.crop_seconds * SAMPLING_RATE),
        grid_samples=round(args.length_grid_seconds * SAMPLING_RATE),
        seed=args.seed if seed is None else seed,
        order=build_order(utterances, args) if seed is None else None,
    )


def find_shares(sources: Sequence[Source], alpha_corpus: float, alpha_language: float) -> np.ndarray:
    """Each source's share of the hours that are heard: (k,) floats that sum to 1."""
    hours = np.array([source.heard_samples for source in sources], dtype=np.float64)
    _, language = np.unique([source.language for source in sources], return_inverse=True)  # (k,) numbers of languages
    of_language = np.bincount(language, hours) ** alpha_language
    within = hours**alpha_corpus
    within /= np.bincount(language, within)[language]
    shares = of_language[language] * within * [source.weight for source in sources]
    return shares / shares.sum()


def count_draws(sources: Sequence[Source], shares: np.ndarray) -> np.ndarray:
    """How many utterances an epoch hears of each source, (k,) int64: at least one."""
    heard = np.array([source.heard_samples for source in sources], dtype=np.float64)
    mean = heard / [source.num_utterances for source in sources]
    return np.maximum(1, np.rint(shares * heard.sum() / mean)).astype(np.int64)


class MixedOrder:
    """Sources, one after another in the table, drawn so many times an epoch each; the passage is the source's own.

    Of a source with c draws, c · b / m ± 1 lie before block b of m, however small c is. A source goes on in the next
    epoch where it stopped. Its own order is an `EpochOrder` seeded by its name: other sources do not change it.
    """

    def __init__(self, sources: Sequence[Source], draws: np.ndarray, seed: int):
        self.sources, self.draws, self.seed = sources, draws, seed
        self.sizes = np.array([source.num_utterances for source in sources])
        self.first = np.cumsum(self.sizes) - self.sizes  # (k,) rows
        names = [int.from_bytes(hashlib.sha256(source.name.encode()).digest()[:7]) for source in sources]
        self.seeds = derive(seed, MIX, torch.tensor(names))  # (k,)
        self.half_bits = np.array([find_half_bits(int(size)) for size in self.sizes])
        self.repetitions = draws / self.sizes  # (k,) how often an epoch hears an utterance of each
        self.n = int(draws.sum())
        self.num_blocks = max(1, self.n // BLOCK)
        # (k,) Without it, all sources that are drawn once would come at the epoch's end.
        self.phase = below(self.seeds, self.num_blocks).numpy()
        self.identity = {"draws": {source.name: int(count) for source, count in zip(sources, draws, strict=True)}}

    def __call__(self, epoch: int, positions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        source, nth = self._interleave(epoch, positions.numpy())
        passage, x = np.divmod(epoch * self.draws[source] + nth, self.sizes[source])
        # Each source's own order at each passage, all at once: a position's keys are (rounds, N).
        keys = derive(self.seeds[source], ORDER, torch.from_numpy(passage))
        keys = derive(keys, torch.arange(FEISTEL_ROUNDS)[:, None]).numpy()
        rows = np.arange(len(x))
        while len(rows):
            x[rows] = permute(x[rows], self.half_bits[source[rows]], list(map(derive_many, keys[:, rows])))
            rows = rows[x[rows] >= self.sizes[source[rows]]]
        return self.first[source] + x, passage

    def summarize(self) -> list[dict[str, Any]]:
        """Each source, how often it is heard in an epoch, and its share of the samples that are heard; for JSON."""
        heard = self.repetitions * [source.heard_samples for source in self.sources]
        columns = zip(self.draws.tolist(), self.repetitions.tolist(), (heard / heard.sum()).tolist(), strict=True)
        names = ("draws_per_epoch", "repetitions_per_epoch", "share")
        return [
            source.summarize() | dict(zip(names, values, strict=True))
            for source, values in zip(self.sources, columns, strict=True)
        ]

    def _interleave(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each position, and which of its draws in this epoch that is; both (N,) int64."""
        num_sources = len(self.draws)
        # 1. Blocks that surely hold the positions: a block's start is off its due place by less than k.
        nearest = (np.array([positions.min() - num_sources, positions.max() + num_sources]) * self.num_blocks) // self.n
        edges = np.arange(max(0, nearest[0]), min(self.num_blocks, nearest[1] + 1) + 1)
        before = (self.draws * edges[:, None] + self.phase) // self.num_blocks  # (blocks + 1, k) draws until each edge
        starts = before.sum(1)
        # 2. Each block holds its sources in rising order, and is shuffled by hashes.
        counts = np.diff(before, axis=0)  # (blocks, k)
        source = np.repeat(np.tile(np.arange(num_sources), len(counts)), counts.ravel())
        block = np.repeat(np.arange(len(counts)), counts.sum(1))
        keys = positive(derive(self.seed, MIX, epoch, torch.arange(int(starts[0]), int(starts[-1])))).numpy()
        source = source[np.lexsort((keys, block))]
        # 3. A source's draws are counted on, in the order in which they come.
        totals, nth = before[-1] - before[0], np.empty_like(source)
        counted = np.repeat(np.cumsum(totals) - totals - before[0], totals)
        nth[np.argsort(source, kind="stable")] = np.arange(len(source)) - counted
        place = positions - starts[0]
        return source[place], nth[place]
