"""CIFAR-10's binary version as a source of images."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from data_tools.decode import read_address
from data_tools.images import Address, BadImageError, Pixels, load_image
from uvit_dist.errors import DataError

CIFAR10_FILES = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR10_RECORD = 1 + 3 * 32 * 32
"""Bytes of an image: its label, then the planes of red, green and blue."""


@dataclass(frozen=True)
class Cifar10Reader:
    """Reads the planes of an image."""

    def read(self, address: Address) -> bytes:
        """The three planes. Raises ``BadImageError``."""
        return read_address(address)

    def decode(self, content: bytes) -> Pixels:
        """(32, 32, 3) uint8. Raises ``BadImageError``."""
        if len(content) != CIFAR10_RECORD - 1:
            raise BadImageError(f"{len(content)} bytes where {CIFAR10_RECORD - 1} are expected")
        return np.ascontiguousarray(np.frombuffer(content, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))


class Cifar10Source:
    """A split of CIFAR-10, 32x32. folder: of the split's files. Raises ``DataError`` where one is damaged."""

    reader = Cifar10Reader()

    def __init__(self, folder: str, split: str) -> None:
        self._paths = [os.path.join(folder, name) for name in CIFAR10_FILES[split]]
        labels = [_labels(path) for path in self._paths]
        self._starts = np.cumsum([0, *map(len, labels)])
        self.name, self.classes = f"CIFAR-10 {split}", 10
        self.captions: list[list[str]] | None = None
        self.unusable: dict[int, str] = {}
        self.labels = [int(label) for label in np.concatenate(labels)]
        self.keys = [f"cifar10-{split}-{number:05d}" for number in range(len(self.labels))]

    def address(self, number: int) -> Address:
        """Where the planes of image ``number`` lie."""
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        record = number - int(self._starts[file])
        return Address(self._paths[file], record * CIFAR10_RECORD + 1, CIFAR10_RECORD - 1)

    def load(self, number: int) -> Pixels:
        """Image ``number``, (32, 32, 3) uint8. Raises ``DataError``."""
        return load_image(self, number)


def _labels(path: str) -> Pixels:
    """(images,) uint8."""
    size = os.path.getsize(path)
    if size == 0 or size % CIFAR10_RECORD:
        raise DataError(
            f"{path}: {size} bytes, not a multiple of {CIFAR10_RECORD} (an image of CIFAR-10's binary version): "
            "truncated or another file; unpack cifar-10-binary.tar.gz again"
        )
    labels = np.array(np.memmap(path, dtype=np.uint8, mode="r")[::CIFAR10_RECORD])
    if labels.max() > 9:
        raise DataError(f"{path}: a label of {labels.max()} where 0…9 are; unpack cifar-10-binary.tar.gz again")
    return labels
