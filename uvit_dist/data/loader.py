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
from uvit_dist.data.plan import Ids, Pieces, Plan
from uvit_dist.data.shards import ShardIndex
from uvit_dist.diffusion.keyed_random import keyed_bits
from uvit_dist.errors import DataError

MERGED_GAP = 1 << 15
"""Bytes between two parts of a shard that are rather read too than left out by a request of their own."""


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one step. data: (b, *shape) as stored, moments or pixels; labels, ids: (b,) int64.

    contexts: (b, L, D) as stored, of the caption drawn for each sample, or none.
    """

    step: int
    epoch: int
    ids: Tensor
    labels: Tensor
    data: Tensor
    contexts: Tensor | None = None

    def to(self, device: torch.device, part: slice = slice(None)) -> Batch:
        """A part of the batch, on a device. Shapes as of the batch, (b, ...)."""
        fields = (self.ids, self.labels, self.data, self.contexts)
        moved = [None if field is None else field[part].to(device, non_blocking=True) for field in fields]
        return Batch(self.step, self.epoch, *moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Block:
    ids: Ids
    labels: Ids
    data: NDArray[Any]
    contexts: NDArray[Any] | None


class BlockReader:
    """Reads samples of an index, any or in blocks, each checked against its hash; safe to call from several threads.

    The caption of a sample is a function of (seed, purpose, epoch, id).
    """

    def __init__(self, index: ShardIndex, seed: int, caption_purpose: str = "caption") -> None:
        self.index, self._seed, self._purpose = index, seed, caption_purpose
        made = index.provenance
        self._dtype, self._shape = np.dtype(made.dtype).newbyteorder("<"), made.shape
        self._text = made.text
        self._rows = lru_cache(maxsize=256)(index.rows)
        self._context_rows = lru_cache(maxsize=256)(index.context_rows)

    def read(self, pieces: Pieces, order: Ids, epoch: int) -> _Block:
        """pieces: (shard, first, count) runs; order: permutation of them. Raises ``DataError`` on any damage."""
        total = sum(count for _, _, count in pieces)
        target = np.empty(total, dtype=np.int64)
        target[order] = np.arange(total)
        ids, labels = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        data = np.empty((total, *self._shape), dtype=self._dtype)
        contexts = None
        if self._text is not None:
            contexts = np.empty((total, *self._text.shape), dtype=np.dtype(self._text.dtype).newbyteorder("<"))
        done = 0
        for shard, first, count in pieces:
            rows = self._rows(shard)[first : first + count]
            slots = target[done : done + count]
            ids[slots] = self.index.starts[shard] + np.arange(first, first + count)
            labels[slots] = rows["label"]
            self._fill(shard, rows["offset"], rows["xxh3"], slots, data)
            if contexts is not None:
                drawn = self._draw_captions(shard, first, count, epoch, ids[slots])
                self._fill(shard, drawn["offset"], drawn["xxh3"], slots, contexts)
            done += count
        return _Block(ids, labels, data, contexts)

    def read_ids(self, ids: Ids, epoch: int = 0) -> Batch:
        """The samples of the given ids, (b,), in this order. Raises ``DataError`` on any damage."""
        shards = np.searchsorted(self.index.starts, ids, side="right") - 1
        pieces = [(int(s), int(i - self.index.starts[s]), 1) for s, i in zip(shards, ids, strict=True)]
        block = self.read(tuple(pieces), np.arange(len(ids)), epoch)
        return _batch(0, epoch, [(block, slice(None))])

    def _draw_captions(self, shard: int, first: int, count: int, epoch: int, ids: Ids) -> NDArray[Any]:
        """CONTEXT_ROW of the caption drawn for each of a run of samples, (count,)."""
        captions = self._rows(shard)["captions"].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(captions)])[first : first + count]
        words = keyed_bits(self._seed, self._purpose, epoch, torch.from_numpy(ids), 1)[:, 0].numpy()
        return self._context_rows(shard)[starts + ((words * captions[first : first + count]) >> 32)]

    def _fill(self, shard: int, offsets: Ids, hashes: NDArray[Any], slots: Ids, out: NDArray[Any]) -> None:
        """Read items of out's kind at ``offsets``, ascending, into out[slots], each checked; near ones together."""
        size = out[:1].nbytes
        path = self.index.shard_path(shard)
        starts = offsets.astype(np.int64)
        apart = np.flatnonzero(np.diff(starts) > size + MERGED_GAP) + 1
        for run in np.split(np.arange(len(starts)), apart):
            begin, end = int(starts[run[0]]), int(starts[run[-1]]) + size
            content = memoryview(storage.read_range(path, begin, end - begin))
            for item in run:
                payload = content[starts[item] - begin :][:size]
                if xxhash.xxh3_64_intdigest(payload) != int(hashes[item]):
                    raise DataError(
                        f"{path}: the sample at byte {starts[item]} differs from the hash in the index: the shard is "
                        "damaged. Make or copy this shard again."
                    )
                out[slots[item]] = np.frombuffer(payload, dtype=out.dtype).reshape(out.shape[1:])


def _batch(step: int, epoch: int, parts: list[tuple[_Block, slice]]) -> Batch:
    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(block, name)[cut] for block, cut in parts]))

    contexts = None if parts[0][0].contexts is None else joined("contexts")
    return Batch(step, epoch, joined("ids"), joined("labels"), joined("data"), contexts)


class ShardLoader:
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
        self._reader = BlockReader(index, plan.seed)
        self._lanes = plan.lanes_of_rank(rank, world_size)
        self._pool = ThreadPoolExecutor(read_threads, thread_name_prefix="shard-reader")
        self._blocks: dict[tuple[int, int, int], Future[_Block]] = {}

    def _request(self, epoch: int, lane: int, block: int) -> Future[_Block]:
        key = (epoch, lane, block)
        if key not in self._blocks:
            span = self.plan.block(epoch, lane, block)
            self._blocks[key] = self._pool.submit(self._reader.read, span.pieces, span.order, epoch)
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

    def __iter__(self) -> ShardLoader:
        return self

    def __next__(self) -> Batch:
        epoch, in_epoch = self.plan.position(self.step)
        place = in_epoch * self.plan.per_lane
        self._read_ahead(epoch, place // self.plan.block_size)
        parts = [part for lane in self._lanes for part in self._take(epoch, lane, place)]
        batch = _batch(self.step, epoch, parts)
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop reading; what is under way is abandoned."""
        self._pool.shutdown(wait=False, cancel_futures=True)
