"""Parts of a resized image, in Pillow's own arithmetic and so with its bytes, without the rest of it.

``resample.c`` is compiled once, by the machine's C compiler, and kept (``uvit_dist.compiled``). Where that cannot be,
or its bytes are not those of the Pillow that is here, ``kernel`` is none, and Pillow does the work.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.pillow_memory import rgb_pixels
from uvit_dist.compiled import library_or_none

log = logging.getLogger(__name__)
Pixels = NDArray[np.uint8]
Size = tuple[int, int]
"""(width, height)"""
SOURCE = Path(__file__).with_name("resample.c")
PRECISION = 22
"""Bits of a coefficient after the point, as in resample.c."""


@dataclass(frozen=True)
class Filter:
    """A filter of Pillow's: its weight at a distance from the centre, (n,) float64; 0 beyond support."""

    weight: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    support: float
    pillow: Image.Resampling


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys 1981, a = -1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


BOX = Filter(lambda x: ((x > -0.5) & (x <= 0.5)).astype(np.float64), 0.5, Image.Resampling.BOX)
BICUBIC = Filter(_cubic, 2.0, Image.Resampling.BICUBIC)
LANCZOS = Filter(
    lambda x: np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3.0), 0.0), 3.0, Image.Resampling.LANCZOS
)


@dataclass(frozen=True)
class Axis:
    """How places [begin, end) of a resized axis come from places [begin_in, end_in) of it before.

    first: (n,) int32, from begin_in on; coefficients: (n, taps) int32.
    """

    first: NDArray[np.int32]
    coefficients: NDArray[np.int32]
    begin_in: int
    end_in: int


@lru_cache(4096)
def axis(before: int, after: int, filter: Filter, begin: int, end: int) -> Axis:
    """Places [begin, end) of an axis of ``before`` places resized to ``after``."""
    scale = before / after
    stretch = max(scale, 1.0)
    support = filter.support * stretch
    centre = (np.arange(begin, end) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), before)
    weights = np.zeros((end - begin, int((last - first).max())))
    total = np.zeros(end - begin)
    for tap in range(weights.shape[1]):
        here = filter.weight((first + tap - centre + 0.5) * (1.0 / stretch))
        weights[:, tap] = np.where(first + tap < last, here, 0.0)
        total += weights[:, tap]
    weights /= np.where(total == 0.0, 1.0, total)[:, None]
    fixed = np.trunc(weights * 2.0**PRECISION + np.where(weights < 0.0, -0.5, 0.5)).astype(np.int32)
    begin_in = int(first[0])
    return Axis((first - begin_in).astype(np.int32), fixed, begin_in, int(last[-1]))


def resample(pixels: Pixels, steps: Sequence[tuple[Size, Filter]], left: int, top: int, size: int) -> Pixels:
    """Resize to each of the sizes in turn and cut (size, size, 3) at (left, top): the same bytes as Pillow's.

    pixels: (H, W, 3 or 4), of which the first three count. Only what the cut depends on is computed. Needs ``kernel``.
    """
    sizes = [(pixels.shape[1], pixels.shape[0]), *(size for size, _ in steps)]
    x, y = (left, left + size), (top, top + size)
    axes = []
    for before, (after, filter) in zip(sizes[-2::-1], steps[::-1], strict=True):
        columns = axis(before[0], after[0], filter, *x)
        rows = axis(before[1], after[1], filter, *y)
        halves = filter is BOX and (2 * after[0], 2 * after[1]) == before
        axes.append((columns, rows, halves))
        x, y = (columns.begin_in, columns.end_in), (rows.begin_in, rows.end_in)
    pixels = pixels[y[0] : y[1], x[0] : x[1]]
    for columns, rows, halves in reversed(axes):
        pixels = _halve(pixels) if halves else _resize(pixels, columns, rows)
    return pixels


def _resize(pixels: Pixels, columns: Axis, rows: Axis) -> Pixels:
    height, width = pixels.shape[:2]
    middle = np.empty((height, len(columns.first), 3), dtype=np.uint8)
    out = np.empty((len(rows.first), len(columns.first), 3), dtype=np.uint8)
    code = kernel()
    assert code is not None
    failed = code.resample_columns(
        pixels.ctypes.data, *pixels.strides[:2], width, height, len(columns.first), columns.coefficients.shape[1],
        columns.first.ctypes.data, columns.coefficients.ctypes.data, middle.ctypes.data,
    )  # fmt: skip
    failed = failed or code.resample_rows(
        middle.ctypes.data, middle.strides[0], height, len(rows.first), rows.coefficients.shape[1],
        rows.first.ctypes.data, rows.coefficients.ctypes.data, out.ctypes.data,
    )  # fmt: skip
    if failed:
        raise MemoryError
    return out


def _halve(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    out = np.empty((height, width, 3), dtype=np.uint8)
    code = kernel()
    assert code is not None
    if code.halve(pixels.ctypes.data, *pixels.strides[:2], height, width, out.ctypes.data):
        raise MemoryError
    return out


@cache
def kernel() -> ctypes.CDLL | None:
    """The compiled functions, which release Python's lock; none where they cannot be had. Once for each process."""
    code = library_or_none(SOURCE, "Pillow resizes images")
    if code is None:
        return None
    declare(code)
    return code


def declare(code: ctypes.CDLL) -> None:
    """Tell ctypes what the functions of resample.c take."""
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    code.resample_columns.argtypes = [pointer, long, *[number] * 5, pointer, pointer, pointer]
    code.resample_rows.argtypes = [pointer, long, *[number] * 3, pointer, pointer, pointer]
    code.halve.argtypes = [pointer, long, *[number] * 3, pointer]


@cache
def agrees_with_pillow() -> bool:
    """Whether there is a kernel, and it makes the bytes that this Pillow makes, larger and smaller, odd and even."""
    if kernel() is None:
        return False
    pixels = np.random.default_rng(0).integers(0, 256, (46, 74, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    cases = [(BOX, (37, 23)), (BOX, (30, 22)), (BICUBIC, (103, 61)), (BICUBIC, (50, 40)), (LANCZOS, (50, 50))]
    for filter, size in cases:
        theirs = np.asarray(image.resize(size, filter.pillow))
        side = min(size)
        left = size[0] - side
        ours = [resample(given, [(size, filter)], left, 0, side) for given in (pixels, rgb_pixels(image))]
        if not all(np.array_equal(part, theirs[:side, left:]) for part in ours):
            log.warning("Pillow %s resamples in another way than resample.c; Pillow does the work", Image.__version__)
            return False
    return True
