"""Pixels to what an encoder takes, on the host, in memory used again: new pages cost more than the arithmetic."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from uvit_dist.compiled import library_or_none


class HostImages:
    """x0 = pixels/127.5 − 1 of a batch and of its mirror images, bit for bit ``pixels_to_x0``, laid out (B, 3, H, W).

    Image by image, so that one that is mirrored too is still in the processor's cache, as numbers that need no more
    arithmetic. What it returns is overwritten by its next call.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, Tensor] = {}
        self._values = torch.arange(256, dtype=torch.uint8).float().div_(127.5).sub_(1.0)

    def x0(self, pixels: Tensor, mirrored: Sequence[bool]) -> list[Tensor]:
        """(B, 3, H, W) float32, contiguous, for each of ``mirrored``, of pixels (B, H, W, 3) uint8 on the host."""
        plain = self._room(False, pixels)
        flipped = self._room(True, pixels) if True in mirrored else None
        code, pixels = kernel(), pixels.contiguous()
        with one_thread():
            for number, image in enumerate(pixels):
                if code is not None:
                    other = None if flipped is None else flipped[number].data_ptr()
                    code.planes(
                        image.data_ptr(), self._values.data_ptr(), *image.shape[:2], plain[number].data_ptr(), other
                    )
                    continue
                plain[number].copy_(image.permute(2, 0, 1)).div_(127.5).sub_(1.0)
                if flipped is not None:
                    flipped[number].copy_(plain[number].flip(-1))
        return [self._memory[flag] for flag in mirrored]

    def _room(self, mirrored: bool, pixels: Tensor) -> Tensor:
        count, height, width, _ = pixels.shape
        room = self._memory.get(mirrored)
        if room is None or room.shape != (count, 3, height, width):
            room = self._memory[mirrored] = torch.empty(count, 3, height, width)
        return room


@cache
def kernel() -> ctypes.CDLL | None:
    """x0.c, compiled; none where it cannot be. Once for each process."""
    code = library_or_none(Path(__file__).with_name("x0.c"), "PyTorch makes floats of images")
    if code is not None:
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        code.planes.argtypes = [pointer, pointer, long, long, pointer, pointer]
        code.planes.restype = None
    return code


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small operations are not shared among threads: with decoding processes on all cores these wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
