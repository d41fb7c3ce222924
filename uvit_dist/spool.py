"""The features of all images as arrays that lie on disk: memory does not grow with their number."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from uvit_dist import storage
from uvit_dist.errors import DataError
from uvit_dist.fid import FeatureMoments
from uvit_dist.work import WorkDirectory

BLOCK = 1000
"""Images whose moments are taken at once: more than a unit of work has, for each costs passes over a (D, D) matrix."""


class Spool:
    """Arrays by name, each (N, ...) in order of the images. count: N, the number of images."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], count: int) -> None:
        self.count, self._arrays = count, arrays

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(self._arrays)

    def features(self, kind: str, first: int | None = None) -> NDArray[Any]:
        """(n, D), of the first n images in the order of their ids (none: of all), memory-mapped; not to be changed."""
        return self._arrays[kind][:first]

    def moments(self, kind: str, device: torch.device | str = "cpu") -> FeatureMoments:
        """Those of all images in float64, computed on a device in blocks of a fixed size, in order: the same bits
        however the images were cut into units of work."""
        features = self._arrays[kind]
        out = FeatureMoments(features.shape[1], device)
        for begin in range(0, self.count, BLOCK):
            out.update(torch.tensor(features[begin : begin + BLOCK]))
        return out


@contextlib.contextmanager
def spooled(work: WorkDirectory, kinds: list[str], count: int) -> Iterator[Spool]:
    """The results of a finished work as a spool, in files without names beside them, which go with this context.

    kinds: names of the arrays wanted; count: of images that they must be of. One result is in memory at a time.
    Raises ``DataError`` where they are of another number.
    """
    end = 0
    with contextlib.ExitStack() as files:
        arrays: dict[str, NDArray[Any]] = {}
        for result in work.results():
            begin, end = end, end + len(result[kinds[0]])
            if end > count:
                break
            for kind in kinds:
                part = result[kind]
                if kind not in arrays:
                    directory = work.directory if not storage.is_remote(work.directory) else None
                    file: IO[bytes] = files.enter_context(tempfile.TemporaryFile(dir=directory))
                    arrays[kind] = np.memmap(file, dtype=part.dtype, mode="w+", shape=(count, *part.shape[1:]))
                arrays[kind][begin:end] = part
        if end != count:
            raise DataError(
                f"{work.directory}: holds results of {end} images, {count} are needed; delete it and evaluate again"
            )
        for array in arrays.values():
            array.flags.writeable = False
        yield Spool(arrays, count)
