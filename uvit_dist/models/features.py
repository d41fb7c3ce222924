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

    images: any shape, floating, in [-1, 1]. The same shape, uint8.
    """
    return ((images + 1.0) / 2.0).clamp(0.0, 1.0).mul(255.0).add(0.5).to(torch.uint8)
