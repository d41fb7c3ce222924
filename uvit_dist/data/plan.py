"""Which samples a step uses, in which order: pure arithmetic on (index, seed, epoch, step, rank, world size).

An epoch is ⌊N/B⌋ steps. It permutes stretches of shards, sees them as one sequence that starts at a random place, cuts
it into K equal lanes, shuffles each lane in blocks that do not overlap, and gives every step the next B/K samples of
every lane.
Ranks own lanes: neither their number nor that of any workers changes which samples a step uses.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from uvit_dist.errors import ConfigError

Ids = NDArray[np.int64]
STRETCH = 256
"""Samples of a shard that stay together. All mirror images of a shard are in one other shard: whole shards would let
the two meet seldom, and then for long."""
Pieces = tuple[tuple[int, int, int], ...]
"""Runs of samples in shards: (shard, first sample in it, number of samples)."""


def _random_words(seed: int, *purpose: int | str, count: int) -> NDArray[np.uint64]:
    """``count`` words of numpy's Philox stream, which is frozen, under a key made of the arguments."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def held_out_ids(samples: int, count: int, seed: int) -> Ids:
    """``count`` different ids of 0…samples-1, (count,) int64, in an order that the seed decides."""
    return _permutation(seed, "held_out", size=samples)[:count]


def _permutation(seed: int, *purpose: int | str, size: int) -> Ids:
    return np.argsort(_random_words(seed, *purpose, count=size), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class BlockSpan:
    """A block: a run of the epoch's sequence inside one lane, as pieces of shards, and its shuffled order.

    pieces: (shard, first sample in it, number of samples); order[i]: place, in the pieces read one after the other,
    of the i-th sample that is served.
    """

    pieces: Pieces
    order: Ids


@dataclass(frozen=True)
class Plan:
    """The order of all epochs. Sample id = its place in the index: shards in index order, then place in the shard.

    shard_counts: samples of each shard; lanes: K; block_size: samples shuffled together.
    Raises ``ConfigError`` if a batch does not divide or there is less than one batch.
    """

    shard_counts: tuple[int, ...]
    seed: int
    global_batch_size: int
    lanes: int
    block_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.lanes:
            raise ConfigError(
                f"train.global_batch_size {self.global_batch_size} must be divisible by data.lanes {self.lanes}; "
                "change one"
            )
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"the index holds {self.samples} samples, fewer than train.global_batch_size "
                f"{self.global_batch_size}; use a smaller batch or more data"
            )

    @property
    def samples(self) -> int:
        """N, the number of samples in the index."""
        return sum(self.shard_counts)

    @property
    def steps_per_epoch(self) -> int:
        """⌊N/B⌋; the N mod B samples left over differ from epoch to epoch."""
        return self.samples // self.global_batch_size

    @property
    def per_lane(self) -> int:
        """Samples of one lane in one step, B/K."""
        return self.global_batch_size // self.lanes

    @property
    def lane_length(self) -> int:
        """Samples of one lane in one epoch."""
        return self.steps_per_epoch * self.per_lane

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in it) of a global step, from 0."""
        return divmod(step, self.steps_per_epoch)

    def lanes_of_rank(self, rank: int, world_size: int) -> range:
        """The lanes that a rank owns. Raises ``ConfigError`` where the world size does not divide the lanes."""
        if self.lanes % world_size:
            valid = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            raise ConfigError(f"{world_size} ranks do not divide data.lanes {self.lanes}; use {valid}")
        owned = self.lanes // world_size
        return range(rank * owned, (rank + 1) * owned)

    def block(self, epoch: int, lane: int, block: int) -> BlockSpan:
        """The ``block``-th block of a lane: what to read and in which order to serve it."""
        first = block * self.block_size
        size = min(self.block_size, self.lane_length - first)
        sequence = _sequence(self.shard_counts, self.seed, epoch)
        pieces = sequence.pieces(lane * self.lane_length + first, size)
        return BlockSpan(pieces, _permutation(self.seed, "block", epoch, lane, block, size=size))

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Ids:
        """Ids of the samples that a rank uses in a global step, in order; (B / world_size,) int64."""
        epoch, in_epoch = self.position(step)
        starts = np.concatenate([[0], np.cumsum(self.shard_counts)])
        ids = []
        for lane in self.lanes_of_rank(rank, world_size):
            place = in_epoch * self.per_lane
            end = place + self.per_lane
            while place < end:
                block, offset = divmod(place, self.block_size)
                span = self.block(epoch, lane, block)
                runs = [starts[shard] + np.arange(first, first + count) for shard, first, count in span.pieces]
                taken = min(end - place, len(span.order) - offset)
                ids.append(np.concatenate(runs)[span.order[offset : offset + taken]])
                place += taken
        return np.concatenate(ids).astype(np.int64)


@dataclass(frozen=True)
class _Sequence:
    """The stretches of an epoch one after the other, from a random start, around the end.

    shards, firsts: the shard of each, and its first sample in it; ends: where it ends in the sequence.
    """

    shards: Ids
    firsts: Ids
    ends: Ids
    start: int

    def pieces(self, first: int, size: int) -> Pieces:
        total = int(self.ends[-1])
        out = []
        while size:
            place = (self.start + first) % total
            row = int(np.searchsorted(self.ends, place, side="right"))
            begin = int(self.ends[row - 1]) if row else 0
            taken = min(size, int(self.ends[row]) - place)
            out.append((int(self.shards[row]), int(self.firsts[row]) + place - begin, taken))
            first, size = first + taken, size - taken
        return tuple(out)


@lru_cache(maxsize=4)
def _sequence(shard_counts: tuple[int, ...], seed: int, epoch: int) -> _Sequence:
    counts = np.asarray(shard_counts, dtype=np.int64)
    stretches = -(-counts // STRETCH)
    shards = np.repeat(np.arange(len(counts)), stretches)
    firsts = (np.arange(len(shards)) - np.repeat(np.cumsum(stretches) - stretches, stretches)) * STRETCH
    order = _permutation(seed, "shards", epoch, size=len(shards))
    shards, firsts = shards[order], firsts[order]
    ends = np.cumsum(np.minimum(counts[shards] - firsts, STRETCH))
    start = int(_random_words(seed, "start", epoch, count=1)[0] % np.uint64(ends[-1]))
    return _Sequence(shards, firsts, ends, start)
