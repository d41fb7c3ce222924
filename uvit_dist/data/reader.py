"""Reading samples of an index into given memory, each checked against its hash; what is wrong is named, never used."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uvit_dist import storage
from uvit_dist.data.batch import Addresses, Batch, Rows
from uvit_dist.data.plan import Ids
from uvit_dist.data.ranges import SHORT, Ranges, State, read_ranges
from uvit_dist.data.shards import ShardIndex
from uvit_dist.diffusion.keyed_random import keyed_bits
from uvit_dist.errors import DataError, MissingInputError, NoSuchFileError

PART_BYTES = 8 << 20
"""Bytes of a shard that are read, cached and retried together."""
MERGED_GAP = 4 << 20
"""Bytes between two samples of a remote file that are rather read too than left out by a request of their own: they
pass while a new request waits for its first byte."""
WORTH_CACHING = 16
"""A part of which less than a sixteenth is wanted is not fetched whole for the cache's sake."""
TRIES = 4
"""Readings of what does not agree with its hash, or is not there, before it is called damaged."""
PAUSE_S = {False: 0.002, True: 0.1}
"""Longest first pause between them, for (local, remote) files."""


@dataclass(frozen=True)
class Part:
    """Samples of one shard that are read together, and where each goes.

    places: (count,) int64, ascending, of the samples in the shard; to: (columns, count) uint64, the addresses of the
    data of each, and of its context where there are any; memory: what these lie in, held until they are written.
    """

    shard: int
    places: Ids
    to: Addresses
    memory: Sequence[Rows]


@dataclass
class Outcome:
    """labels: (count,) int64 of a part's samples; failed: number in the part → why it could not be read."""

    labels: Ids
    failed: dict[int, str] = field(default_factory=dict)


def _runs(ranges: Ranges) -> list[Ranges]:
    """Ranges cut into runs to be read together."""
    far = ranges.starts[1:] - ranges.ends[:-1] > MERGED_GAP
    bounds = [0, *(np.flatnonzero(far) + 1).tolist(), len(ranges)]
    return [ranges[a:b] for a, b in itertools.pairwise(bounds)]


def _failures(ranges: Ranges, state: State) -> dict[int, str]:
    """Number of its sample → why, for each range that is not whole. state: (n,)."""
    failed = {}
    for number in np.flatnonzero(state).tolist():
        start, end = int(ranges.starts[number]), int(ranges.ends[number])
        reason = f"the sample at byte {start} differs from its hash in the index"
        if state[number] == SHORT:
            reason = f"ends before byte {end}, where the index has a sample: truncated"
        failed[int(ranges.numbers[number])] = reason
    return failed


