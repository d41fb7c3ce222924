"""Images to shards: decoding processes, an encoder and writing threads at work side by side, unit after unit."""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.decoding import CHUNK, Chunk, Request, decoded, processes_for
from data_tools.images import ImageSource
from data_tools.units import POLL_S, Shard, ShardJob, Unit
from uvit_dist import stopping
from uvit_dist.config import Config
from uvit_dist.data.latents import Sample
from uvit_dist.data.shards import ShardIndex, ShardRecord, write_shard

QUEUED = 4
"""Batches of samples that wait for a writing thread before the encoder does."""
UNFINISHED = 2
"""Units whose last samples may still be on their way to the output."""
Finish = Callable[[], list[list[Sample]]]
"""Waits for what was begun: for each shard of a unit, the sample of each place."""


class Maker(Protocol):
    """Makes samples of images. batch_size: images in one call, the last of a unit may have fewer."""

    batch_size: int

    def start(self, unit: Unit, places: range, pixels: Tensor) -> Finish:
        """Begin with some images of a unit. places: in the unit; pixels: (n, H, W, 3) uint8, grey where one is bad."""
        ...


@dataclass
class Times:
    """Where the seconds of a worker went. waited: for images, the encoder, the output; worked: of its processes."""

    images: int = 0
    began: float = field(default_factory=time.monotonic)
    waited_images: float = 0.0
    waited_encoder: float = 0.0
    waited_output: float = 0.0
    reading: float = 0.0
    decoding: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Figures for the status and the log."""
        took = time.monotonic() - self.began
        reading = self.reading / max(1e-9, self.reading + self.decoding)
        shares = {
            "reading input": self.waited_images * reading,
            "decoding": self.waited_images * (1 - reading),
            "encoder": self.waited_encoder,
            "writing output": self.waited_output,
        }
        names = {"reading input": "the input's disk or network", "decoding": "the host's processors",
                 "encoder": "the encoder's device", "writing output": "the output's disk or network"}  # fmt: skip
        return {
            "images": self.images,
            "seconds": round(took, 2),
            "images_per_s": round(self.images / max(1e-9, took), 2),
            "waiting": {name: round(seconds / max(1e-9, took), 3) for name, seconds in shares.items()},
            "bottleneck": names[max(shares, key=lambda name: shares[name])],
        }


class _Abandoned(Exception):
    """The unit is not to be finished."""


class _Writer:
    """A shard being written by a thread."""

    def __init__(self, pool: ThreadPoolExecutor, job: ShardJob, shard: Shard, bad: dict[str, str]) -> None:
        self._queue: queue.Queue[list[Sample] | _Abandoned | None] = queue.Queue(QUEUED)
        self.written: Future[ShardRecord] = pool.submit(
            write_shard, job.directory, shard.name, self._samples(), job.provenance, lambda: job.sidecar(shard, bad)
        )

    def _samples(self) -> Iterator[Sample]:
        while (batch := self._queue.get()) is not None:
            if isinstance(batch, _Abandoned):
                raise batch
            yield from batch

    def abandon(self) -> None:
        """Have nothing come of it."""
        if self.written.cancel():
            return
        while not self.written.done():
            with contextlib.suppress(queue.Full):
                return self._queue.put_nowait(_Abandoned())
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()

    def put(self, batch: list[Sample] | None) -> None:
        """Hand on samples, or none at the end. Raises what writing raised."""
        while True:
            if self.written.done():
                self.written.result()
            try:
                return self._queue.put(batch, timeout=1.0)
            except queue.Full:
                continue


class _Work:
    """A unit under way."""

    def __init__(self, unit: Unit, job: ShardJob, pool: ThreadPoolExecutor) -> None:
        self.unit, self.began = unit, time.monotonic()
        self.bad: dict[str, str] = {}
        self.chunks: list[Chunk] = []
        self.kept: dict[str, dict[int, Sample]] = {}  # samples of shards that have another order than the unit
        self.writers = [_Writer(pool, job, shard, self.bad) for shard in unit.shards]

    def is_written(self) -> bool:
        return all(writer.written.done() for writer in self.writers)


class Pipeline:
    """One worker's units, from claim to mark."""

    def __init__(self, job: ShardJob, source: ImageSource, maker: Maker, config: Config, cheap: bool = False) -> None:
        self.job, self._source, self._maker, self._config = job, source, maker, config
        self._processes = processes_for(config.precompute.decode_processes, cheap)
        self.times = Times()
        self._open: dict[int, _Work] = {}
        self._closing: deque[_Work] = deque()
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._bar = tqdm(total=len(job.keys), unit="image", disable=None if first else True)

    def run(self) -> ShardIndex:
        """Work until all units are done, by whomever, and merged. Raises what a part of it raises.

        Raises ``DataError`` where more images are bad than the configuration allows.
        """
        try:
            index = self.job.complete()
            while index is None:
                stopping.check()
                self._pass()
                index = self.job.merge() or self.job.complete()
                if index is None:
                    self._show()
                    stopping.check()
                    time.sleep(min(POLL_S, self._config.precompute.lease_s / 4))
            return index
        finally:
            self._bar.close()

    def _pass(self) -> None:
        """Do all units that can be claimed now."""
        first = self.job.claim()
        if first is None:
            return
        with ThreadPoolExecutor(2 * (UNFINISHED + 2), thread_name_prefix="writer") as self._pool:
            size, settings = self._config.data.image_size, self._config.storage
            chunks = decoded(self._requests(first), self._source.reader, size, self._processes, settings)
            try:
                self._encode(chunks)
                while self._closing:
                    self._timed("waited_output", self._finish)
            finally:  # nothing is left but after an error
                chunks.close()
                for work in [*self._open.values(), *self._closing]:
                    for writer in work.writers:
                        writer.abandon()
                self._open.clear()
                self._closing.clear()

    def _encode(self, chunks: Iterator[Chunk]) -> None:
        """Gather batches, begin with each before the one before it is waited for, and hand on what comes."""
        pending = deque[tuple[_Work, range, Finish]]()
        while (chunk := self._timed("waited_images", lambda: next(chunks, None))) is not None:
            stopping.check()
            work = self._open[chunk.unit]
            work.chunks.append(chunk)
            self._note(work, chunk)
            end = chunk.first + len(chunk.pixels)
            if end % self._maker.batch_size and end < len(work.unit.images):
                continue
            places = range(work.chunks[0].first, end)
            parts, work.chunks = [part.pixels for part in work.chunks], []
            pixels = parts[0] if len(parts) == 1 else torch.from_numpy(np.concatenate([part.numpy() for part in parts]))
            finish = self._timed("waited_encoder", partial(self._maker.start, work.unit, places, pixels))
            pending.append((work, places, finish))
            if len(pending) > 1:
                self._deliver(*pending.popleft())
        while pending:
            self._deliver(*pending.popleft())

    def _timed(self, what: str, action: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return action()
        finally:
            setattr(self.times, what, getattr(self.times, what) + time.monotonic() - began)

    def _requests(self, first_unit: Unit) -> Iterator[Request]:
        """Requests for the images of one unit after the other, claimed as the decoding processes come to need them."""
        batch = self._maker.batch_size
        unit: Unit | None = first_unit
        while unit is not None:
            self._open[unit.number] = _Work(unit, self.job, self._pool)
            images, unusable = unit.images, self.job.unusable
            for begin in range(0, len(images), batch):
                stop = min(begin + batch, len(images))
                for first in range(begin, stop, CHUNK):
                    own = images[first : min(first + CHUNK, stop)]
                    yield Request(unit.number, first, [None if n in unusable else self._source.address(n) for n in own])
            unit = self.job.claim()

    def _note(self, work: _Work, chunk: Chunk) -> None:
        """Keep count, and note what is bad."""
        self.times.reading += chunk.read_s
        self.times.decoding += chunk.decode_s
        for place in range(chunk.first, chunk.first + len(chunk.pixels)):
            number = work.unit.images[place]
            why = self.job.unusable.get(number) or chunk.bad.get(place)
            if why is not None:
                work.bad[self.job.keys[number]] = why
        self.times.images += len(chunk.pixels)
        rate = self.times.images / max(1e-9, time.monotonic() - self.times.began)
        self.job.note(work.unit, chunk.first + len(chunk.pixels), work.bad, rate)
        self._bar.update(len(chunk.pixels))

    def _deliver(self, work: _Work, places: range, finish: Finish) -> None:
        """Wait for samples and hand them to the writing threads, but for those of bad images."""
        made = self._timed("waited_encoder", finish)
        numbers = [work.unit.images[place] for place in places]
        for writer, shard, samples in zip(work.writers, work.unit.shards, made, strict=True):
            pairs = [(n, s) for n, s in zip(numbers, samples, strict=True) if self.job.keys[n] not in work.bad]
            if shard.images is work.unit.images:
                self._timed("waited_output", partial(writer.put, [sample for _, sample in pairs]))
                continue
            work.kept.setdefault(shard.name, {}).update(pairs)
            if places.stop == len(work.unit.images):
                own = work.kept.pop(shard.name)
                self._timed("waited_output", partial(writer.put, [own[n] for n in shard.images if n in own]))
        if places.stop == len(work.unit.images):
            del self._open[work.unit.number]
            for writer in work.writers:
                writer.put(None)
            self._closing.append(work)
            while len(self._closing) > UNFINISHED or (self._closing and self._closing[0].is_written()):
                self._timed("waited_output", self._finish)

    def _finish(self) -> None:
        """Wait for the oldest unit's shards, and mark it as done."""
        work = self._closing[0]
        for writer in work.writers:
            writer.written.result()
        self._closing.popleft()
        self.job.finish(work.unit, work.bad, {"seconds": round(time.monotonic() - work.began, 3)})
        self._show()

    def _show(self) -> None:
        """Bring the bar to what all workers have done."""
        state = self.job.state()
        done = sum(len(unit.images) for unit in self.job.units if unit.name in state.done)
        self._bar.n = min(len(self.job.keys), done + sum(self._begun(work) for work in self._open.values()))
        self._bar.set_postfix({"bad": state.bad}, refresh=True)

    def _begun(self, work: _Work) -> int:
        return work.chunks[-1].first if work.chunks else 0
