"""Pixels to what an encoder takes, on the host, in memory used again: new pages cost more than the arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

AT_ONCE = 4
"""Images that go through all steps together, while they are in the processor's cache."""


class HostImages:
    """x0 = pixels/127.5 − 1 of a batch and of its mirror images, bit for bit ``pixels_to_x0``, laid out (B, 3, H, W).

    What it returns is overwritten by its next call.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, Tensor] = {}

    def x0(self, pixels: Tensor, mirrored: bool) -> Tensor:
        """(B, 3, H, W) float32, contiguous, of pixels (B, H, W, 3) uint8 on the host."""
        count, height, width, _ = pixels.shape
        out = self._memory.get(mirrored)
        if out is None or out.shape != (count, 3, height, width):
            out = self._memory[mirrored] = torch.empty(count, 3, height, width)
        with _one_thread():
            for part, into in zip(pixels.split(AT_ONCE), out.split(AT_ONCE), strict=True):
                planes = part.permute(0, 3, 1, 2).contiguous()
                into.copy_(planes.flip(-1) if mirrored else planes).div_(127.5).sub_(1.0)
        return out


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small operations are not shared among threads: with decoding processes on all cores these wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
