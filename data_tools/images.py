"""Where images come from, and how they are cropped before they are encoded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.digits import digits_images
from uvit_dist.data.latents import MIRROR_SUFFIX
from uvit_dist.errors import DataError, MissingInputError

Pixels = NDArray[np.uint8]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def adm_crop(image: Image.Image, size: int) -> Pixels:
    """The centre crop of ADM (Dhariwal and Nichol 2021): halve with BOX while at least twice too large, then BICUBIC.

    image: any size. Returns (size, size, 3) uint8.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


class ImageSource(Protocol):
    """A fixed, ordered collection of labelled images.

    name: for provenance; classes: number of labels; keys, labels: of every image, in order.
    """

    name: str
    classes: int
    keys: list[str]
    labels: list[int]

    def load(self, number: int) -> Pixels:
        """Image ``number``, (H, W, 3) uint8. Raises ``DataError`` where it cannot be read."""
        ...


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 32x32."""

    def __init__(self) -> None:
        self._images, labels = digits_images()
        self.name, self.classes = "scikit-learn digits", 10
        self.keys = [f"digit-{number:04d}" for number in range(len(labels))]
        self.labels = [int(label) for label in labels]

    def load(self, number: int) -> Pixels:
        """Image ``number``, (32, 32, 3) uint8."""
        return self._images[number]


class FolderSource:
    """A folder with one folder of images for each class; a label is the index of its folder in sorted order.

    Raises ``MissingInputError`` where there is no such folder or no image in it.
    """

    def __init__(self, root: str, size: int, crop: str) -> None:
        self._size, self._crop, self.name = size, crop, Path(root).name
        if not Path(root).is_dir():
            raise MissingInputError(f"data.source {root}: no such folder; give 'digits' or a folder of class folders")
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
        self._paths = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not self._paths:
            raise MissingInputError(
                f"data.source {root}: no images ({', '.join(sorted(SUFFIXES))}) in folders of classes below it"
            )
        self.classes = len(folders)
        self.labels = [label for _, label in self._paths]
        self.keys = [f"{path.parent.name}/{path.stem}".replace(".", "_") for path, _ in self._paths]
        seen: dict[str, Path] = {}
        for (path, _), key in zip(self._paths, self.keys, strict=True):
            other = seen.setdefault(key.removesuffix(MIRROR_SUFFIX), path)
            if other != path:
                raise DataError(f"{other} and {path}: their keys would be the same ({key}); rename one of them")

    def load(self, number: int) -> Pixels:
        """Image ``number``, cropped: (size, size, 3) uint8. Raises ``DataError`` where it cannot be read."""
        path = self._paths[number][0]
        try:
            with Image.open(path) as image:
                pixels = adm_crop(image, self._size) if self._crop == "adm" else np.asarray(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as an image ({error}); mend or remove it") from None
        if pixels.shape != (self._size, self._size, 3):
            raise DataError(
                f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, data.image_size is {self._size}; "
                "set data.crop: adm"
            )
        return pixels


def open_source(source: str, size: int, crop: str) -> ImageSource:
    """The images that data.source names. size: pixels of a side after the crop.

    Raises ``MissingInputError``, ``DataError``.
    """
    if source != "digits":
        return FolderSource(source, size, crop)
    if size != 32 or crop != "none":
        raise DataError(f"data.source digits: images of 32 pixels; set data.image_size 32 (now {size}), data.crop none")
    return DigitsSource()


def source_fingerprint(source: ImageSource) -> str:
    """Hash of the keys and labels of a source, 16 hexadecimal digits: what a restarted job must find again."""
    text = "\n".join(f"{key} {label}" for key, label in zip(source.keys, source.labels, strict=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
