"""A batch of samples, and the memory it lies in: reused as soon as nothing holds its tensors any more.

Fresh memory costs more than the reading: the system zeroes every page of it. So samples are read straight to their
place in a batch, in memory that an earlier batch has left.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist.data.journal import Damage, Substitute
from uvit_dist.data.latents import Provenance
from uvit_dist.data.plan import Ids
from uvit_dist.data.ranges import at_a_line

Addresses = NDArray[np.uint64]


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one step. data: (b, *shape) as stored, moments or pixels; labels, ids: (b,) int64.

    contexts: (b, L, D) as stored, of the caption drawn for each sample, or none. damage, substitutes: what was found
    wrong as this batch was read, and the samples that stand in for it.
    """

    step: int
    epoch: int
    ids: Tensor
    labels: Tensor
    data: Tensor
    contexts: Tensor | None = None
    damage: tuple[Damage, ...] = ()
    substitutes: tuple[Substitute, ...] = ()

    def to(self, device: torch.device, part: slice = slice(None)) -> Batch:
        """A part of the batch, on a device. Shapes as of the batch, (b, ...)."""
        fields = (self.ids, self.labels, self.data, self.contexts)
        moved = [None if field is None else field[part].to(device, non_blocking=True) for field in fields]
        return Batch(self.step, self.epoch, *moved)  # type: ignore[arg-type]


class Rows:
    """Memory for the data (and contexts) of ``count`` samples. pinned: a GPU copies from it by itself.

    bases: (columns,) uint64, the addresses of the data, and of the contexts where there are any.
    """

    def __init__(self, made: Provenance, count: int, pinned: bool = False) -> None:
        self.count = count
        self._arrays = [_memory((count, *made.shape), made.dtype, pinned)]
        if made.text is not None:
            self._arrays.append(_memory((count, *made.text.shape), made.text.dtype, pinned))
        self.bases: Addresses = np.array([array.ctypes.data for array in self._arrays], dtype=np.uint64)
        self._sizes = np.array(made.sizes, dtype=np.uint64)

    def addresses(self, slots: Ids) -> Addresses:
        """Where the data (and contexts) of the samples in these places lie. slots: (n,). Returns (columns, n)."""
        return addresses(self.bases, self._sizes, slots)

    def tensors(self, pool: RowsPool | None = None) -> tuple[Tensor, Tensor | None]:
        """Data (count, *shape) and contexts (count, L, D) in this memory. It goes back to ``pool`` after their end."""
        out = []
        left = [len(self._arrays)]
        for array in self._arrays:
            view = array.view()
            if pool is not None:
                weakref.finalize(view, _returned, left, pool, self).atexit = False
            out.append(torch.from_numpy(view))  # holds the view as long as any tensor shares its storage
        return out[0], out[1] if len(out) > 1 else None


def _memory(shape: tuple[int, ...], dtype: str, pinned: bool) -> NDArray[Any]:
    kind = np.dtype(dtype).newbyteorder("<")
    count = math.prod(shape) * kind.itemsize
    memory = torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy() if pinned else at_a_line(count)
    return memory.view(kind).reshape(shape)


def _returned(left: list[int], pool: RowsPool, rows: Rows) -> None:
    left[0] -= 1
    if not left[0]:
        pool.give(rows)


def addresses(bases: Addresses, sizes: Addresses, slots: Ids) -> Addresses:
    """Addresses of samples. bases: (columns,) or (n, columns); sizes: (columns,), bytes; slots: (n,). Returns
    (columns, n)."""
    return (bases + slots.astype(np.uint64)[:, None] * sizes).T


class RowsPool:
    """Memory of batches that nothing uses any more, ready for the next. The one left last is taken first."""

    def __init__(self, made: Provenance, pinned: bool = False) -> None:
        self._made, self._pinned = made, pinned
        self._free: list[Rows] = []

    def take(self, count: int) -> Rows:
        """Memory for ``count`` samples, its content left from before."""
        if self._free and self._free[-1].count == count:
            return self._free.pop()
        return Rows(self._made, count, self._pinned)

    def give(self, rows: Rows) -> None:
        """Take memory back."""
        self._free.append(rows)
