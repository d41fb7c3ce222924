"""Reading samples of an index into given memory, each checked against its hash; what is wrong is named, never used."""

from __future__ import annotations

import io
import itertools
import json
import os
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
import xxhash
from numpy.typing import NDArray

from uvit_dist import storage
from uvit_dist.data.batch import Batch, Rows
from uvit_dist.data.plan import Ids
from uvit_dist.data.shards import ShardIndex
from uvit_dist.diffusion.keyed_random import keyed_bits
from uvit_dist.errors import DataError, MissingInputError, NoSuchFileError

PART_BYTES = 8 << 20
"""Bytes of a shard that are read, cached and retried together."""
MERGED_GAP = {False: 1 << 15, True: 4 << 20}
"""Bytes between two items that are rather read too than left out by a request of their own, of (local, remote) files:
4 MB pass while a new request waits for its first byte."""
TOGETHER_BYTES, MOST_TOGETHER = 1 << 18, 256
"""Bytes, and samples at most, read by one call and hashed while they are in the processor's cache."""
WORTH_CACHING = 16
"""A part of which less than a sixteenth is wanted is not fetched whole for the cache's sake."""
TRIES = 4
"""Readings of what does not agree with its hash, or is not there, before it is called damaged."""
PAUSE_S = {False: 0.002, True: 0.1}
"""Longest first pause between them, for (local, remote) files."""


@dataclass(frozen=True)
class Part:
    """A run of samples of one shard that is read at once, and where each goes.

    rows: memory of a batch and place in it, for each sample; none: not wanted.
    """

    shard: int
    first: int
    rows: Sequence[tuple[Rows, int] | None]


@dataclass
class Outcome:
    """labels: (count,) int64 of a part's samples; failed: place in the part → why it could not be read."""

    labels: Ids
    failed: dict[int, str] = field(default_factory=dict)


_Item = tuple[int, int, memoryview, int]
"""Offset in the file, expected xxh3, where it goes, the sample's place in its part."""


def _check(items: Sequence[_Item], got: int, failed: dict[int, str]) -> None:
    """Note each item that is not whole. got: where what was read ends, in bytes of the file."""
    digest = xxhash.xxh3_64_intdigest
    for start, expected, view, place in items:
        if start + len(view) > got:
            failed[place] = f"ends before byte {start + len(view)}, where the index has a sample: truncated"
        elif digest(view) != expected:
            failed[place] = f"the sample at byte {start} differs from its hash in the index"


