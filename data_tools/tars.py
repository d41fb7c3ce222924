"""Where the members of tars lie, found without reading what lies between their headers, and kept for other workers.

Local tars are walked by seeks, those behind URLs are streamed. What is found in a tar is kept as a table, so that of
several workers each scans some of the tars.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from uvit_dist import storage
from uvit_dist.errors import DataError, MissingInputError, NoSuchFileError

BLOCK = 512
NEAR, FAR = 4096, 8 << 20
"""Bytes read at once: a header and what is small beside it; behind URLs, where the next header is near, the stream."""

SCANS = 16
"""Tars scanned at once."""

REGULAR, LONG_NAME, PAX, SPARSE = b"\x0007", b"L", b"x", b"S"
DATALESS = b"123456"
"""Types of members: files; names that do not fit a header, in GNU's way and in POSIX's; links, devices, folders."""


@dataclass(frozen=True)
class Extent:
    """A tar, or one inside another. path: of the file; start, size: its bytes in there; name: below data.source."""

    path: str
    start: int
    size: int
    name: str


@dataclass(frozen=True)
class Member:
    """A file in a tar. offset: of its data in the tar's file, bytes."""

    name: str
    offset: int
    size: int


@dataclass
class Table:
    """The samples of a tar: of each its key in the tar, its image's bytes in the tar's file, and what is known of it.

    labels: None where there is none; captions: empty where there are none; problems: key → why it cannot be used.
    """

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, image: Member | None, label: int | None = None, captions: Sequence[str] = ()) -> None:
        """Append a sample. image: none where it cannot be used."""
        self.keys.append(key)
        self.offsets.append(image.offset if image else 0)
        self.sizes.append(image.size if image else 0)
        self.labels.append(label)
        self.captions.append(list(captions))


