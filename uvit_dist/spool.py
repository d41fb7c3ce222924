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


class Spool:
    """Arrays by name, each (N, ...) in order of the images, and where the units of work that they came from end.

    count: N, the number of images.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], ends: list[int]) -> None:
        self.count, self._arrays, self._ends = ends[-1] if ends else 0, arrays, ends

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(self._arrays)

    def features(self, kind: str, first: int | None = None) -> NDArray[Any]:
        """(n, D), of the first n images in the order of their ids (none: of all), memory-mapped; not to be changed."""
        return self._arrays[kind][:first]

    def moments(self, kind: str) -> FeatureMoments:
        """Those of all images in float64: of each unit of work, merged in order of the units."""
        features = self._arrays[kind]
        out = FeatureMoments(features.shape[1])
        for begin, end in zip([0, *self._ends], self._ends, strict=False):
            out.update(torch.from_numpy(features[begin:end].astype(np.float64)))
        return out


@contextlib.contextmanager
def spooled(work: WorkDirectory, kinds: list[str], count: int) -> Iterator[Spool]:
    """The results of a finished work as a spool, in files without names beside them, which go with this context.

    kinds: names of the arrays wanted; count: of images that they must be of. One result is in memory at a time.
    Raises ``DataError`` where they are of another number.
    """
    ends: list[int] = []
    with contextlib.ExitStack() as files:
        arrays: dict[str, NDArray[Any]] = {}
        for result in work.results():
            begin = ends[-1] if ends else 0
            ends.append(begin + len(result[kinds[0]]))
            if ends[-1] > count:
                break
            for kind in kinds:
                part = result[kind]
                if kind not in arrays:
                    directory = work.directory if not storage.is_remote(work.directory) else None
                    file: IO[bytes] = files.enter_context(tempfile.TemporaryFile(dir=directory))
                    arrays[kind] = np.memmap(file, dtype=part.dtype, mode="w+", shape=(count, *part.shape[1:]))
                arrays[kind][begin : ends[-1]] = part
        if not ends or ends[-1] != count:
            raise DataError(f"{work.directory}: holds results of {ends[-1] if ends else 0} images, {count} are needed; "
                            "delete it and evaluate again")  # fmt: skip
        for array in arrays.values():
            array.flags.writeable = False
        yield Spool(arrays, ends)
