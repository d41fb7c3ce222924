"""The official code's feature folders: one .npy file for each sample, ImageNet's pickled by old versions of numpy.

ImageNet: ``{i}.npy`` is (moments, label), i = 0, 1, …. COCO: ``{i}.npy`` is moments, ``{i}_{k}.npy`` the context of
their k-th caption, ``empty_context.npy`` that of the empty prompt, beside them or one folder up.
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
from collections.abc import Collection
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from uvit_dist.errors import DataError, MissingInputError

_NAME = re.compile(r"(\d+)(?:_(\d+))?\.npy")
_REMEDY = "copy the whole folder again"
_DAMAGED = (pickle.UnpicklingError, ValueError, TypeError, EOFError, LookupError, AttributeError, MemoryError)


_MAKE_ARRAY, _MAKE_SCALAR = np.empty(0).__reduce__()[0], np.int64(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _MAKE_ARRAY for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _MAKE_SCALAR for core in ("core", "_core")},
}
"""All that a pickle may name: what makes arrays and their elements, in numpy 1 and 2."""


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy's arrays and scalars; anything else that a pickle could call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle names. Raises ``UnpicklingError`` for what is not in _ALLOWED."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")


def read_npy(path: str) -> NDArray[Any]:
    """The array (any shape) in a .npy file, which may hold other arrays as objects. Nothing but arrays is unpickled.

    Raises ``DataError`` where the file holds anything else, ``MissingInputError``.
    """
    try:
        with open(path, "rb") as file:
            return _read(file)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file; {_REMEDY}") from None
    except _DAMAGED as error:
        raise DataError(f"{path}: not an array, or a damaged one ({error}); {_REMEDY}") from None


def _read(file: IO[bytes]) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    array = _ArraysOnly(file).load()
    if not isinstance(array, np.ndarray):
        raise ValueError(f"a {type(array).__name__}")
    return array


class FeatureFolder:
    """A folder of features, checked to be whole by its names. captions: of each sample, empty for ImageNet's.

    shape: of the moments; context_shape: of a context, or none for ImageNet's.
    Raises ``MissingInputError`` where there is no such folder, ``DataError`` where files are missing.
    """

    def __init__(self, root: str, shape: tuple[int, ...], context_shape: tuple[int, ...] | None) -> None:
        self.root, self.shape, self.context_shape = root, shape, context_shape
        if not os.path.isdir(root):
            raise MissingInputError(f"--features {root}: no such folder; give the folder of the official .npy files")
        numbers: set[int] = set()
        contexts: dict[int, set[int]] = {}
        with os.scandir(root) as entries:
            for match in filter(None, (_NAME.fullmatch(entry.name) for entry in entries)):
                if match[2] is None:
                    numbers.add(int(match[1]))
                else:
                    contexts.setdefault(int(match[1]), set()).add(int(match[2]))
        if not numbers:
            raise MissingInputError(f"--features {root}: no 0.npy, 1.npy …; give the folder of the official .npy files")
        self._require_all(numbers, "{}")
        if (context_shape is not None) != bool(contexts):
            found = "holds contexts of captions" if contexts else "holds no contexts of captions"
            need = "model.clip_dim needs them" if context_shape else "without model.clip_dim there are labels instead"
            raise DataError(f"--features {root}: {found}, and {need}; give the right folder, or correct model.clip_dim")
        self.captions = [len(contexts.get(number, ())) for number in range(len(numbers))]
        if contexts:
            self._check([f"{number}_0" for number, count in enumerate(self.captions) if not count])
            self._check(list(map(str, sorted(contexts.keys() - numbers))))
            for number, found_ones in contexts.items():
                self._require_all(found_ones, f"{number}_{{}}")

    def __len__(self) -> int:
        return len(self.captions)

    def _require_all(self, numbers: Collection[int], name: str) -> None:
        """0 … the largest."""
        lacking = max(numbers) + 1 - len(numbers)
        gaps = (name.format(number) for number in itertools.count() if number not in numbers)
        self._check(list(itertools.islice(gaps, min(lacking, 3))), lacking)

    def _check(self, missing: list[str], count: int | None = None) -> None:
        if missing:
            names = ", ".join(f"{name}.npy" for name in missing[:3])
            count = len(missing) if count is None else count
            raise DataError(f"--features {self.root}: {count} files are missing (the first: {names}); {_REMEDY}")

    def moments_and_label(self, number: int) -> tuple[NDArray[np.float32], int]:
        """Moments (2C, H, W) float32 and the label of an ImageNet sample. Raises ``DataError``."""
        path = os.path.join(self.root, f"{number}.npy")
        pair = read_npy(path)
        if pair.dtype != object or pair.shape != (2,) or not isinstance(pair[0], np.ndarray):
            raise DataError(f"{path}: {pair.dtype} {pair.shape} where (moments, label) is expected; {_REMEDY}")
        label = np.asarray(pair[1])
        if label.shape != () or not np.issubdtype(label.dtype, np.integer):
            raise DataError(f"{path}: a label {label.dtype} {label.shape} where one integer is expected; {_REMEDY}")
        return self._checked(pair[0], self.shape, path, "model.in_chans and model.img_size"), int(label)

    def moments(self, number: int) -> NDArray[np.float32]:
        """Moments (2C, H, W) float32 of a COCO sample. Raises ``DataError``."""
        path = os.path.join(self.root, f"{number}.npy")
        return self._checked(read_npy(path), self.shape, path, "model.in_chans and model.img_size")

    def contexts(self, number: int) -> NDArray[np.float32]:
        """Contexts of all captions of a COCO sample, (captions, length, width) float32. Raises ``DataError``."""
        return np.stack([self._context(f"{number}_{k}.npy") for k in range(self.captions[number])])

    def empty_context(self) -> NDArray[np.float32]:
        """The context of the empty prompt, (length, width) float32. Raises ``MissingInputError``, ``DataError``."""
        for name in ("empty_context.npy", os.path.join("..", "empty_context.npy")):
            if os.path.exists(os.path.join(self.root, name)):
                return self._context(name)
        raise MissingInputError(
            f"--features {self.root}: no empty_context.npy in it or one folder up; copy that of the official features"
        )

    def _context(self, name: str) -> NDArray[np.float32]:
        assert self.context_shape is not None
        path = os.path.join(self.root, name)
        return self._checked(read_npy(path), self.context_shape, path, "model.num_clip_token and model.clip_dim")

    def _checked(self, array: NDArray[Any], shape: tuple[int, ...], path: str, keys: str) -> NDArray[np.float32]:
        if array.shape != shape or array.dtype != np.float32:
            raise DataError(
                f"{path}: {array.dtype} {array.shape}, and {keys} ask for float32 {shape}; give the features of this "
                "resolution, or correct the configuration"
            )
        return array
