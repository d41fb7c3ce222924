"""What a source of images is: keys and labels, where each image's bytes lie, and the reader that makes pixels of them.

Decode processes import this module and those of the readers: nothing heavier than Pillow and numpy.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from data_tools.crops import Pixels
from uvit_dist.errors import DataError

Item = tuple[int, bool]
"""(number of the image in its source, mirrored)"""

AHEAD = 8
"""Images read ahead by each thread."""


@dataclass(frozen=True)
class Address:
    """Where an image's bytes lie. path: of a file, or its URL; size: None: from the offset to the file's end."""

    path: str
    offset: int = 0
    size: int | None = None


class BadImageError(ValueError):
    """Why an image cannot be used: a short reason, without its path."""


class Reader(Protocol):
    """Makes pixels of what lies at an address. Small and picklable: sent to the processes that decode."""

    def read(self, address: Address) -> bytes:
        """The bytes of an image. Raises ``BadImageError``, ``UnavailableError``, ``MissingInputError``."""
        ...

    def decode(self, content: bytes) -> Pixels:
        """The image, cropped: (size, size, 3) uint8. Raises ``BadImageError``."""
        ...


class ImageSource(Protocol):
    """A fixed, ordered collection of images.

    name: for provenance; classes: number of labels, 0: none; keys, labels (-1 where there is none), captions (none
    where images have none): of every image, in order; unusable: number → why, of images that the listing alone shows
    to be of no use, which are left out.
    """

    name: str
    classes: int
    keys: list[str]
    labels: list[int]
    captions: list[list[str]] | None
    unusable: dict[int, str]

    @property
    def reader(self) -> Reader:
        """What reads and decodes the images."""
        ...

    def address(self, number: int) -> Address:
        """Where image ``number`` lies."""
        ...

    def load(self, number: int) -> Pixels:
        """Image ``number``, (size, size, 3) uint8; safe to call from several threads. Raises ``DataError``."""
        ...


def load_image(source: ImageSource, number: int) -> Pixels:
    """Image ``number``, read and decoded: (size, size, 3) uint8. Raises ``DataError`` with its path and the reason."""
    address = source.address(number)
    try:
        if number in source.unusable:
            raise BadImageError(source.unusable[number])
        return source.reader.decode(source.reader.read(address))
    except BadImageError as error:
        where = address.path if address.offset == 0 else f"{address.path} ({source.keys[number]})"
        raise DataError(f"{where}: unusable, mend or remove it ({error})") from None


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
