"""The plan turned into batches: parts of shards read ahead by threads, straight to the samples' places in batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from uvit_dist.data.batch import Addresses, Batch, Rows, RowsPool, addresses
from uvit_dist.data.journal import Damage, Journal, Substitute, stand_ins
from uvit_dist.data.plan import Ids, Plan
from uvit_dist.data.reader import Outcome, Part, SampleReader
from uvit_dist.data.shards import ShardIndex
from uvit_dist.errors import DataError

STAND_INS_TRIED = 16
"""Samples in a row that may prove damaged before a loader gives up: the data are not there any more."""


@dataclass
class _Block:
    """A block on its way, in the order it is served. planned, ids, labels, steps: (n,) int64.

    ids: planned, with substitutes in place; steps: of each sample; failed: place → why the sample could not be read.
    """

    planned: Ids
    ids: Ids
    labels: Ids
    steps: Ids
    failed: dict[int, str] = field(default_factory=dict)
    parts: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Raises what a part raised."""
        for part in self.parts:
            part.result()
        self.parts.clear()


class ShardLoader:
    """Iterates over a rank's batches from an update on, for ever. Its whole state is that number and the journal.

    read_threads (parts of shards read at once; 0: in the calling thread) and prefetch_blocks (blocks ahead, in each
    lane) change how fast, never what. A batch's tensors are valid for as long as they are held. pinned: their memory
    is; a copy from it that is under way must be over before they are let go.
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
        journal: Journal | None = None,
        pinned: bool = False,
    ) -> None:
        self.plan, self.step, self.journal = plan, start_step, journal or Journal()
        self._index, self._names = index, [record.name for record in index.shards]
        self._reader = SampleReader(index, plan.seed)
        self._lanes = plan.lanes_of_rank(rank, world_size)
        self._threads = ThreadPoolExecutor(read_threads, thread_name_prefix="shard-reader") if read_threads else None
        self._ahead = prefetch_blocks if read_threads else 0
        self._blocks: dict[tuple[int, int, int], _Block] = {}
        self._sizes = np.array(index.provenance.sizes, dtype=np.uint64)
        self._memory, self._rows = RowsPool(index.provenance, pinned), dict[int, Rows]()
        self._unread: list[Callable[[], None]] = []
        self._next_in_plan = 0

    def adopt(self, journal: Journal, step: int | None = None) -> None:
        """Go on by a journal that all ranks have agreed on. What is read already is replaced where need be.

        step: the update to serve next, where it is not the one after the last. In the plan there is no way back: the
        journal must leave out what has been served.
        """
        self.journal = journal
        if step is not None:
            assert journal.plan_step(step) >= self._next_in_plan, "the plan is served forwards alone"
            self.step = step

    def __iter__(self) -> ShardLoader:
        return self

    def __next__(self) -> Batch:
        step = self.journal.plan_step(self.step)
        epoch, in_epoch = self.plan.position(step)
        place = in_epoch * self.plan.per_lane
        self._forget_before(epoch, place // self.plan.block_size, step)
        self._read_ahead(epoch, place, step)
        batch = self._assemble(step, epoch, place)
        self.step, self._next_in_plan = self.step + 1, step + 1
        return batch

    def close(self) -> None:
        """Stop reading; what is under way is abandoned."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    # -- reading ahead ---------------------------------------------------------------------------------------------

    def _forget_before(self, epoch: int, block: int, step: int) -> None:
        for key in [key for key in self._blocks if (key[0], key[2]) < (epoch, block)]:
            for part in self._blocks.pop(key).parts:
                part.cancel()
        for passed in [other for other in self._rows if other < step]:
            del self._rows[passed]  # not to be used again: a part may still be on its way there

    def _read_ahead(self, epoch: int, place: int, step: int) -> None:
        blocks_in_lane = -(-self.plan.lane_length // self.plan.block_size)
        first, last = place // self.plan.block_size, (place + self.plan.per_lane - 1) // self.plan.block_size
        for number in range(first, last + self._ahead + 1):
            later, block = divmod(number, blocks_in_lane)
            for lane in self._lanes:
                if (epoch + later, lane, block) not in self._blocks:
                    self._blocks[epoch + later, lane, block] = self._request(epoch + later, lane, block, step)
        for read in self._unread:
            read()
        self._unread.clear()

    def _rows_of(self, step: int) -> Rows:
        if step not in self._rows:
            self._rows[step] = self._memory.take(len(self._lanes) * self.plan.per_lane)
        return self._rows[step]

    def _request(self, epoch: int, lane: int, number: int, now: int) -> _Block:
        """Have a block read: each sample to its place in the batch of its step, if that step is still to come."""
        plan, span = self.plan, self.plan.block(epoch, lane, number)
        runs = [self._index.starts[shard] + np.arange(first, first + n) for shard, first, n in span.pieces]
        planned = np.concatenate(runs)[span.order]
        places = number * plan.block_size + np.arange(len(planned))
        steps = epoch * plan.steps_per_epoch + places // plan.per_lane
        slots = (lane - self._lanes.start) * plan.per_lane + places % plan.per_lane
        block = _Block(planned, planned.copy(), np.full(len(planned), -1, dtype=np.int64), steps)
        wanted = steps >= now
        for first, last in self.journal.skipped_steps:
            wanted &= (steps < first) | (steps > last)
        self._divert(block, epoch, wanted)
        memory = {step: self._rows_of(step) for step in np.unique(steps[wanted]).tolist()}
        bases = np.zeros((int(steps[-1] - steps[0]) + 1, len(self._sizes)), dtype=np.uint64)
        for step, rows in memory.items():
            bases[step - int(steps[0])] = rows.bases
        to = addresses(bases[steps - steps[0]], self._sizes, slots)
        for group in self._reader.together(block.ids, np.flatnonzero(wanted)):
            self._submit(block, group, epoch, self._part_of(block.ids[group], to[:, group], list(memory.values())))
        return block

    def _divert(self, block: _Block, epoch: int, wanted: NDArray[np.bool_]) -> None:
        """Have substitutes read for samples of shards in quarantine, and not these. wanted: (n,)."""
        shards = self._index.shard_of(block.planned)
        if not self.journal.out_of_use(self._names, int(block.steps.max())) & set(shards.tolist()):
            return
        out_at = {step: self.journal.out_of_use(self._names, step) for step in set(block.steps.tolist())}
        for place in np.flatnonzero(wanted).tolist():
            out = out_at[int(block.steps[place])]
            if int(shards[place]) in out:
                block.ids[place] = next(self._stand_ins(epoch, int(block.planned[place]), out))

    def _submit(self, block: _Block, group: Ids, epoch: int, part: Part) -> None:
        """Have samples of one shard read, each to its place in its batch. group: places in the block.

        By a thread, or by this one after all blocks are requested: reading takes a processor's caches from Python.
        """

        def read() -> None:
            outcome = self._reader.read(part, epoch)
            block.labels[group] = np.where(outcome.labels >= 0, outcome.labels, block.labels[group])
            block.failed.update({int(group[number]): reason for number, reason in outcome.failed.items()})

        if self._threads is None:
            self._unread.append(read)
        else:
            block.parts.append(self._threads.submit(read))

    # -- a batch ---------------------------------------------------------------------------------------------------

    def _assemble(self, step: int, epoch: int, place: int) -> Batch:
        cuts = [cut for lane in self._lanes for cut in self._take(epoch, lane, place)]
        planned, ids, labels = (
            np.concatenate([getattr(block, name)[cut] for block, cut in cuts]) for name in ("planned", "ids", "labels")
        )
        failed, begin = dict[int, str](), 0
        for block, cut in cuts:
            if block.failed:
                found = ((place - cut.start + begin, why) for place, why in block.failed.items())
                failed |= {slot: why for slot, why in found if begin <= slot < begin + cut.stop - cut.start}
            begin += cut.stop - cut.start
        rows = self._rows.pop(step)
        damage, used = self._replace(step, epoch, failed, planned, ids, labels, rows)
        tensors = rows.tensors(self._memory)
        return Batch(step, epoch, torch.from_numpy(ids), torch.from_numpy(labels), *tensors, damage, used)

    def _take(self, epoch: int, lane: int, place: int) -> Iterator[tuple[_Block, slice]]:
        end = place + self.plan.per_lane
        while place < end:
            number, offset = divmod(place, self.plan.block_size)
            block = self._blocks[epoch, lane, number]
            block.wait()
            taken = min(end - place, len(block.ids) - offset)
            yield block, slice(offset, offset + taken)
            place += taken

    def _replace(
        self, step: int, epoch: int, failed: dict[int, str], planned: Ids, ids: Ids, labels: Ids, rows: Rows
    ) -> tuple[tuple[Damage, ...], tuple[Substitute, ...]]:
        """Put substitutes, in place, where samples could not be read or are of shards now in quarantine."""
        out = self.journal.out_of_use(self._names, step)
        wrong = set(failed)
        if out:
            wrong |= set(np.flatnonzero(np.isin(self._index.shard_of(ids), list(out))).tolist())
        damage: dict[Damage, None] = {}
        used = []
        for slot in sorted(wrong):
            shard = int(self._index.shard_of(ids[slot : slot + 1])[0])
            if slot in failed and shard not in out:
                damage[Damage(self._names[shard], failed[slot])] = None
            for sample in itertools.islice(self._stand_ins(epoch, int(planned[slot]), out), STAND_INS_TRIED):
                part = self._part_of(np.array([sample]), rows.addresses(np.array([slot])), [rows])
                outcome: Outcome = self._reader.read(part, epoch)
                if not outcome.failed:
                    break
                damage[Damage(self._names[part.shard], outcome.failed[0])] = None
            else:
                names = sorted({found.name for found in damage})
                raise DataError(
                    f"{self._index.path}: neither a sample of {names[0]} nor {STAND_INS_TRIED} that may stand in for "
                    f"it can be read ({len(names)} damaged shards so far): see whether the shards are still there"
                )
            ids[slot], labels[slot] = sample, outcome.labels[0]
            if slot in failed and shard not in out:
                used.append(Substitute(step, int(planned[slot]), sample))
        return tuple(damage), tuple(used)

    def _stand_ins(self, epoch: int, planned: int, out: frozenset[int]) -> Iterator[int]:
        def allowed(sample: int) -> bool:
            return int(self._index.shard_of(np.array([sample]))[0]) not in out

        return stand_ins(self.plan.seed, epoch, planned, self._index.provenance.samples, allowed)

    def _part_of(self, ids: Ids, to: Addresses, memory: list[Rows]) -> Part:
        shard = int(self._index.shard_of(ids[:1])[0])
        return Part(shard, ids - self._index.starts[shard], to, memory)
