"""Units of work whose results are files: written atomically, found again after a kill, merged in order."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uvit_dist import storage

Result = dict[str, NDArray[Any]]


class WorkDirectory:
    """Results of numbered units under one directory. A result is there whole or not at all."""

    def __init__(self, directory: str, units: int) -> None:
        self.directory, self.units = directory, units

    def _path(self, unit: int) -> str:
        return storage.join(self.directory, f"unit-{unit:06d}.npz")

    def missing(self) -> list[int]:
        """The units that are still to do, in order."""
        done = storage.sizes_in(self.directory)
        return [unit for unit in range(self.units) if f"unit-{unit:06d}.npz" not in done]

    def put(self, unit: int, result: Result) -> None:
        """Store a unit's arrays."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:  # as numpy.savez, but the bytes hold no time
            for name, array in result.items():
                data = io.BytesIO()
                np.lib.format.write_array(data, np.asarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue())
        storage.write_bytes(self._path(unit), out.getvalue())

    def results(self) -> Iterator[Result]:
        """All results, in order of the units."""
        for unit in range(self.units):
            with np.load(io.BytesIO(storage.read_bytes(self._path(unit))), allow_pickle=False) as archive:
                yield dict(archive)
