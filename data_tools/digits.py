"""scikit-learn's 1,797 handwritten digits as 32x32 pictures: the data of the demo, with no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data_tools.images import Address, Pixels, load_image

GREY_LEVELS = 16
"""scikit-learn's digits are 8x8 integers in 0..16."""

FACTOR = 4
"""A digit of 8x8 becomes a picture of 32x32."""


def digits_images(refinements: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (1797, 32, 32, 3) uint8 with three equal channels, and labels (1797,) int64 in 0..9.

    A bicubic enlargement blurs the strokes (averaging 4x4 boxes misses the digit by up to 4.5 grey levels of
    16), so what the boxes miss is enlarged and added again, `refinements` times, within 0..255. With the
    default, `box_average` gives the digit back to 0.04 grey levels on average and 0.64 at most; rounded,
    99.97% of the pixels are equal to the original's.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    wanted = digits.images * (255.0 / GREY_LEVELS)
    pictures = np.clip(_enlarge(wanted), 0, 255)
    for _ in range(refinements):
        pictures = np.clip(pictures + _enlarge(wanted - _box_average(pictures)), 0, 255)
    grey = np.rint(pictures).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64)


@cache
def _pictures() -> tuple[np.ndarray, np.ndarray]:
    return digits_images()


@dataclass(frozen=True)
class DigitsReader:
    """Makes the digits: an address is the number of one."""

    def read(self, address: Address) -> bytes:
        """The pixels of a digit."""
        return _pictures()[0][address.offset].tobytes()

    def decode(self, content: bytes) -> Pixels:
        """(32, 32, 3) uint8."""
        return np.frombuffer(content, np.uint8).reshape(32, 32, 3)


class DigitsSource:
    """scikit-learn's digits as a source of images."""

    reader = DigitsReader()

    def __init__(self) -> None:
        labels = _pictures()[1]
        self.name, self.classes = "scikit-learn digits", 10
        self.captions: list[list[str]] | None = None
        self.unusable: dict[int, str] = {}
        self.keys = [f"digit-{number:04d}" for number in range(len(labels))]
        self.labels = [int(label) for label in labels]

    def address(self, number: int) -> Address:
        """The number, for the reader."""
        return Address(self.name, number)

    def load(self, number: int) -> Pixels:
        """Image ``number``, (32, 32, 3) uint8."""
        return load_image(self, number)


def box_average(images: np.ndarray) -> np.ndarray:
    """Digits (N, 8, 8) float64 in 0..16: the mean of every 4x4 box. images: (N, 32, 32, 3) uint8."""
    return _box_average(images.astype(np.float64).mean(axis=3)) * (GREY_LEVELS / 255.0)


def _box_average(pictures: np.ndarray) -> np.ndarray:
    n, height, width = pictures.shape
    boxes = pictures.reshape(n, height // FACTOR, FACTOR, width // FACTOR, FACTOR)
    return boxes.mean(axis=(2, 4))


def _enlarge(pictures: np.ndarray) -> np.ndarray:
    """Pillow's bicubic enlargement of (N, h, w), as the matrix product it is."""
    rows, columns = (_enlargement(size) for size in pictures.shape[1:])
    return rows @ pictures @ columns.T


def _enlargement(size: int) -> np.ndarray:
    """The matrix (size * FACTOR, size) that enlarges a column of pixels: Pillow's unit vectors."""
    unit = Image.fromarray(np.eye(size, dtype=np.float32))
    return np.asarray(unit.resize((size, size * FACTOR), Image.Resampling.BICUBIC), dtype=np.float64)