def _runs(items: list[_Item]) -> list[tuple[int, int, list[_Item]]]:
    """Items cut into runs to be read together: (begin, end, items)."""
    runs: list[tuple[int, int, list[_Item]]] = []
    for item in items:
        begin, end = item[0], item[0] + len(item[2])
        if runs and begin - runs[-1][1] <= MERGED_GAP[True]:
            runs[-1] = (runs[-1][0], end, [*runs[-1][2], item])
        else:
            runs.append((begin, end, [item]))
    return runs


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
        self._together = min(MOST_TOGETHER, max(1, int(TOGETHER_BYTES / max(1.0, bytes_each))))

    def cut(self, shard: int, first: int, count: int) -> list[tuple[int, int, int]]:
        """A run of samples as (shard, first, count) of parts, which begin at the same places however the run lies.

        Of local files a run is one part: nothing is cached or retried there that a smaller one would spare.
        """
        if not storage.is_remote(self.index.path):
            return [(shard, first, count)]
        edges = range((first // self.part_samples + 1) * self.part_samples, first + count, self.part_samples)
        bounds = [first, *edges, first + count]
        return [(shard, a, b - a) for a, b in itertools.pairwise(bounds)]

    def read_ids(self, ids: Ids, epoch: int = 0) -> Batch:
        """The samples of the given ids, (b,), in this order. Raises ``DataError`` on any damage."""
        rows, labels = Rows(self.index.provenance, len(ids)), np.empty(len(ids), dtype=np.int64)

        def read(place: int) -> None:
            shard = int(shards[place])
            outcome = self.read(Part(shard, int(ids[place] - self.index.starts[shard]), [(rows, place)]), epoch)
            for reason in outcome.failed.values():
                raise DataError(f"{self.index.shard_path(shard)}: {reason}. Make or copy this shard again.")
            labels[place] = outcome.labels[0]

        shards = self.index.shard_of(ids)
        with ThreadPoolExecutor(8 if storage.is_remote(self.index.path) else 1) as pool:
            list(pool.map(read, range(len(ids))))
        known = torch.from_numpy(np.array(ids, dtype=np.int64)), torch.from_numpy(labels)
        return Batch(0, epoch, *known, *rows.tensors())

    def read(self, part: Part, epoch: int) -> Outcome:
        """Read a part's wanted samples to their places. What is not as the index says is read again, and then failed.

        Raises ``UnavailableError`` where a server does not answer.
        """
        outcome = Outcome(np.full(len(part.rows), -1, dtype=np.int64))
        todo = [place for place, row in enumerate(part.rows) if row is not None]
        for attempt in range(TRIES):
            if attempt:
                remote = storage.is_remote(self.index.path)
                time.sleep(random.uniform(0, PAUSE_S[remote] * 2**attempt))
                storage.COUNTS.add(retries=1)
            outcome.failed = self._try(part, epoch, todo, outcome.labels, fresh=attempt > 0)
            if not outcome.failed:
                break
            todo = list(outcome.failed)
        return outcome

    def _try(self, part: Part, epoch: int, todo: list[int], labels: Ids, fresh: bool) -> dict[int, str]:
        count = len(part.rows)
        try:
            rows = self._rows(part.shard)[part.first : part.first + count]
            labels[:] = rows["label"]
            columns = [(rows["offset"].astype(np.int64), rows["xxh3"], "data")]
            if self.index.provenance.text is not None:
                drawn = self._draw_captions(part.shard, part.first, count, epoch)
                columns.append((drawn["offset"].astype(np.int64), drawn["xxh3"], "contexts"))
        except NoSuchFileError:
            return dict.fromkeys(todo, "its table of samples is missing")
        except DataError:
            return dict.fromkeys(todo, "its table of samples is damaged")
        items: list[_Item] = []
        for offsets, hashes, name in columns:
            starts, expected = offsets[todo].tolist(), hashes[todo].tolist()
            views = [getattr(rows_, name)[slot] for rows_, slot in (part.rows[place] for place in todo)]  # type: ignore[misc]
            items += list(zip(starts, expected, views, todo, strict=True))
        if len(columns) > 1:
            items.sort(key=lambda item: item[0])
        try:
            path = self.index.shard_path(part.shard)
            if not storage.is_remote(path):
                return self._read_local(path, items)
            return self._fetch(path, part, items, fresh)
        except NoSuchFileError:
            return dict.fromkeys(todo, "missing")

    def _read_local(self, path: str, items: list[_Item]) -> dict[int, str]:
        """As ``_scatter``, again after errors of the file system that pass. They are no damage."""
        try:
            return self._scatter(path, items)
        except PermissionError:
            raise MissingInputError(f"{path}: cannot be read (Permission denied); mend its permissions") from None
        except OSError:
            return storage.persistently(path, lambda progress: self._scatter(path, items))

    def _scatter(self, path: str, items: list[_Item]) -> dict[int, str]:
        """Read items of a local file straight to their places, a few with one call, and check them."""
        failed: dict[int, str] = {}
        gap_bytes = self._scratch(MERGED_GAP[False])
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise NoSuchFileError(path) from None
        try:
            number = 0
            while number < len(items):
                begin = end = items[number][0]
                vector: list[memoryview] = []
                first = number
                for start, _, view, _ in items[first : first + self._together]:
                    if start != end:
                        if not 0 < start - end <= MERGED_GAP[False]:
                            break
                        vector.append(gap_bytes[: start - end])
                    vector.append(view)
                    end = start + len(view)
                    number += 1
                got = begin + os.preadv(descriptor, vector, begin)
                _check(items[first:number], got, failed)
        finally:
            os.close(descriptor)
        return failed

    def _fetch(self, path: str, part: Part, items: list[_Item], fresh: bool) -> dict[int, str]:
        """Read items of a remote file by few ranged requests, or its whole part from the cache, and check them."""
        failed: dict[int, str] = {}
        runs, kept_as, kept = _runs(items), None, storage.cache()
        if kept is not None:
            whole, name = self._grid_part(part)
            if fresh:
                storage.forget(name)
            elif kept.has(name) or len(items) * WORTH_CACHING >= min(self.part_samples, self.index.counts[part.shard]):
                runs, kept_as = [(*whole, items)], name
        for begin, end, members in runs:
            content = self._scratch(end - begin)
            got = begin + storage.read_into(path, begin, content, cache_as=kept_as)
            for start, _, view, _ in members:
                if start + len(view) <= got:
                    view[:] = content[start - begin : start - begin + len(view)]
            _check(members, got, failed)
        return failed

    def _grid_part(self, part: Part) -> tuple[tuple[int, int], str]:
        """Begin and end, in bytes, of the part of the shard that always is read together, and its name in the cache."""
        number = part.first // self.part_samples
        first, last = number * self.part_samples, (number + 1) * self.part_samples
        made, rows = self.index.provenance, self._rows(part.shard)[first:last]
        each = int(np.prod(made.shape)) * np.dtype(made.dtype).itemsize
        spans = [(rows["offset"], each)]
        if made.text is not None:
            counts = np.concatenate([[0], np.cumsum(self._rows(part.shard)["captions"].astype(np.int64))])
            contexts = self._context_rows(part.shard)[counts[first] : counts[min(last, len(counts) - 1)]]
            spans.append((contexts["offset"], int(np.prod(made.text.shape)) * np.dtype(made.text.dtype).itemsize))
        begin = min(int(offsets.min()) for offsets, _ in spans)
        end = max(int(offsets.max()) + size for offsets, size in spans)
        return (begin, end), f"{self.index.shards[part.shard].sha256[:40]}-{PART_BYTES >> 20}-{number}"

    def _scratch(self, size: int) -> memoryview:
        """This thread's memory for what is read between samples."""
        kept = getattr(self._local, "scratch", None)
        if kept is None or len(kept) < size:
            kept = self._local.scratch = memoryview(bytearray(size))
        return kept[:size]

    def _draw_captions(self, shard: int, first: int, count: int, epoch: int) -> NDArray[Any]:
        """CONTEXT_ROW of the caption drawn for each of a run of samples, (count,)."""
        starts, drawn = self._drawn(shard, first, count, epoch)
        return self._context_rows(shard)[starts + drawn]

    def _drawn(self, shard: int, first: int, count: int, epoch: int) -> tuple[Ids, Ids]:
        """For each of a run of samples, (count,): the number of its first caption in the shard, and which is drawn."""
        captions = self._rows(shard)["captions"].astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(captions)])[first : first + count]
        ids = torch.arange(count) + int(self.index.starts[shard]) + first
        words = keyed_bits(self._seed, self._purpose, epoch, ids, 1)[:, 0].numpy()
        return starts, (words * captions[first : first + count]) >> 32

    def texts(self, ids: Ids, epoch: int = 0) -> list[str]:
        """The captions whose contexts ``read_ids`` gives of samples. ids: (b,). Raises ``DataError`` on any damage."""
        shards = self.index.shard_of(ids)
        return [
            self._text(int(shard), int(number - self.index.starts[shard]), epoch)
            for shard, number in zip(shards, ids, strict=True)
        ]

    def _text(self, shard: int, place: int, epoch: int) -> str:
        rows, made, path = self._rows(shard), self.index.provenance, self.index.shard_path(shard)
        (first,), (drawn,) = self._drawn(shard, place, 1, epoch)
        begin = 0  # KEY.json lies between the sample before and the first context
        if place:
            size = int(np.prod(made.shape)) * np.dtype(made.dtype).itemsize
            begin = -(-(int(rows["offset"][place - 1]) + size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        content = storage.read_range(path, begin, int(self._context_rows(shard)["offset"][first]) - begin)
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                told = tar.extractfile(next(member for member in tar if member.name.endswith(".json")))
                return str(json.load(told)["captions"][drawn])  # type: ignore[arg-type]
        except (tarfile.TarError, StopIteration, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{path}: the captions at byte {begin} cannot be read ({error}). Make or copy this shard again."
            ) from None