class SampleReader:
    """Reads samples of an index, safe to call from several threads.

    The caption of a sample is a function of (seed, caption_purpose, epoch, id).
    """

    def __init__(self, index: ShardIndex, seed: int, caption_purpose: str = "caption") -> None:
        self.index, self._seed, self._purpose = index, seed, caption_purpose
        self._rows = lru_cache(maxsize=max(512, len(index.shards)))(index.rows)
        self._context_rows = lru_cache(maxsize=max(512, len(index.shards)))(index.context_rows)
        self._local = threading.local()
        bytes_each = index.shards[0].size / max(1, index.shards[0].samples) if index.shards else 1
        self.part_samples = max(1, int(PART_BYTES / max(1.0, bytes_each)))
        self._sizes = index.provenance.sizes

    def together(self, ids: Ids, places: Ids) -> list[Ids]:
        """``places`` (m,) of ``ids`` (n,), cut into samples of one shard that are read together, in its order.

        Of a remote shard, those of a part, and parts begin at the same places whatever is read of them; of a local
        one all: nothing is cached or retried there that a smaller part would spare.
        """
        if not len(places):
            return []
        wanted = ids[places]
        shards = self.index.shard_of(wanted)
        order, parts = np.argsort(wanted, kind="stable"), np.zeros_like(shards)
        if storage.is_remote(self.index.path):
            parts = (wanted - self.index.starts[shards]) // self.part_samples
        changes = (np.diff(shards[order]) != 0) | (np.diff(parts[order]) != 0)
        return np.split(places[order], np.flatnonzero(changes) + 1)

    def read_ids(self, ids: Ids, epoch: int = 0) -> Batch:
        """The samples of the given ids, (b,), in this order. Raises ``DataError`` on any damage."""
        rows, labels = Rows(self.index.provenance, len(ids)), np.empty(len(ids), dtype=np.int64)

        def read(place: int) -> None:
            shard, places = int(shards[place]), ids[place : place + 1] - self.index.starts[shards[place]]
            outcome = self.read(Part(shard, places, rows.addresses(np.array([place])), [rows]), epoch)
            for reason in outcome.failed.values():
                raise DataError(f"{self.index.shard_path(shard)}: {reason}. Make or copy this shard again.")
            labels[place] = outcome.labels[0]

        shards = self.index.shard_of(ids)
        with ThreadPoolExecutor(8 if storage.is_remote(self.index.path) else 1) as pool:
            list(pool.map(read, range(len(ids))))
        known = torch.from_numpy(np.array(ids, dtype=np.int64)), torch.from_numpy(labels)
        return Batch(0, epoch, *known, *rows.tensors())

    def read(self, part: Part, epoch: int) -> Outcome:
        """Read a part's samples to their places. What is not as the index says is read again, and then failed.

        Raises ``UnavailableError`` where a server does not answer.
        """
        outcome = Outcome(np.full(len(part.places), -1, dtype=np.int64))
        todo = np.arange(len(part.places))
        for attempt in range(TRIES):
            if attempt:
                remote = storage.is_remote(self.index.path)
                time.sleep(random.uniform(0, PAUSE_S[remote] * 2**attempt))
                storage.COUNTS.add(retries=1)
            outcome.failed = self._try(part, epoch, todo, outcome.labels, fresh=attempt > 0)
            if not outcome.failed:
                break
            todo = np.array(list(outcome.failed))
        return outcome

    def _try(self, part: Part, epoch: int, todo: Ids, labels: Ids, fresh: bool) -> dict[int, str]:
        try:
            rows = self._rows(part.shard)[part.places]
            labels[:] = rows["label"]
            tables = [rows]
            if self.index.provenance.text is not None:
                tables.append(self._draw_captions(part.shard, part.places, epoch))
        except NoSuchFileError:
            return dict.fromkeys(todo.tolist(), "its table of samples is missing")
        except DataError:
            return dict.fromkeys(todo.tolist(), "its table of samples is damaged")
        ranges = self._ranges(part, tables, todo)
        try:
            path = self.index.shard_path(part.shard)
            if not storage.is_remote(path):
                return self._read_local(path, ranges)
            return self._fetch(path, part, ranges, fresh)
        except NoSuchFileError:
            return dict.fromkeys(todo.tolist(), "missing")

    def _ranges(self, part: Part, tables: Sequence[NDArray[Any]], todo: Ids) -> Ranges:
        """What is to be read of a part's file, in its order. tables: its rows of the index; todo: (n,) of it."""
        columns = []
        for table, to, size in zip(tables, part.to, self._sizes, strict=True):
            wanted = table[todo]
            sizes = np.full(len(todo), size, dtype=np.int64)
            columns.append((wanted["offset"].astype(np.int64), sizes, wanted["xxh3"].astype(np.uint64), to[todo], todo))
        if len(columns) == 1:
            return Ranges(*columns[0])
        ranges = Ranges(*map(np.concatenate, zip(*columns, strict=True)))
        return ranges[np.argsort(ranges.starts, kind="stable")]

    def _read_local(self, path: str, ranges: Ranges) -> dict[int, str]:
        """Read ranges of a local file, again after errors of the file system that pass. They are no damage."""
        try:
            state = read_ranges(path, ranges)
        except PermissionError:
            raise MissingInputError(f"{path}: cannot be read (Permission denied); mend its permissions") from None
        except OSError:
            state = storage.persistently(path, lambda progress: read_ranges(path, ranges))
        return _failures(ranges, state)

    def _fetch(self, path: str, part: Part, ranges: Ranges, fresh: bool) -> dict[int, str]:
        """Read ranges of a remote file by few requests, or its whole part from the cache, and check them."""
        failed: dict[int, str] = {}
        runs = [(int(run.starts[0]), int(run.ends[-1]), run) for run in _runs(ranges)]
        kept_as, kept = None, storage.cache()
        if kept is not None:
            whole, name = self._grid_part(part)
            if fresh:
                storage.forget(name)
            elif kept.has(name) or len(ranges) * WORTH_CACHING >= min(self.part_samples, self.index.counts[part.shard]):
                runs, kept_as = [(*whole, ranges)], name
        for begin, end, members in runs:
            content = self._scratch(end - begin)
            got = begin + storage.read_into(path, begin, content, cache_as=kept_as)
            for number, (first, last) in enumerate(zip(members.starts.tolist(), members.ends.tolist(), strict=True)):
                if last <= got:
                    members.view(number)[:] = content[first - begin : last - begin]
            failed |= _failures(members, members.check(got))
        return failed

    def _grid_part(self, part: Part) -> tuple[tuple[int, int], str]:
        """Begin and end, in bytes, of the part of the shard that always is read together, and its name in the cache."""
        number = int(part.places[0]) // self.part_samples
        first, last = number * self.part_samples, (number + 1) * self.part_samples
        rows = self._rows(part.shard)[first:last]
        spans = [(rows["offset"], self._sizes[0])]
        if self.index.provenance.text is not None:
            counts = np.concatenate([[0], np.cumsum(self._rows(part.shard)["captions"].astype(np.int64))])
            contexts = self._context_rows(part.shard)[counts[first] : counts[min(last, len(counts) - 1)]]
            spans.append((contexts["offset"], self._sizes[1]))
        begin = min(int(offsets.min()) for offsets, _ in spans)
        end = max(int(offsets.max()) + size for offsets, size in spans)
        return (begin, end), f"{self.index.shards[part.shard].sha256[:40]}-{PART_BYTES >> 20}-{number}"

    def _scratch(self, size: int) -> memoryview:
        """This thread's memory for what a request brings."""
        kept = getattr(self._local, "scratch", None)
        if kept is None or len(kept) < size:
            kept = self._local.scratch = memoryview(bytearray(size))
        return kept[:size]

    def _draw_captions(self, shard: int, places: Ids, epoch: int) -> NDArray[Any]:
        """CONTEXT_ROW of the caption drawn for each of the samples at ``places`` (count,) of a shard; (count,)."""
        starts, drawn = self._drawn(shard, places, epoch)
        return self._context_rows(shard)[starts + drawn]

    def _drawn(self, shard: int, places: Ids, epoch: int) -> tuple[Ids, Ids]:
        """For each of these samples, (count,): the number of its first caption in the shard, and which is drawn."""
        captions = self._rows(shard)["captions"].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(captions)])[places]
        ids = torch.from_numpy(places + int(self.index.starts[shard]))
        words = keyed_bits(self._seed, self._purpose, epoch, ids, 1)[:, 0].numpy()
        return starts, (words * captions[places]) >> 32

    def texts(self, ids: Ids, epoch: int = 0) -> list[str]:
        """The captions whose contexts ``read_ids`` gives of samples. ids: (b,). Raises ``DataError`` on any damage."""
        shards = self.index.shard_of(ids)
        return [
            self._text(int(shard), int(number - self.index.starts[shard]), epoch)
            for shard, number in zip(shards, ids, strict=True)
        ]

    def _text(self, shard: int, place: int, epoch: int) -> str:
        rows, path = self._rows(shard), self.index.shard_path(shard)
        (first,), (drawn,) = self._drawn(shard, np.array([place]), epoch)
        begin = 0  # KEY.json lies between the sample before and the first context
        if place:
            begin = -(-(int(rows["offset"][place - 1]) + self._sizes[0]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        content = storage.read_range(path, begin, int(self._context_rows(shard)["offset"][first]) - begin)
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                told = tar.extractfile(next(member for member in tar if member.name.endswith(".json")))
                return str(json.load(told)["captions"][drawn])  # type: ignore[arg-type]
        except (tarfile.TarError, StopIteration, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{path}: the captions at byte {begin} cannot be read ({error}). Make or copy this shard again."
            ) from None
