"""Files of images, from their bytes to cropped pixels; what cannot be used says why (docs/precompute_sources.md)."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data_tools.crops import CROPS, Pixels
from data_tools.images import Address, BadImageError
from uvit_dist import storage
from uvit_dist.errors import DataError, NoSuchFileError, UnavailableError

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is tried, whatever a file's name ends in. Others, such as EPS, would start programs."""

MAX_PIXELS = 2 * 89_478_485
"""Pillow's limit, beyond which it takes an image for a decompression bomb; here of a resized image, too."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image of each EXIF orientation upright."""

_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    NotImplementedError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise for damaged files."""


@dataclass(frozen=True)
class FileReader:
    """Reads files of images, or ranges of tars, local or behind URLs. size, crop: of the data section.

    exif_rotation: turn images as their EXIF orientation says.
    """

    size: int
    crop: str
    exif_rotation: bool = False

    def read(self, address: Address) -> bytes:
        """The bytes at an address. Raises ``BadImageError``, ``UnavailableError``, ``MissingInputError``."""
        return read_address(address)

    def decode(self, content: bytes) -> Pixels:
        """The image, cropped: (size, size, 3) uint8. Raises ``BadImageError``."""
        return decode_image(content, self.size, self.crop, self.exif_rotation)


def read_address(address: Address) -> bytes:
    """The bytes at an address.

    Raises ``BadImageError`` where there are none or too few, ``MissingInputError`` where access is refused,
    ``UnavailableError`` where a server does not answer, or a disk fails.
    """
    try:
        if address.size is None:
            content = storage.read_bytes(address.path)[address.offset :]
        else:
            content = storage.read_range(address.path, address.offset, address.size)
    except NoSuchFileError:
        raise BadImageError("missing") from None
    except DataError:
        raise BadImageError("truncated: shorter than when it was listed") from None
    except OSError as error:
        raise UnavailableError(
            f"{address.path}: cannot be read ({error.strerror or error}); see to the disk, and start again: nothing is "
            "lost"
        ) from None
    if not content:
        raise BadImageError("empty file")
    return content


def decode_image(content: bytes, size: int, crop: str, exif_rotation: bool = False) -> Pixels:
    """The first picture of an image's file, cropped: (size, size, 3) uint8. Raises ``BadImageError``.

    As the official code does, by Pillow's ``convert("RGB")``; but 16 bits are scaled to 8 where Pillow clips them.
    """
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            opened.load()
            image = _in_8_bits(opened)
            turn = _turn(opened) if exif_rotation else None
            if turn is not None:
                image = image.transpose(turn)
            _check_shape(image, size, crop)
            return _cropped(image, size, crop)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image, or its header is damaged") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {MAX_PIXELS:,} pixels: a decompression bomb") from None
    except MemoryError:
        raise BadImageError("takes more memory than there is") from None
    except _DAMAGE as error:
        text = " ".join(str(error).split())[:160] or type(error).__name__
        cut = "truncated" in text.lower() or isinstance(error, EOFError)
        raise BadImageError(f"{'truncated' if cut else 'damaged'} ({text})") from None


def _cropped(image: Image.Image, size: int, crop: str) -> Pixels:
    """Raises ``BadImageError`` with what the crop says of an image that it cannot take."""
    try:
        return CROPS[crop](image, size)
    except ValueError as error:
        raise BadImageError(str(error)) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF orientation asks for; EXIF that cannot be read asks for nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return None


def _silence_pillow() -> None:
    """Pillow warns of oddities in files whose outcome is documented here. Lasting: threads share the filters."""
    ours = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if ours not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The image, 16 bits scaled to 8. Raises ``BadImageError`` for values whose range is unknown."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(values.clip(0, 65535) * (255 / 65535)).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floating point" if image.mode == "F" else "32-bit integers"
        raise BadImageError(f"pixels are {kind}, whose range is unknown")
    return image


def _check_shape(image: Image.Image, size: int, crop: str) -> None:
    """Raises ``BadImageError`` where the crop would first blow the image up beyond all measure."""
    short, long = sorted(image.size)
    if crop == "adm" and size * size * long > MAX_PIXELS * short:
        raise BadImageError(
            f"{image.width}x{image.height} pixels: resized to a short side of {size}, more than {MAX_PIXELS:,} pixels"
        )
