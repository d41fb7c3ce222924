"""What a source of images is, and reading them ahead."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from PIL import Image

from data_tools.crops import CROPS, Pixels
from uvit_dist.errors import DataError

Item = tuple[int, bool]
"""(number of the image in its source, mirrored)"""

AHEAD = 8
"""Images read ahead by each thread."""


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
