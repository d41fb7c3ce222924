"""How images are cropped before they are encoded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools import resample
from data_tools.pillow_memory import rgb_pixels

Pixels = NDArray[np.uint8]
TALL = 1.9
"""Height over width up to which Pillow surely resizes columns before rows; from 2 on, Pillow 13 may not."""
CELEBA_ROWS, CELEBA_COLUMNS = (57, 185), (25, 153)
"""128 x 128 pixels about the face in CelebA's aligned images of 178 x 218."""


def _rgb(image: Image.Image) -> Image.Image:
    """``convert("RGB")``, without the copy that it makes of what is RGB."""
    return image if image.mode == "RGB" else image.convert("RGB")


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


def fast_adm_crop(image: Image.Image | Pixels, size: int) -> Pixels:
    """``adm_crop``, byte for byte, of an image or its pixels (H, W, 3). Returns (size, size, 3) uint8.

    Exact since it has Pillow's coefficients and rounding, in Pillow's order, columns before rows, after each halving
    too; faster since it makes what the crop keeps and what that comes from, and by wider instructions. Images higher
    than TALL are Pillow's to resize: it may take their rows first.
    """
    width, height = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
    sizes = [(width, height)]
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    if not resample.agrees_with_pillow() or any(h > TALL * w for w, h in sizes):
        return adm_crop(Image.fromarray(image) if isinstance(image, np.ndarray) else image, size)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    steps = [*((halved, resample.BOX) for halved in sizes[1:]), ((width, height), resample.BICUBIC)]
    pixels = image if isinstance(image, np.ndarray) else rgb_pixels(_rgb(image))
    return resample.resample(pixels, steps, (width - size) // 2, (height - size) // 2, size)


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


def fast_coco_crop(image: Image.Image | Pixels, size: int) -> Pixels:
    """``coco_crop``, byte for byte, of an image or its pixels (H, W, 3). Returns (size, size, 3) uint8."""
    if not resample.agrees_with_pillow():
        return coco_crop(Image.fromarray(image) if isinstance(image, np.ndarray) else image, size)
    pixels = image if isinstance(image, np.ndarray) else rgb_pixels(_rgb(image))
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    return resample.resample(square, [((size, size), resample.LANCZOS)], 0, 0, size)


def _no_crop(image: Image.Image, size: int) -> Pixels:
    if image.size != (size, size):
        raise ValueError(
            f"{image.width}x{image.height} pixels, data.image_size is {size} and data.crop is none; set data.crop: adm"
        )
    return np.asarray(image.convert("RGB"))


CROPS: dict[str, Callable[[Image.Image, int], Pixels]] = {
    "none": _no_crop,
    "adm": fast_adm_crop,
    "celeba": celeba_crop,
    "coco": fast_coco_crop,
}