class Window:
    """The bytes of an extent about the place that is looked at; a context manager."""

    def __init__(self, extent: Extent) -> None:
        self.extent, self.end = extent, extent.start + extent.size
        self._at, self._data = -FAR, b""
        self._file = -1

    def __enter__(self) -> Window:
        path = self.extent.path
        if not storage.is_remote(path):
            try:
                self._file = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise MissingInputError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file. Raises ``DataError`` where the extent ends before."""
        if offset + size > self.end:
            raise DataError(_damaged(self.extent.path, self.end, f"the tar {self.extent.name} ends there, in a member"))
        held = self._at + len(self._data)
        if not self._at <= offset <= offset + size <= held:
            remote = self._file < 0
            length = min(max(size, FAR if remote and self._at <= offset < held + FAR else NEAR), self.end - offset)
            ahead = storage.read_range(self.extent.path, offset, length) if remote else self._near(offset, length)
            self._at, self._data = offset, ahead
        return self._data[offset - self._at : offset - self._at + size]

    def _near(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file, length, offset)
        while len(data) < length:
            more = os.pread(self._file, length - len(data), offset + len(data))
            if not more:
                raise DataError(_damaged(self.extent.path, offset + len(data), "the file ends there"))
            data += more
        return data


def _damaged(path: str, byte: int, what: str) -> str:
    return f"{path}: damaged at byte {byte} ({what}); copy or download it again"


def walk(window: Window) -> Iterator[Member]:
    """The files in a tar, in order. Raises ``DataError`` with the byte where the tar is damaged or truncated."""
    path, at = window.extent.path, window.extent.start
    name: str | None = None
    given: dict[str, str] = {}
    while True:
        if at == window.end:
            raise DataError(_damaged(path, at, f"the tar {window.extent.name} ends there, without its end mark"))
        header = window.read(at, BLOCK)
        if not header.strip(b"\0"):
            return
        kind, data = header[156:157], at + BLOCK
        try:
            size = _number(header[124:136])
            _check_sum(header)
        except ValueError:
            what = "not a tar" if at == window.extent.start else "no header of a member, where one should be"
            raise DataError(_damaged(path, at, what)) from None
        if kind == LONG_NAME:
            name = window.read(data, size).rstrip(b"\0").decode(errors="replace")
        elif kind == PAX:
            given = _pax(window.read(data, size), path, at)
        else:
            size = int(given.get("size", size))
            if kind in DATALESS:
                size = 0
            elif kind == SPARSE:
                raise DataError(f"{path}: a sparse file at byte {at}; write the tar again without --sparse")
            elif data + size > window.end:
                raise DataError(_damaged(path, window.end, f"the tar {window.extent.name} ends there, in a member"))
            if kind in REGULAR:
                yield Member(name or given.get("path") or _name(header), data, size)
            if kind not in b"Kg":
                name, given = None, {}
        at = data + -(-size // BLOCK) * BLOCK


def _number(text: bytes) -> int:
    """A number in a header: octal, or binary where it is large. Raises ``ValueError``."""
    if text[0] & 0x80:
        return int.from_bytes(text[1:], "big")
    return int(text.split(b"\0")[0].strip() or b"0", 8)


def _check_sum(header: bytes) -> None:
    """Raises ``ValueError`` unless the sum of its bytes, unsigned or as old tars have it signed, is in a header."""
    rest = header[:148] + b" " * 8 + header[156:]
    total, noted = sum(rest), _number(header[148:156])
    if noted != total and noted != total - 256 * sum(byte > 127 for byte in rest):
        raise ValueError("checksum")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _pax(content: bytes, path: str, byte: int) -> dict[str, str]:
    """Keyword → value of an extended header: records of "LENGTH KEYWORD=VALUE\\n". path, byte: for errors."""
    out, at = {}, 0
    while at < len(content) and content[at] != 0:
        length, _, record = content[at:].partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            raise DataError(_damaged(path, byte, "no extended header"))
        keyword, _, value = record[: int(length) - len(length) - 2].partition(b"=")
        out[keyword.decode(errors="replace")] = value.decode(errors="replace")
        at += int(length)
    return out


def scan_all(
    extents: Sequence[Extent], scan: Callable[[Window], Table], scan_dir: str | None, start: int = 0
) -> list[Table]:
    """The table of each tar, from scan_dir where another worker has put it there by then, otherwise scanned.

    start: number of the worker: each begins elsewhere, and so meets the tables of the others.
    Raises ``DataError`` for damaged tars.
    """
    first = int(len(extents) * (start * 0.6180339887 % 1))  # far apart, however many workers there are
    order = [*range(first, len(extents)), *range(first)]
    if scan_dir is not None:
        storage.make_directory(scan_dir)
    with ThreadPoolExecutor(SCANS, thread_name_prefix="scan") as pool:
        try:
            scans = pool.map(lambda number: _scan(extents[number], scan, scan_dir), order)
            progress = tqdm(scans, total=len(order), desc="scan", unit="tar", disable=None)
            found = dict(zip(order, progress, strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [found[number] for number in range(len(extents))]


def _scan(extent: Extent, scan: Callable[[Window], Table], scan_dir: str | None) -> Table:
    kept = None if scan_dir is None else storage.join(scan_dir, _table_name(extent, scan.__name__))
    table = None if kept is None else _kept_table(kept)
    if table is None:
        with Window(extent) as window:
            table = scan(window)
        if kept is not None:
            storage.write_bytes(kept, json.dumps(asdict(table)).encode())
    return table


def _table_name(extent: Extent, kind: str) -> str:
    """Of the tar's name, place and size, and of the time of its last change where that is known."""
    changed = 0 if storage.is_remote(extent.path) else os.stat(extent.path).st_mtime_ns
    what = f"{kind} {extent.name} {extent.start} {extent.size} {changed}"
    return f"{re.sub('[^A-Za-z0-9]+', '-', extent.name)[-60:]}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def _kept_table(path: str) -> Table | None:
    try:
        content = storage.read_bytes(path)
    except NoSuchFileError:
        return None
    try:
        tree: dict[str, Any] = json.loads(content)
        return Table(**tree)
    except (ValueError, TypeError):
        return None  # cut short by a full disk: scanned again
