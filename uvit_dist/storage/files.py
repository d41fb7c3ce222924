"""One way to local paths and URLs: ranged reads, streams, sizes, listings, atomic writes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from uvit_dist.config_yaml import shipped
from uvit_dist.errors import DataError, MissingInputError, NoSuchFileError, OutputError
from uvit_dist.storage import remote
from uvit_dist.storage.part_cache import cache

PART = 8 << 20
"""Bytes of one ranged request of a stream."""
UPLOADED_AT_ONCE = 16 << 20
"""Bytes of a part of an upload to S3; four are in memory."""
ROOM = "make room, mend the permissions, or use another place"


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec serves."""
    return "://" in path


def join(directory: str, *names: str) -> str:
    """A path below a directory or URL."""
    return "/".join([directory.rstrip("/"), *names]) if is_remote(directory) else str(Path(directory, *names))


def parent(path: str) -> str:
    """The directory or URL prefix that holds a file."""
    return path.rsplit("/", 1)[0] if is_remote(path) else str(Path(path).parent)


def _ask(path: str, question: str, **options: Any) -> Any:
    """What a method of the URL's file system says, asked again after faults that pass."""

    def ask(progress: object) -> Any:
        filesystem, key = remote.filesystem(path)
        return getattr(filesystem, question)(key, **options)

    return remote.persistently(path, ask)


def exists(path: str) -> bool:
    """Whether a file or directory is there. Raises ``UnavailableError``."""
    return bool(_ask(path, "exists")) if is_remote(path) else os.path.exists(path)


def size(path: str) -> int:
    """Bytes in a file. Raises ``MissingInputError``, ``UnavailableError``."""
    with _explained(path):
        return int(_ask(path, "size")) if is_remote(path) else os.stat(path).st_size


def sizes_in(directory: str) -> dict[str, int]:
    """Name → bytes of the files right in a directory, by one listing. Empty where there is none."""
    if is_remote(directory):
        with contextlib.suppress(FileNotFoundError):
            entries = _ask(directory, "ls", detail=True)
            return {Path(e["name"]).name: int(e["size"]) for e in entries if e["type"] == "file"}
        return {}
    found = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # removed while the directory is read: the others are there
                if entry.is_file():
                    found[entry.name] = entry.stat().st_size
    return found


def names_in(directory: str) -> set[str]:
    """The names of the files right in a directory, by one listing that asks nothing of each. Empty where there is none.

    On a network's file system a question for each file is what makes a listing slow.
    """
    if is_remote(directory):
        return set(sizes_in(directory))
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        return {entry.name for entry in entries if entry.is_file()}
    return set()


def read_bytes(path: str, cache_as: str | None = None) -> bytes:
    """A whole file. cache_as: its name in the cache. Raises ``MissingInputError``, ``UnavailableError``."""
    if is_remote(path):
        return read_range(path, 0, size(path), cache_as)  # of known length: a short answer is noticed
    with _explained(path):
        return Path(path).read_bytes()


def read_into(path: str, offset: int, view: memoryview, cache_as: str | None = None) -> int:
    """Fill ``view`` (flat bytes) from ``offset`` of a file. Returns how much there was: less only at the file's end.

    cache_as: the name of this range in the cache. Raises ``MissingInputError``, ``UnavailableError``.
    """
    with _explained(path):
        if not is_remote(path):
            with open(path, "rb", buffering=0) as file:
                got = 0
                while got < len(view):
                    read = os.preadv(file.fileno(), [view[got:]], offset + got)
                    if read == 0:
                        break
                    got += read
            return got
        kept = cache() if cache_as is not None else None
        if kept is None or cache_as is None:
            return remote.read_into(path, offset, view)
        if kept.read_into(cache_as, view):
            return len(view)
        got = remote.read_into(path, offset, view)
        if got == len(view):
            kept.write(cache_as, view)
        return got


