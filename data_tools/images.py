"""How images are cropped before they are encoded, what a source of them is, and reading them ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uvit_dist.errors import DataError

Pixels = NDArray[np.uint8]
Item = tuple[int, bool]
"""(number of the image in its source, mirrored)"""

CELEBA_ROWS, CELEBA_COLUMNS = (57, 185), (25, 153)
"""128 x 128 pixels about the face in CelebA's aligned images of 178 x 218."""

AHEAD = 8
"""Images read ahead by each thread."""


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


def celeba_crop(image: Image.Image, size: int) -> Pixels:
    """CELEBA_ROWS and CELEBA_COLUMNS, then Pillow's BILINEAR, which is torchvision's ``Resize`` of a PIL image.

    Returns (size, size, 3) uint8. Raises ``ValueError`` for an image smaller than the crop.
    """
    (top, bottom), (left, right) = CELEBA_ROWS, CELEBA_COLUMNS
    if image.width < right or image.height < bottom:
        raise ValueError(f"{image.width}x{image.height} pixels; data.crop celeba needs {right}x{bottom} or more")
    face = image.convert("RGB").crop((left, top, right, bottom))
    return np.asarray(face.resize((size, size), Image.Resampling.BILINEAR))


def coco_crop(image: Image.Image, size: int) -> Pixels:
    """The largest square about the centre, resized with LANCZOS. image: any size. Returns (size, size, 3) uint8."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _no_crop(image: Image.Image, size: int) -> Pixels:
    if image.size != (size, size):
        raise ValueError(
            f"{image.width}x{image.height} pixels, data.image_size is {size} and data.crop is none; set data.crop: adm"
        )
    return np.asarray(image.convert("RGB"))


CROPS: dict[str, Callable[[Image.Image, int], Pixels]] = {
    "none": _no_crop,
    "adm": adm_crop,
    "celeba": celeba_crop,
    "coco": coco_crop,
}


def read_image(path: str, size: int, crop: str) -> Pixels:
    """An image file, cropped: (size, size, 3) uint8. Raises ``DataError`` where it cannot be read or cropped."""
    try:
        with Image.open(path) as image:
            image.load()
            try:
                return CROPS[crop](image, size)
            except ValueError as error:
                raise DataError(f"{path}: {error}") from None
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); mend or remove it") from None


class ImageSource(Protocol):
    """A fixed, ordered collection of images.

    name: for provenance; classes: number of labels, 0: none; keys, labels (-1 where there is none), captions (none
    where images have none): of every image, in order.
    """

    name: str
    classes: int
    keys: list[str]
    labels: list[int]
    captions: list[list[str]] | None

    def load(self, number: int) -> Pixels:
        """Image ``number``, (H, W, 3) uint8; safe to call from several threads. Raises ``DataError``."""
        ...


def load_images(source: ImageSource, items: Iterable[Item], threads: int) -> Iterator[Pixels]:
    """The images in order, (H, W, 3) uint8 each, mirrored where asked, read ahead. Raises ``DataError``."""
    waiting: deque[Future[Pixels]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(_load, source, item))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _load(source: ImageSource, item: Item) -> Pixels:
    number, mirrored = item
    pixels = source.load(number)
    return pixels[:, ::-1] if mirrored else pixels


def source_fingerprint(source: ImageSource) -> str:
    """Hash of keys, labels and captions, 16 hexadecimal digits: what a restarted job must find again."""
    digest = hashlib.sha256()
    for number, (key, label) in enumerate(zip(source.keys, source.labels, strict=True)):
        captions = "" if source.captions is None else f" {source.captions[number]!r}"
        digest.update(f"{key} {label}{captions}\n".encode())
    return digest.hexdigest()[:16]
