"""What the tools for whole sets of shards share: their options, threads, and the samples of a tar as it streams by."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from tqdm import tqdm

from data_tools.shard_job import positive
from uvit_dist import storage
from uvit_dist.config_data import StorageConfig
from uvit_dist.errors import ConfigError, DataError, OutputError

T = TypeVar("T")
R = TypeVar("R")
READ = 1 << 20
FOREIGN = "webdataset"
"""First word of the source of a set that was made elsewhere and indexed here."""


def tool_parser(tool: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of all tools for sets of shards. tool: the module's name in this package."""
    parser = argparse.ArgumentParser(
        prog=f"python -m data_tools.{tool}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    storage_options(parser)
    add_threads(parser)
    return parser


def storage_options(parser: argparse.ArgumentParser) -> None:
    """The options of how servers are reached."""
    parser.add_argument("--endpoint", help="URL of the S3 server (default: AWS_ENDPOINT_URL, or Amazon's)")
    parser.add_argument("--profile", help="profile of ~/.aws (default: AWS_PROFILE)")
    parser.add_argument("--anonymous", action="store_true", help="send no credentials: for public buckets")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option of tools that work on several shards at once."""
    parser.add_argument("--threads", type=positive, default=4, help="shards at once (default: 4)")


def use_storage(args: argparse.Namespace) -> None:
    """Reach servers as the options say. Raises ``ConfigError`` where they contradict each other."""
    try:
        storage.configure(StorageConfig(endpoint=args.endpoint, profile=args.profile, anonymous=args.anonymous))
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ConfigError(f"{reasons}; correct --endpoint, --profile or --anonymous") from None


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The results of work(item), in the order of the items. What is not begun when one fails is left."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def progress_of(total: int, what: str, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Show progress on a terminal. Yields the function that adds to it, safe from several threads."""
    lock = threading.Lock()
    with tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=None) as bar:

        def advance(amount: int) -> None:
            with lock:
                bar.update(amount)

        yield advance


def same_place(one: str, two: str) -> bool:
    """Whether two directories or URL prefixes are one."""
    if storage.is_remote(one) or storage.is_remote(two):
        return one.rstrip("/") == two.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(two)


def require_space(directory: str, size: int, option: str) -> None:
    """Raises ``OutputError`` where a local directory cannot be written or has no room for so many bytes."""
    if storage.is_remote(directory):
        return
    storage.make_directory(directory)
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OutputError(
            f"{option} {directory}: {size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; make room, or give "
            "another directory"
        )


@dataclass
class RawSample:
    """The members of a tar that share a key. key: of webdataset, the name up to the first dot of its last part.

    members: extension → (offset of its bytes in the tar, bytes), in order.
    """

    key: str
    members: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def at(self, offset: int, size: int) -> bytes | None:
        """``size`` bytes from ``offset`` of the tar, where one member holds them."""
        for begin, data in self.members.values():
            if begin <= offset and offset + size <= begin + len(data):
                return data[offset - begin : offset - begin + size]
        return None


class _Reading:
    """A stream of pieces as a file that is hashed while it is read; its last bytes are kept."""

    def __init__(self, pieces: Iterator[bytes], advance: Callable[[int], None]) -> None:
        self._pieces, self._advance, self._rest = pieces, advance, memoryview(b"")
        self._recent: deque[bytes] = deque(maxlen=3)
        self._position, self.sha256 = 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        while not len(self._rest):
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        data, self._rest = bytes(self._rest[:size]), self._rest[size:]
        self.sha256.update(data)
        self._recent.append(data)
        self._position += len(data)
        self._advance(len(data))
        return data

    def block(self, offset: int) -> bytes:
        """The block of a tar that was read last, at ``offset``."""
        data = b"".join(self._recent)
        begin = offset - (self._position - len(data))
        return data[begin : begin + tarfile.BLOCKSIZE]


class TarSamples:
    """The samples of one tar, in order, read once from a disk or a server. sha256: of the tar, after the last one."""

    def __init__(self, path: str, size: int, advance: Callable[[int], None]) -> None:
        self.path, self.size, self.sha256 = path, size, ""
        self._advance = advance

    def __iter__(self) -> Iterator[RawSample]:
        """Raises ``DataError`` where the tar is damaged, or a sample's member is there twice."""
        with contextlib.closing(storage.stream(self.path, self.size)) as pieces:  # type: ignore[type-var]
            reading = _Reading(pieces, self._advance)
            try:
                yield from self._samples(reading)
            except tarfile.TarError as error:
                raise DataError(f"{self.path}: not a whole tar file ({error}); copy or make it again") from None
            while reading.read(READ):
                pass
            self.sha256 = reading.sha256.hexdigest()

    def _samples(self, reading: Any) -> Iterator[RawSample]:
        current: RawSample | None = None
        with tarfile.open(fileobj=reading, mode="r|", bufsize=READ) as tar:
            for member in tar:
                directory, slash, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith(("__", "._")):
                    continue
                stem, _, extension = name.partition(".")
                key = f"{directory}{slash}{stem}".removeprefix("./")
                file = tar.extractfile(member)
                assert file is not None
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = RawSample(key)
                if extension in current.members:
                    raise DataError(
                        f"{self.path}: {member.name} is there twice; a key stands for one sample: make this tar again"
                    )
                current.members[extension] = (member.offset_data, file.read())
            end = reading.block(tar.offset)
            if len(end) < tarfile.BLOCKSIZE or any(end):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset}")
        if current is not None:
            yield current