def read_range(path: str, offset: int, length: int, cache_as: str | None = None) -> bytes:
    """``length`` bytes from ``offset``. cache_as: the name of this range in the cache.

    Raises ``DataError`` where the file ends before, ``MissingInputError``, ``UnavailableError``.
    """
    data = bytearray(length)
    got = read_into(path, offset, memoryview(data), cache_as)
    if got != length:
        raise DataError(
            f"{path}: ends at byte {offset + got} where {offset + length} are expected: the file is truncated. "
            "Make or copy this shard again."
        )
    return bytes(data)


def stream(path: str, length: int, ahead: int = 4, first: int = 0) -> Iterator[bytes]:
    """A file of known length in order, in parts, so many of them requested ahead. first: the byte to begin at.

    Raises as ``read_range`` does.
    """
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(max(1, ahead), thread_name_prefix="stream") as pool:
        for offset in range(first, length, PART):
            waiting.append(pool.submit(read_range, path, offset, min(PART, length - offset)))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def tree(directory: str) -> dict[str, int]:
    """Path below a directory, with "/" → bytes, of its files at any depth, in order. Empty where there is none."""
    if is_remote(directory):
        _, top = remote.filesystem(directory)
        top = top.rstrip("/") + "/"
        with contextlib.suppress(FileNotFoundError):
            found = _ask(directory, "find", detail=True)
            return {k.removeprefix(top): int(found[k]["size"]) for k in sorted(found) if k.startswith(top)}
        return {}
    out = {}
    for folder, _, names in os.walk(directory, followlinks=True):
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):  # a link to nothing
                out[os.path.relpath(path, directory)] = os.stat(path).st_size
    return dict(sorted(out.items()))


def make_directory(directory: str) -> None:
    """Create a local directory and its parents. Raises ``OutputError`` where that cannot be. URLs need none."""
    if is_remote(directory):
        return
    try:
        os.makedirs(directory, exist_ok=True)
        probe = os.path.join(directory, f".writable-{uuid.uuid4().hex}")
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be written ({error.strerror or error}); "
            "choose another directory or mend its permissions"
        ) from None


