"""A cache of parts of remote files on a node's own disk: bounded, least recently used goes first, shared by processes.

A part is a file that appears whole. It is written, and counted in a ledger, under one lock, so that the ranks of a
node and of several runs, keep the limit together; a ledger that a killed process left wrong is corrected by the next
eviction. Its content is trusted no more than the network's: whoever reads checks hashes, and drops what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from uvit_dist.storage import remote

log = logging.getLogger(__name__)
_LEDGER = "ledger"
_ROOM = 0.9
"""Share of the limit that an eviction leaves in use."""


class PartCache:
    """Parts by name, below a directory, of at most ``limit`` bytes in all."""

    def __init__(self, directory: str, limit: int) -> None:
        self._root, self._limit, self._on = Path(directory, "parts"), limit, True

    def _path(self, name: str) -> Path:
        return self._root / name[:2] / name

    def read_into(self, name: str, view: memoryview) -> bool:
        """Fill ``view`` (flat bytes) with a part, if it is here in that size."""
        if not self._on:
            return False
        try:
            with open(self._path(name), "rb", buffering=0) as file:
                found = os.fstat(file.fileno()).st_size == len(view) and file.readinto(view) == len(view)
                if found:
                    os.utime(file.fileno())  # used now
                else:
                    self.drop(name)  # a node that crashed may leave less than was written
        except OSError:
            found = False
        remote.COUNTS.add(**{"cache_hits" if found else "cache_misses": 1})
        return found

    def write(self, name: str, data: memoryview) -> None:
        """Keep a part. A disk that refuses turns the cache off for this process, and is no error.

        Raises nothing.
        """
        if not self._on or len(data) > self._limit * _ROOM:
            return
        path = self._path(name)
        temporary = path.with_name(f"{name}.tmp-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._ledger() as ledger:  # until the part is there: the limit holds at every moment
                if path.exists():
                    return
                used = self._make_room(ledger, len(data))
                os.pwrite(ledger, b"%-32d" % (used + len(data)), 0)
                try:
                    with open(temporary, "wb", buffering=0) as file:
                        if file.write(data) != len(data):
                            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    temporary.rename(path)
                except OSError:
                    temporary.unlink(missing_ok=True)
                    os.pwrite(ledger, b"%-32d" % used, 0)
                    raise
        except OSError as error:
            self._on = False
            log.warning(
                "storage.cache_dir %s: cannot be written (%s); this process goes on without it",
                self._root.parent,
                error.strerror or error,
            )

    @property
    def on(self) -> bool:
        """Whether the disk has taken all so far."""
        return self._on

    def has(self, name: str) -> bool:
        """Whether a part is here."""
        return self._path(name).exists()

    def drop(self, name: str) -> None:
        """Delete a part that proved wrong."""
        with contextlib.suppress(OSError):
            size = self._path(name).stat().st_size
            self._path(name).unlink()
            self._release(size)

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[int]:
        self._root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._root / _LEDGER, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_room(self, ledger: int, size: int) -> int:
        """Evict until ``size`` more bytes fit. Returns the bytes in use. The ledger is locked."""
        text = os.pread(ledger, 32, 0).strip()
        used = int(text) if text.isdigit() else self._evict(size)
        return used if used + size <= self._limit else self._evict(size)

    def _release(self, size: int) -> None:
        """Count ``size`` bytes as used no more."""
        with self._ledger() as ledger:
            text = os.pread(ledger, 32, 0).strip()
            if text.isdigit():
                os.pwrite(ledger, b"%-32d" % max(0, int(text) - size), 0)

    def _evict(self, size: int) -> int:
        """Delete the least recently used parts until ``size`` more fit well. Returns the bytes in use."""
        found = []
        for folder in self._root.iterdir():
            if folder.is_dir():
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        facts, abandoned = entry.stat(), ".tmp-" in entry.name  # none is written while we hold the lock
                        found.append((0.0 if abandoned else facts.st_mtime, facts.st_size, entry.path))
        used = sum(length for _, length, _ in found)
        for _, length, path in sorted(found):
            if used + size <= self._limit * _ROOM:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= length
        return used


_made: dict[tuple[str, float], PartCache] = {}


def cache() -> PartCache | None:
    """The cache that the storage section asks for, or none; none, too, once its disk has refused."""
    section = remote.settings()
    if section.cache_dir is None or section.cache_gb is None:
        return None
    key = (section.cache_dir, section.cache_gb)
    if key not in _made:
        _made[key] = PartCache(section.cache_dir, int(section.cache_gb * 1e9))
    return _made[key] if _made[key].on else None


def forget(name: str) -> None:
    """Delete a part from the cache, if there is one: what it held was wrong."""
    kept = cache()
    if kept is not None:
        kept.drop(name)
