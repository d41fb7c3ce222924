"""Feature spaces in which generated images are scored. Each is called what it is; FID is Inception's alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from uvit_dist.scores.kinds import PIXELS


class Extractor(Protocol):
    """Images to features of one or more kinds, each what some score is made of."""

    def __call__(self, images: Tensor, texts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Kind → features (B, D), floating, of images (B, 3, H, W) uint8. texts: what the images were asked for."""
        ...


def digits_pixels_8x8(images: Tensor, texts: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Grey levels in [-1, 1], averaged over 4x4 boxes: scikit-learn's own resolution of the digits.

    images: (B, 3, 32, 32) uint8. Features (B, 64) float64.
    """
    grey = images.to(torch.float64).mean(dim=1, keepdim=True) / 127.5 - 1.0
    return {PIXELS: avg_pool2d(grey, 4).flatten(1)}


def pixels_8x8(images: Tensor, texts: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Colours in [-1, 1], averaged over boxes to 8x8 pixels: crude, but it needs no weights.

    images: (B, 3, H, W) uint8, H and W multiples of 8. Features (B, 192) float64.
    """
    return {PIXELS: adaptive_avg_pool2d(images.to(torch.float64) / 127.5 - 1.0, 8).flatten(1)}


EXTRACTORS: dict[str, Extractor] = {"digits_pixels_8x8": digits_pixels_8x8, "pixels_8x8": pixels_8x8}
"""The feature spaces that need no weights, by name."""


def to_uint8(images: Tensor) -> Tensor:
    """What an image writer stores of the network's range: clamp to [0, 1], times 255, plus 0.5, truncated.

    images: (B, ...), floating, in [-1, 1]. The same shape, uint8. One image at a time, which stays in a CPU's cache.
    """
    out = torch.empty_like(images, dtype=torch.uint8)
    for image, rounded in zip(_parts(images), _parts(out), strict=True):
        rounded.copy_((image + 1.0).div_(2.0).clamp_(0.0, 1.0).mul_(255.0).add_(0.5))
    return out


def to_unit_range(images: Tensor) -> Tensor:
    """Images (B, ...) uint8 as float32 in [0, 1], as torchvision's ``ToTensor`` has them."""
    out = torch.empty_like(images, dtype=torch.float32)
    for image, scaled in zip(_parts(images), _parts(out), strict=True):
        scaled.copy_(image).div_(255)
    return out


def _parts(images: Tensor) -> Sequence[Tensor]:
    """One by one on a CPU, where a pass over all would wait for memory; the whole elsewhere."""
    return images.split(1) if images.device.type == "cpu" else (images,)
