"""The pixels of a Pillow image where they lie: numpy's own way, ``asarray``, copies them twice.

By the Arrow C data interface (https://arrow.apache.org/docs/format/CDataInterface.html), which Pillow has since 11.2.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class _ArrowArray(ctypes.Structure):
    """``struct ArrowArray``."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Lent:
    """What numpy sees as an array (H, W, 4), and what keeps its memory for as long as the array is there."""

    def __init__(self, image: Image.Image) -> None:
        self.kept = image.__arrow_c_array__()
        (pixels,) = _arrays(self.kept[1])
        if pixels.length != 4 * image.height * image.width:
            raise ValueError(f"{pixels.length} bytes, {image.width}x{image.height} pixels of 4 bytes expected")
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (image.height, image.width, 4),
            "data": (pixels.buffers[1], True),
        }


def _arrays(capsule: Any) -> list[_ArrowArray]:
    """The children of an array: of an image, one, of all its bytes."""
    array = ctypes.cast(_pointer_of(capsule, b"arrow_array"), ctypes.POINTER(_ArrowArray)).contents
    return [array.children[number].contents for number in range(array.n_children)]


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels of an RGB image, (H, W, 4) uint8, to be read alone, the fourth channel without meaning.

    (H, W, 3), a copy, where the image is of several pieces (16 MiB and more), or Pillow is older.
    """
    assert image.mode == "RGB"
    try:
        return np.asarray(_Lent(image))
    except (AttributeError, ValueError):
        return np.asarray(image)
