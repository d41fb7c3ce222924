"""Ranges of a local file read to given memory and checked: in C where a compiler is at hand, else in Python."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from uvit_dist.compiled import library_or_none
from uvit_dist.errors import NoSuchFileError

log = logging.getLogger(__name__)
WHOLE, SHORT, DIFFERENT = range(3)
"""What becomes of a range: as its hash says; the file ends in it; it is another."""
State = NDArray[np.uint8]
LINE = 64
"""Bytes of a line of the processor's caches."""
_kept = threading.local()
"""A thread's buffer, its memory given by the system once."""


@dataclass
class Ranges:
    """What is read of a file, each (n,): its first byte there, its bytes, its xxh3 of 64 bits, the address it goes to,
    int64 or uint64; and the number of its sample among those that are read together.

    Whoever calls holds the memory.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    expected: NDArray[np.uint64]
    to: NDArray[np.uint64]
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, which: slice | NDArray[Any]) -> Ranges:
        columns: list[Any] = [self.starts, self.sizes, self.expected, self.to, self.numbers]
        return Ranges(*(np.ascontiguousarray(column[which]) for column in columns))

    @property
    def ends(self) -> NDArray[np.int64]:
        """The byte after each, (n,)."""
        return self.starts + self.sizes

    def view(self, number: int) -> memoryview:
        """The memory that a range goes to."""
        return memoryview((ctypes.c_ubyte * int(self.sizes[number])).from_address(int(self.to[number]))).cast("B")

    def check(self, got: int) -> State:
        """The state of each, (n,), where all before the byte ``got`` of the file has been read."""
        state = np.where(self.ends > got, SHORT, WHOLE).astype(np.uint8)
        for number in np.flatnonzero(state == WHOLE).tolist():
            if xxhash.xxh3_64_intdigest(self.view(number)) != self.expected[number]:
                state[number] = DIFFERENT
        return state


def read_ranges(path: str, ranges: Ranges) -> State:
    """Read ranges of a local file. Returns the state of each, (n,).

    Raises ``NoSuchFileError``, and ``OSError`` where the file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise NoSuchFileError(path) from None
    try:
        return _read_in_c(path, descriptor, ranges) if kernel() is not None else _read(descriptor, ranges)
    finally:
        os.close(descriptor)


def _read(descriptor: int, ranges: Ranges) -> State:
    state = np.empty(len(ranges), dtype=np.uint8)
    for number in range(len(ranges)):
        begin, view = int(ranges.starts[number]), ranges.view(number)
        got = 0
        while got < len(view) and (more := os.preadv(descriptor, [view[got:]], begin + got)):
            got += more
        state[number] = ranges[number : number + 1].check(begin + got)[0]
    return state


def _read_in_c(path: str, descriptor: int, ranges: Ranges) -> State:
    code = kernel()
    assert code is not None
    state = np.empty(len(ranges), dtype=np.uint8)
    columns = (ranges.starts, ranges.sizes, ranges.to, ranges.expected)
    assert all(column.flags.c_contiguous and column.itemsize == 8 for column in columns)
    addresses = (column.ctypes.data for column in columns)
    together, piece = amounts()
    rest = (ctypes.byref(hash_functions()), _buffer(together), together, piece, state.ctypes.data)
    failed = code.read_checked(descriptor, len(ranges), *addresses, *rest)
    if failed:
        raise OSError(failed, os.strerror(failed), path)
    return state


def at_a_line(count: int) -> NDArray[np.uint8]:
    """Memory of ``count`` bytes, not set, that begins at a line of the caches, as numpy's own need not. (count,)."""
    memory = np.empty(count + LINE, dtype=np.uint8)
    begin = -memory.ctypes.data % LINE
    return memory[begin : begin + count]


def _buffer(together: int) -> int:
    """The address of this thread's buffer."""
    kept: NDArray[np.uint8] | None = getattr(_kept, "buffer", None)
    if kept is None or len(kept) != together:
        kept = _kept.buffer = at_a_line(together)
    return kept.ctypes.data


@cache
def amounts() -> tuple[int, int]:
    """On this processor: bytes that one call may read, and those that are hashed and put to their place by turns."""
    code = kernel()
    assert code is not None
    together, piece = ctypes.c_int64(), ctypes.c_int64()
    code.amounts(ctypes.byref(together), ctypes.byref(piece))
    return together.value, piece.value


class _HashFunctions(ctypes.Structure):
    """``struct xxh3`` of read_checked.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("create", "release", "reset", "update", "digest")]


@cache
def hash_functions() -> _HashFunctions:
    """The addresses of xxhash's own functions for XXH3 of 64 bits, for this processor where they can choose.

    Raises ``OSError`` or ``AttributeError`` where they are not to be had.
    """
    code = ctypes.CDLL(import_module("xxhash._xxhash").__file__)
    update = getattr(code, "XXH3_64bits_update_dispatch", None) or code.XXH3_64bits_update
    functions = (code.XXH3_createState, code.XXH3_freeState, code.XXH3_64bits_reset, update, code.XXH3_64bits_digest)
    return _HashFunctions(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled function; none where it cannot be had. Once for each process."""
    try:
        hash_functions()
    except (OSError, AttributeError) as error:
        log.info("xxhash's own functions are not to be had (%s); Python reads samples, which takes longer", error)
        return None
    code = library_or_none(Path(__file__).with_name("read_checked.c"), "Python reads samples")
    if code is not None:
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        code.read_checked.argtypes = [ctypes.c_int, long, *[pointer] * 6, long, long, pointer]
    return code
