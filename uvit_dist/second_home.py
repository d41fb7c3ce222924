"""Checkpoints in a second place, an S3 URL or a folder elsewhere: copied out, retained, and brought back.

``home/step-00000500/`` holds the files of the checkpoint as they are. Its ``manifest.json`` is put last, when all else
has been read back and agrees with its hashes: it is the commit. Nothing that came through a network is called damaged
before two readings of it were alike.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeVar

import xxhash

from uvit_dist import checkpoint, storage
from uvit_dist.checkpoint import MANIFEST, FileRecord
from uvit_dist.errors import CheckpointError, DataError, NoSuchFileError, OutputError

T = TypeVar("T")
Verify = Literal["size", "hash"]
AT_ONCE = 4
"""Files that are copied beside each other."""
TRIES = 4
"""Readings of a part that is not there, or never twice alike, before it is called damaged."""
UPLOADS = 2
"""Uploads of a file before its second home is given up."""
PAUSE_S = 0.1
"""Pause before the second reading; then twice, thrice as long."""
REMEDY = "use the one before it, or copy this one here again"
_NAME = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Manifest:
    """A manifest as it is written, and the files it lists."""

    data: bytes
    files: list[FileRecord]


# -- out --------------------------------------------------------------------------------------------------------------


def copy_out(directory: Path, home: str) -> None:
    """Copy a committed checkpoint to ``home``, verify what arrived, and commit it there. One that is there is kept.

    What an interrupted copy left is overwritten; so is another checkpoint of this step. Raises ``CheckpointError``
    where the checkpoint is damaged here, ``NoSuchFileError`` where it is gone, ``OutputError``, ``UnavailableError``.
    """
    try:
        manifest = _parse(storage.read_bytes(str(directory / MANIFEST)), directory.name)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}; set it aside: the one before it is used then") from None
    target = storage.join(home, directory.name)
    there = storage.sizes_in(target)
    if MANIFEST in there:
        if _misfit(manifest, there) is None and _holds(target, manifest):
            log.info("%s: is there already", target)
            return
        storage.remove(storage.join(target, MANIFEST))  # first: what is overwritten must not pass for whole
    for name in there.keys() - {record.name for record in manifest.files} - {MANIFEST}:
        storage.remove(storage.join(target, name))
    _at_once(lambda record: _put(directory / record.name, storage.join(target, record.name), record), manifest.files)
    reason = _misfit(manifest, storage.sizes_in(target))
    if reason is None:
        storage.write_bytes(storage.join(target, MANIFEST), manifest.data)
        if _holds(target, manifest):
            log.info("%s: copied to %s", directory, target)
            return
        reason = f"{MANIFEST} is not what was written"
        storage.remove(storage.join(target, MANIFEST))
    raise OutputError(f"{target}: {reason}, though it was just written; see to the storage, or set another copy_to")


def _holds(target: str, manifest: _Manifest) -> bool:
    try:
        return _read_manifest(target) == manifest.data
    except (NoSuchFileError, DataError, CheckpointError):
        return False


def _put(path: Path, url: str, record: FileRecord) -> None:
    for _ in range(UPLOADS):
        storage.upload(str(path), url)
        reason = _read(url, record)
        if reason is None:
            return
        log.warning("%s: after its upload %s", url, reason)
    here = _read(str(path), record)
    if here is not None:
        raise CheckpointError(f"{path.parent}: {here}, and is not copied; set it aside: the one before it is used then")
    raise OutputError(f"{url}: {reason} after {UPLOADS} uploads; see to the storage, or set another checkpoint.copy_to")


def retain(home: str, names_to_keep: Collection[str]) -> None:
    """Delete all other step directories of ``home``, whole or not, each one's manifest first. Raises ``OutputError``,
    ``UnavailableError``.
    """
    for name, files in _contents(home).items():
        if name in names_to_keep:
            continue
        where = storage.join(home, name)
        storage.remove(storage.join(where, MANIFEST))
        _at_once(storage.remove, [storage.join(where, file) for file in files])
        if not storage.is_remote(home):
            storage.remove_tree(where)
        log.info("%s: deleted", where)


# -- back -------------------------------------------------------------------------------------------------------------


def names_at(home: str) -> list[str]:
    """The checkpoints committed at ``home``, newest first, whole or damaged. Raises ``UnavailableError``."""
    return [name for name, files in _contents(home).items() if MANIFEST in files]


def newest_at(home: str, verify: Verify = "size") -> str | None:
    """The newest whole checkpoint of ``home``, or none where nothing was committed. verify: "hash" to read every byte.

    Damaged ones are named in the log and passed over. Raises ``CheckpointError`` if there are some and none is whole,
    ``UnavailableError``.
    """

    def checked(name: str) -> str:
        _check(home, name, verify)
        return name

    return _newest(home, checked)


def fetch(home: str, name: str, run_dir: str | Path) -> Path:
    """Bring a checkpoint of ``home`` into a run, every hash verified, and commit it there. Returns its directory.

    One of this step that the run has already is set aside. Raises ``CheckpointError`` where it is damaged: take the one
    before; ``OutputError``, ``UnavailableError``.
    """
    manifest = _check(home, name, "size")
    parent = checkpoint.checkpoints_dir(run_dir)
    final, temporary = parent / name, parent / f".tmp-{name}"
    storage.remove_tree(temporary)
    storage.make_directory(str(temporary))
    try:
        _at_once(lambda record: _get(storage.join(home, name), temporary, record), manifest.files)
        storage.write_bytes(str(temporary / MANIFEST), manifest.data)
        storage.fsync_directory(temporary)
        checkpoint.set_aside(final)
        temporary.rename(final)
        storage.fsync_directory(parent)
    except OSError as error:
        raise OutputError(
            f"{temporary}: cannot be written ({error.strerror or error}); free space, or use another run_dir"
        ) from error
    finally:
        storage.remove_tree(temporary)
    log.info("%s: brought back from %s", final, home)
    return final


def bring_back(home: str, run_dir: str | Path, verify: Verify = "size", newer_than: str = "") -> Path | None:
    """Fetch the newest checkpoint of ``home`` that is whole. Returns its directory, or none where none was committed.

    newer_than: a name; only newer ones count.
    verify: what is checked of each at home before it is fetched; hashes are verified while fetching in any case.
    Raises ``CheckpointError`` if there are some and none is whole, ``OutputError``, ``UnavailableError``.
    """

    def fetched(name: str) -> Path:
        if verify == "hash":
            _check(home, name, verify)
        return fetch(home, name, run_dir)

    return _newest(home, fetched, newer_than)


def _newest(home: str, use: Callable[[str], T], newer_than: str = "") -> T | None:
    """What ``use`` makes of the newest checkpoint that it raises no ``CheckpointError`` for."""
    reasons = []
    for name in names_at(home):
        if name <= newer_than:
            break
        try:
            return use(name)
        except CheckpointError as error:
            log.warning("%s", error)
            reasons.append(str(error))
    if reasons:
        listed = "\n  ".join(reasons)
        raise CheckpointError(
            f"{home}: {len(reasons)} checkpoint(s), none of them whole:\n  {listed}\n"
            "Bring a whole one there from elsewhere, or unset checkpoint.copy_to to start anew."
        )
    return None


def _get(source: str, directory: Path, record: FileRecord) -> None:
    with open(directory / record.name, "wb") as file:
        reason = _read(storage.join(source, record.name), record, file)
        if reason is not None:
            raise CheckpointError(f"{source}: {reason}; {REMEDY}")
        file.flush()
        os.fsync(file.fileno())


# -- what is there ----------------------------------------------------------------------------------------------------


def _at_once(action: Callable[[T], None], items: list[T]) -> None:
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="second-home") as pool:
        list(pool.map(action, items))


def _contents(home: str) -> dict[str, list[str]]:
    """Step directories, newest first → the names of their files."""
    found: dict[str, list[str]] = {}
    for path in storage.tree(home):
        name, _, file = path.partition("/")
        if _NAME.fullmatch(name) and file:
            found.setdefault(name, []).append(file)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split("-")[1]), reverse=True))


def _check(home: str, name: str, verify: str) -> _Manifest:
    """The manifest of a checkpoint that is whole. Raises ``CheckpointError``."""
    where = storage.join(home, name)
    try:
        manifest = _parse(_read_manifest(where), name)
    except NoSuchFileError:
        raise CheckpointError(
            f"{where}: {MANIFEST} is missing: it was never committed, or is deleted; {REMEDY}"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}; {REMEDY}") from None
    reason = _misfit(manifest, storage.sizes_in(where))
    if reason is None and verify == "hash":
        reasons = (_read(storage.join(where, record.name), record) for record in manifest.files)
        reason = next((found for found in reasons if found is not None), None)
    if reason is not None:
        raise CheckpointError(f"{where}: {reason}; {REMEDY}")
    return manifest


def _misfit(manifest: _Manifest, sizes: dict[str, int]) -> str | None:
    for record in manifest.files:
        if record.name not in sizes:
            return f"{record.name} is missing"
        if sizes[record.name] != record.size:
            return f"{record.name} has {sizes[record.name]} bytes, the manifest says {record.size}"
    return None


def _parse(data: bytes, name: str) -> _Manifest:
    """Raises ``CheckpointError``."""
    try:
        manifest = checkpoint.unsealed(data)
        if f"step-{manifest['step']:08d}" != name:
            raise ValueError(f"it is of step {manifest['step']}")
        files = [FileRecord(**item) for item in manifest["files"]]
        if any(Path(record.name).name != record.name for record in files):
            raise ValueError("a file's name leads elsewhere")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the manifest cannot be read ({error})") from None
    return _Manifest(data, files)


def _read_manifest(where: str) -> bytes:
    """Two readings, one after the other, must agree: no hash tells what came of it on the way.

    Raises ``NoSuchFileError``, ``CheckpointError``.
    """
    before = None
    for attempt in range(2 * TRIES):
        time.sleep(PAUSE_S * max(0, attempt - 1))
        try:
            data = storage.read_bytes(storage.join(where, MANIFEST))
        except (NoSuchFileError, DataError):
            if attempt + 1 >= TRIES and before is None:
                raise
            continue
        if data == before:
            return data
        before = data
    raise CheckpointError("the manifest cannot be read (every reading differs)")


def _read(url: str, record: FileRecord, into: IO[bytes] | None = None) -> str | None:
    """Read a file, and where it differs from its record, once more, until of each part two readings are alike.

    Returns why it is not as its record says, or none.
    """
    digests: dict[int, bytes] = {}
    try:
        for again in (False, True):
            hasher, offset = xxhash.xxh3_128(), 0
            if into is not None:
                into.seek(0)
            for part in _parts(url, record.size):
                if again:
                    part = _agreed(url, offset, part, digests[offset])
                digests[offset] = xxhash.xxh3_128_digest(part)
                offset += len(part)
                hasher.update(part)
                if into is not None:
                    into.write(part)
            if hasher.hexdigest() == record.xxh3:
                return None
            log.info("%s: differs from its hash%s", url, "" if again else "; reading it again")
    except NoSuchFileError:
        return f"{record.name} is missing"
    except DataError:
        return f"{record.name} cannot be read to its byte {record.size}, where the manifest has its end"
    return f"{record.name} differs from its hash in the manifest"


def _agreed(url: str, offset: int, part: bytes, digest: bytes) -> bytes:
    """The part at an offset as two readings have it. digest: of an earlier one. Raises ``DataError``."""
    seen = {digest}
    for attempt in range(TRIES):
        digest = xxhash.xxh3_128_digest(part)
        if digest in seen:
            return part
        seen.add(digest)
        time.sleep(PAUSE_S * attempt)
        part = b"".join(_parts(url, offset + len(part), offset))
    raise DataError(f"{url}: every reading of its bytes from {offset} on differs")


def _parts(url: str, end: int, first: int = 0) -> Iterator[bytes]:
    """A file in order; what is said not to be there is asked for again. Raises ``NoSuchFileError``, ``DataError``."""
    failures = 0
    while first < end:
        try:
            for part in storage.stream(url, end, first=first):
                yield part
                first, failures = first + len(part), 0
        except (NoSuchFileError, DataError):
            failures += 1
            if failures == TRIES:
                raise
            time.sleep(PAUSE_S * failures)
