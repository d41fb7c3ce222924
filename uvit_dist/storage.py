"""Files, on local disks and (through fsspec) behind URLs such as ``s3://``: ranged reads, sizes, atomic writes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from uvit_dist.errors import DataError, MissingInputError, OutputError


def is_remote(path: str) -> bool:
    """Whether a path is a URL that fsspec serves."""
    return "://" in path


def join(directory: str, *names: str) -> str:
    """A path below a directory or URL."""
    return "/".join([directory.rstrip("/"), *names]) if is_remote(directory) else str(Path(directory, *names))


def parent(path: str) -> str:
    """The directory or URL prefix that holds a file."""
    return path.rsplit("/", 1)[0] if is_remote(path) else str(Path(path).parent)


def _remote(path: str) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(path, use_listings_cache=False)


def exists(path: str) -> bool:
    """Whether a file or directory is there."""
    if is_remote(path):
        filesystem, key = _remote(path)
        return bool(filesystem.exists(key))
    return os.path.exists(path)


def size(path: str) -> int:
    """Bytes in a file. Raises ``MissingInputError``."""
    with _explained(path):
        if is_remote(path):
            filesystem, key = _remote(path)
            return int(filesystem.size(key))
        return os.stat(path).st_size


def sizes_in(directory: str) -> dict[str, int]:
    """Name → bytes of the files right in a directory, by one listing. Empty where there is none."""
    if is_remote(directory):
        filesystem, key = _remote(directory)
        with contextlib.suppress(FileNotFoundError):
            return {
                Path(e["name"]).name: int(e["size"]) for e in filesystem.ls(key, detail=True) if e["type"] == "file"
            }
        return {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    return {}


def read_bytes(path: str) -> bytes:
    """A whole file. Raises ``MissingInputError``."""
    with _explained(path):
        if is_remote(path):
            filesystem, key = _remote(path)
            return bytes(filesystem.cat_file(key))
        return Path(path).read_bytes()


def read_range(path: str, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``. Raises ``DataError`` where the file ends before, ``MissingInputError``."""
    with _explained(path):
        if is_remote(path):
            filesystem, key = _remote(path)
            data = bytes(filesystem.cat_file(key, start=offset, end=offset + length))
        else:
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
                while data and len(data) < length:
                    piece = os.pread(file.fileno(), length - len(data), offset + len(data))
                    if not piece:
                        break
                    data += piece
    if len(data) != length:
        raise DataError(
            f"{path}: ends at byte {offset + len(data)} where {offset + length} are expected: the file is truncated. "
            "Make or copy this shard again."
        )
    return data


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
            filesystem, key = _remote(path)
            with tempfile.NamedTemporaryFile() as spool:
                yield spool
                spool.flush()
                filesystem.put_file(spool.name, key)
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
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


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


def remove_tree(directory: str | Path) -> None:
    """Delete a local directory and all in it; one that is not there is no error."""
    shutil.rmtree(directory, ignore_errors=True)


def local_weights(path: str, sha256: str | None, key: str, remedy: str) -> str:
    """The local path of a file (or folder) of weights, its hash checked where one is given.

    path: local, or a URL, which must come with its hash and is kept in a cache (UVIT_DIST_CACHE, or
    ~/.cache/uvit_dist) under that hash. key: of the configuration, that names it; its hash is at key + "_sha256".
    remedy: what to do where there is no such file. Raises ``MissingInputError``, ``DataError`` where the hash differs.
    """
    if is_remote(path):
        return _fetched(path, sha256, key)
    if not os.path.exists(path):
        raise MissingInputError(f"{key} {path}: no such file or folder; {remedy}")
    if sha256 is not None:
        if os.path.isdir(path):
            raise DataError(f"{key} {path}: a folder has no hash; give its file of weights, or drop {key}_sha256")
        _check_sha256(path, path, sha256, key)
    return path


def _fetched(url: str, sha256: str | None, key: str) -> str:
    if sha256 is None:
        raise DataError(f"{key} {url}: a URL needs the file's hash; set {key}_sha256")
    cache = os.environ.get("UVIT_DIST_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "uvit_dist")
    kept = os.path.join(cache, sha256[:16].lower(), os.path.basename(urlsplit(url).path))
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
    digest = hashlib.sha256()
    with _explained(path), open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
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
        raise MissingInputError(f"{path}: no such file; make it or correct the path") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise MissingInputError(f"{path}: cannot be read ({error.strerror})") from None
