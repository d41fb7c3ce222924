"""The plan turned into batches: blocks read ahead by threads, every sample checked against its hash."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist import storage
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex
from uvit_dist.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one step. moments: (b, 2C, H, W) as stored; labels, ids: (b,) int64."""

    step: int
    epoch: int
    ids: Tensor
    labels: Tensor
    moments: Tensor


@dataclass(frozen=True)
class _Block:
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    moments: NDArray[Any]


class BlockReader:
    """Reads the samples of a block, in shard order, into one array; safe to call from several threads."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.dtype = np.dtype(index.provenance.moments_dtype).newbyteorder("<")
        self.shape = index.provenance.moments_shape
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._rows = lru_cache(maxsize=256)(index.rows)

    def read(self, pieces: tuple[tuple[int, int, int], ...], order: NDArray[np.int64]) -> _Block:
        """pieces: (shard, first, count) runs; order: permutation of them. Raises ``DataError`` on any damage."""
        total = sum(count for _, _, count in pieces)
        target = np.empty(total, dtype=np.int64)
        target[order] = np.arange(total)
        ids, labels = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        moments = np.empty((total, *self.shape), dtype=self.dtype)
        done = 0
        for shard, first, count in pieces:
            rows = self._rows(shard)[first : first + count]
            begin, end = int(rows["offset"][0]), int(rows["offset"][-1]) + self.nbytes
            data = memoryview(storage.read_range(self.index.shard_path(shard), begin, end - begin))
            slots = target[done : done + count]
            for slot, row in zip(slots, rows, strict=True):
                start = int(row["offset"]) - begin
                payload = data[start : start + self.nbytes]
                if xxhash.xxh3_64_intdigest(payload) != int(row["xxh3"]):
                    raise DataError(
                        f"{self.index.shard_path(shard)}: the sample at byte {int(row['offset'])} differs from the "
                        "hash in the index: the shard is damaged. Make or copy this shard again."
                    )
                moments[slot] = np.frombuffer(payload, dtype=self.dtype).reshape(self.shape)
            ids[slots] = self.index.starts[shard] + np.arange(first, first + count)
            labels[slots] = rows["label"]
            done += count
        return _Block(ids, labels, moments)


class LatentLoader:
    """Iterates over a rank's batches from a step on, for ever. Its whole state is the step.

    read_threads and prefetch_blocks (blocks ahead, in each lane) change how fast, never what.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        rank: int,
        world_size: int,
        start_step: int = 0,
        read_threads: int = 4,
        prefetch_blocks: int = 1,
    ) -> None:
        self.plan, self.step, self.ahead = plan, start_step, prefetch_blocks
        self._reader = BlockReader(index)
        self._lanes = plan.lanes_of_rank(rank, world_size)
        self._pool = ThreadPoolExecutor(read_threads, thread_name_prefix="shard-reader")
        self._blocks: dict[tuple[int, int, int], Future[_Block]] = {}

    def _request(self, epoch: int, lane: int, block: int) -> Future[_Block]:
        key = (epoch, lane, block)
        if key not in self._blocks:
            span = self.plan.block(epoch, lane, block)
            self._blocks[key] = self._pool.submit(self._reader.read, span.pieces, span.order)
        return self._blocks[key]

    def _read_ahead(self, epoch: int, block: int) -> None:
        blocks_in_lane = -(-self.plan.lane_length // self.plan.block_size)
        in_a_step = -(-self.plan.per_lane // self.plan.block_size)
        for k in range(self.ahead + in_a_step):
            later, place = divmod(block + k, blocks_in_lane)
            for lane in self._lanes:
                self._request(epoch + later, lane, place)

    def _take(self, epoch: int, lane: int, place: int) -> Iterator[tuple[_Block, slice]]:
        end = place + self.plan.per_lane
        while place < end:
            block, offset = divmod(place, self.plan.block_size)
            content = self._request(epoch, lane, block).result()
            taken = min(end - place, len(content.ids) - offset)
            yield content, slice(offset, offset + taken)
            place += taken
            if offset + taken == len(content.ids):
                del self._blocks[epoch, lane, block]

    def __iter__(self) -> LatentLoader:
        return self

    def __next__(self) -> Batch:
        epoch, in_epoch = self.plan.position(self.step)
        place = in_epoch * self.plan.per_lane
        self._read_ahead(epoch, place // self.plan.block_size)
        parts = [part for lane in self._lanes for part in self._take(epoch, lane, place)]
        batch = Batch(
            step=self.step,
            epoch=epoch,
            ids=torch.from_numpy(np.concatenate([block.ids[cut] for block, cut in parts])),
            labels=torch.from_numpy(np.concatenate([block.labels[cut] for block, cut in parts])),
            moments=torch.from_numpy(np.concatenate([block.moments[cut] for block, cut in parts])),
        )
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop reading; what is under way is abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)
