"""Reading, decoding and cropping images in processes of their own, ahead of whatever uses them."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_tools import resample
from data_tools.crops import Pixels
from data_tools.images import Address, BadImageError, Reader
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig
from uvit_dist.errors import OutputError, UserError
from uvit_dist.host_memory import keep_memory

CHUNK = 16
"""Images that go to a process together."""
PRELOADED = ["data_tools.decoding", "data_tools.decode"]
"""Imported once, by the server that decoding processes are forked from."""
GREY = 128
"""Each byte of an image that is bad."""
READINGS = 4
"""Of an image on a server that is bad, until two agree that it is."""
GIVEN_BACK_FROM = 2**23
"""Bytes from which on memory is not kept for the next image: an ImageNet image has less, others can have 700 MB."""
READ_AT_ONCE = 16
"""Images that a process requests from a server at once."""


@dataclass(frozen=True)
class Request:
    """Images to decode together. unit, first: whose, and the place of the first in it; none: known to be unusable."""

    unit: int
    first: int
    addresses: Sequence[Address | None]


@dataclass
class Chunk:
    """Decoded images. pixels: (n, size, size, 3) uint8, grey where an image is bad; bad: place in the unit → why.

    read_s, decode_s: seconds spent on each. error: a mistake of the user that ended it.
    """

    unit: int
    first: int
    pixels: Tensor
    bad: dict[int, str] = field(default_factory=dict)
    read_s: float = 0.0
    decode_s: float = 0.0
    error: UserError | None = None


class Decoder(Dataset[Chunk]):
    """Turns requests into chunks, in whatever process. size: pixels of a side."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader, self._size = reader, size

    def __getitems__(self, requests: Sequence[Request]) -> list[Chunk]:
        """The chunk of each request, (n, size, size, 3) uint8 each."""
        return [self._chunk(request) for request in requests]

    def _chunk(self, request: Request) -> Chunk:
        chunk = Chunk(request.unit, request.first, _room(len(request.addresses), self._size))
        pixels = chunk.pixels.numpy()
        began = time.perf_counter()
        try:
            for place, content in enumerate(self._contents(request.addresses)):
                if content is None:
                    pixels[place] = GREY
                    continue
                before = time.perf_counter()
                try:
                    pixels[place] = self._pixels(content)
                except BadImageError as error:
                    pixels[place] = GREY
                    chunk.bad[request.first + place] = str(error)
                chunk.decode_s += time.perf_counter() - before
        except UserError as error:
            chunk.error = error
        chunk.read_s = time.perf_counter() - began - chunk.decode_s
        return chunk

    def _pixels(self, content: _Content) -> Pixels:
        """Decode an image. Raises ``BadImageError``, for one on a server where two readings of it agree."""
        try:
            return self._reader.decode(content.get())
        except BadImageError as error:
            if not content.is_remote:
                raise
            for _ in range(READINGS):
                again = _Content(self._reader, content.address)
                if again == content:
                    raise error from None
                content = again
                with contextlib.suppress(BadImageError):
                    return self._reader.decode(content.get())
            raise

    def _contents(self, addresses: Sequence[Address | None]) -> Iterator[_Content | None]:
        if not any(address is not None and storage.is_remote(address.path) for address in addresses):
            yield from (None if a is None else _Content(self._reader, a) for a in addresses)
            return
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            waiting = [None if a is None else pool.submit(_Content, self._reader, a) for a in addresses]
            yield from (None if content is None else content.result() for content in waiting)


def _room(count: int, size: int) -> Tensor:
    """Memory for images, (count, size, size, 3) uint8, not set; in a decoding process such as others can be handed.

    As PyTorch's own collation has it: other memory is copied to such when a chunk is sent.
    """
    shape = (count, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class _Content:
    """An image's bytes, read now; why they could not be is told when they are asked for."""

    def __init__(self, reader: Reader, address: Address) -> None:
        self.address, self.is_remote = address, storage.is_remote(address.path)
        self._bytes, self._error = b"", ""
        try:
            self._bytes = reader.read(address)
        except BadImageError as error:
            self._error = str(error)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and (self._bytes, self._error) == (other._bytes, other._error)

    __hash__ = None  # type: ignore[assignment]

    def get(self) -> bytes:
        """Raises ``BadImageError`` where there are none."""
        if self._error:
            raise BadImageError(self._error)
        return self._bytes


def processes_for(asked: int | None, cheap: bool) -> int:
    """Decoding processes of this worker. asked: precompute.decode_processes; cheap: images that need no decoding."""
    if asked is not None:
        return asked
    if cheap:
        return 0
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def decoded(
    requests: Iterable[Request], reader: Reader, size: int, processes: int, settings: StorageConfig
) -> Generator[Chunk]:
    """The chunks of requests, (n, size, size, 3) uint8 each, in their order, read ahead by so many processes.

    Raises what ``Reader.read`` raises but for bad images, ``UnavailableError``, ``MissingInputError``; ``OutputError``
    where a process has ended.
    """
    if processes:
        multiprocessing.set_forkserver_preload(PRELOADED)
        resample.kernel()  # compiled once, before each of them would
    loader = DataLoader(
        Decoder(reader, size),
        batch_sampler=_Each(requests),
        collate_fn=_only,
        num_workers=processes,
        multiprocessing_context="forkserver" if processes else None,
        prefetch_factor=2 if processes else None,
        worker_init_fn=_Setup(settings),
    )
    chunks = iter(loader)
    while (chunk := _next(chunks)) is not None:
        if chunk.error is not None:
            raise chunk.error
        yield chunk


def _next(chunks: Iterator[Chunk]) -> Chunk | None:
    """Raises ``OutputError`` where a decoding process has ended: it was killed, or had no memory."""
    try:
        return next(chunks, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        told = str(error).splitlines()[0]
        raise OutputError(
            f"a decoding process ended ({told}); give the job more memory (or /dev/shm), or set "
            "precompute.decode_processes to fewer, and start again: what is finished is kept"
        ) from None


class _Each:
    """Each request as a batch of its own."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[list[Request]]:
        return ([request] for request in self._requests)


def _only(chunks: list[Chunk]) -> Chunk:
    (chunk,) = chunks
    return chunk


class _Setup:
    """What a decoding process does first."""

    def __init__(self, settings: StorageConfig) -> None:
        self._settings = settings

    def __call__(self, worker: int) -> None:
        sys.excepthook = _told_if_ours
        torch.set_num_threads(1)
        keep_memory(GIVEN_BACK_FROM)
        storage.configure(self._settings)


def _told_if_ours(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """multiprocessing's thread that hands memory on tells of each reader that is gone: when a job stops, all are."""
    frames = traceback.extract_tb(trace)
    if not any(frame.filename.endswith("resource_sharer.py") for frame in frames):
        sys.__excepthook__(kind, error, trace)