def fsync_directory(directory: str | Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole and durable, or not at all.

    Local: temporary name, fsync, rename. Elsewhere: a local temporary file, uploaded at the end.
    Raises ``OutputError`` for what the system refuses.
    """
    try:
        if is_remote(path):
            with tempfile.NamedTemporaryFile() as spool:
                yield spool
                spool.flush()
                _upload(spool.name, path)
            return
        os.makedirs(parent(path), exist_ok=True)
        temporary = f"{path}.tmp-{uuid.uuid4().hex}"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(parent(path))
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {ROOM}") from error


def upload(local: str, path: str) -> None:
    """Copy a local file to a path or URL, where it appears when it is whole, with no other copy on the way.

    Raises ``NoSuchFileError`` where the file is not there, ``OutputError``, ``UnavailableError``.
    """
    with _explained(local):
        os.stat(local)
    with _explained(path):
        if is_remote(path):
            _upload(local, path)
            return
        with open(local, "rb") as source, atomic_write(path) as file:
            shutil.copyfileobj(source, file, PART)


def _upload(local: str, path: str) -> None:
    """Raises ``OSError`` where the object is not as long as the file."""
    furthest = 0

    def put(progress: remote.Progress) -> None:
        def note(size: int, value: int) -> None:
            nonlocal furthest
            if value > furthest:  # each try begins anew: only what none reached before is progress
                furthest = value
                progress.moved()

        filesystem, key = remote.filesystem(path)
        options: dict[str, Any] = {}
        if path.startswith("s3://"):
            options["chunksize"] = max(UPLOADED_AT_ONCE, -(-os.path.getsize(local) // 10_000))  # S3's most parts
            options["max_concurrency"] = 4
            options["callback"] = fsspec.Callback(hooks={"moved": note})
        filesystem.put_file(local, key, **options)
        sent, there = os.path.getsize(local), int(filesystem.size(key))
        if there != sent:
            raise OSError(f"{there} of {sent} bytes arrived")

    remote.persistently(path, put)


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """Hold a local directory for one job. Raises ``OutputError`` where another holds it, or it cannot be locked."""
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(open(os.path.join(directory, ".lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{directory}: another job is running in it; wait for it, or use another") from None
        except OSError as error:
            raise OutputError(f"{directory}: cannot be locked ({error.strerror or error}); use another") from None
        yield


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as file:
        file.write(data)


def create(path: str, data: bytes) -> bool:
    """Write a whole file if there is none, atomically, whoever else tries. Returns whether it is now this one.

    data: must not be what another would write. Raises ``OutputError``, ``UnavailableError``.
    """
    if is_remote(path):
        try:
            return bool(remote.persistently(path, lambda progress: remote.create(path, data)))
        except FileExistsError:
            with contextlib.suppress(NoSuchFileError):  # another's, and gone by now
                return read_bytes(path) == data  # an earlier try of ours may have come through
            return False
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    try:
        Path(temporary).write_bytes(data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {ROOM}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return True


def remove(path: str) -> None:
    """Delete a file; one that is not there is no error."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _ask(path, "rm_file")
        else:
            os.unlink(path)


def remove_tree(directory: str | Path) -> None:
    """Delete a local directory and all in it; one that is not there is no error."""
    shutil.rmtree(directory, ignore_errors=True)


def local_weights(path: str, sha256: str | None, key: str, remedy: str) -> str:
    """The local path of a file (or folder) of weights, its hash checked where one is given.

    path: local (the demo's is found from everywhere), or a URL, which must come with its hash and is kept under it in
    UVIT_DIST_CACHE, or ~/.cache/uvit_dist. key: of the configuration, that names it; its hash is at key + "_sha256".
    remedy: what to do where there is no such file. Raises ``MissingInputError``, ``DataError`` where the hash differs.
    """
    if is_remote(path):
        return _fetched(path, sha256, key)
    if not os.path.exists(path := str(shipped(path, "data_tools"))):
        raise MissingInputError(f"{key} {path}: no such file or folder; {remedy}")
    if sha256 is not None:
        if os.path.isdir(path):
            raise DataError(f"{key} {path}: a folder has no hash; give its file of weights, or drop {key}_sha256")
        _check_sha256(path, path, sha256, key)
    return path


def kept_weights(url: str, sha256: str) -> str:
    """Where the file of weights at a URL is kept, once it has been fetched."""
    cache = os.environ.get("UVIT_DIST_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "uvit_dist")
    return os.path.join(cache, sha256[:16].lower(), os.path.basename(urlsplit(url).path))


def _fetched(url: str, sha256: str | None, key: str) -> str:
    if sha256 is None:
        raise DataError(f"{key} {url}: a URL needs the file's hash; set {key}_sha256")
    kept = kept_weights(url, sha256)
    if not os.path.exists(kept):
        make_directory(os.path.dirname(kept))
        try:
            source = fsspec.open(url, "rb").open()
        except (OSError, ValueError, ImportError) as error:
            raise MissingInputError(
                f"{key} {url}: cannot be fetched ({error}); download it by other means, and give its local path"
            ) from None
        with source, atomic_write(kept) as file:
            shutil.copyfileobj(source, file, 1 << 22)
    try:
        _check_sha256(kept, url, sha256, key)
    except DataError:
        Path(kept).unlink(missing_ok=True)
        raise
    return kept


def _check_sha256(path: str, origin: str, sha256: str, key: str) -> None:
    with _explained(path), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    if digest.hexdigest() != sha256.lower():
        raise DataError(
            f"{key} {origin}: its sha256 is {digest.hexdigest()}, {key}_sha256 says {sha256}: "
            "it is another file or was damaged; get the right one"
        )


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NoSuchFileError(f"{path}: no such file; make it or correct the path") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise MissingInputError(
            f"{path}: cannot be read ({error.strerror}); mend its permissions, or correct the path"
        ) from None
