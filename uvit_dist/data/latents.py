"""The shard contract: what a record holds, and how what is stored becomes what the network is trained on.

A shard is a tar file. A sample is ``KEY.cls`` (the label in decimal, -1: none) and ``KEY.npy``: the moments of a latent
(mean and logvar stacked, (2C, H, W), float16 or float32) or the pixels of an image ((3, H, W), uint8), little endian, C
order. The key of a mirrored image ends in ``_m``. A sample with captions also has ``KEY.json`` ({"captions": [...]})
and ``KEY.contexts.npy``, their text contexts (captions, length, width).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist.errors import DataError

VERSION = 2
MIRROR_SUFFIX = "_m"
UNKNOWN = "unknown"
"""The text encoder's hash in shards of contexts whose encoder was not at hand."""


@dataclass(frozen=True)
class Sample:
    """One sample as it goes into a shard. data: (2C, H, W) moments or (3, H, W) pixels; contexts: (n, L, D)."""

    key: str
    label: int
    data: NDArray[Any]
    captions: Sequence[str] = ()
    contexts: NDArray[Any] | None = None


@dataclass(frozen=True)
class TextProvenance:
    """Where the contexts of an index come from. shape: (length, width); empty_sha256: of the empty prompt's context."""

    encoder_fingerprint: str
    dtype: str
    shape: tuple[int, int]
    empty_sha256: str


@dataclass(frozen=True)
class Provenance:
    """Where the samples of an index come from; training refuses an index that contradicts its configuration.

    kind: what is stored; dtype, shape: of each. For moments, encoder_fingerprint: hash of the autoencoder's encoder and
    quant_conv; scale_factor: 1/std of the latents, which the stored moments are *not* multiplied by; mirror: whether
    mirror images are samples of their own. image_size: pixels; classes: number of labels, 0: none; class_counts:
    samples of each; split: part of the source.
    """

    kind: Literal["moments", "pixels"]
    dtype: str
    shape: tuple[int, int, int]
    source: str
    image_size: int
    crop: str
    mirror: bool
    classes: int
    samples: int
    class_counts: tuple[int, ...] = field(default=(), repr=False)
    autoencoder: str | None = None
    encoder_fingerprint: str | None = None
    scale_factor: float | None = None
    text: TextProvenance | None = None
    split: str = "train"
    version: int = VERSION

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of a sample's data, and of one of its contexts where there are any."""
        stored = [(self.shape, self.dtype)] + ([(self.text.shape, self.text.dtype)] if self.text else [])
        return tuple(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in stored)

    @staticmethod
    def from_dict(record: dict[str, Any], origin: str) -> Provenance:
        """Read the provenance of an index. Raises ``DataError`` where it is of another version or incomplete."""
        version = record.get("version") if isinstance(record, dict) else None
        if version != VERSION:
            raise DataError(
                f"{origin}: version {version!r} of the shard format; this program reads {VERSION}. "
                "Make the shards anew."
            )
        try:
            text = record["text"] and TextProvenance(**{**record["text"], "shape": tuple(record["text"]["shape"])})
            tuples = {name: tuple(record[name]) for name in ("shape", "class_counts")}
            return Provenance(**{**record, **tuples, "text": text})
        except (TypeError, KeyError) as error:
            raise DataError(f"{origin}: incomplete provenance ({error}); make the shards anew") from None


def check_same_text_encoder(found: dict[str, str | None]) -> None:
    """Contexts of two text encoders must not meet. found: what has contexts → the hash of its encoder.

    Raises ``DataError``.
    """
    known = {what: value for what, value in found.items() if value is not None and value != UNKNOWN}
    if len(set(known.values())) > 1:
        listed = "\n  ".join(f"{what}: {value[:16]}…" for what, value in known.items())
        raise DataError(f"contexts of different text encoders (hashes):\n  {listed}\nUse one encoder for all of them.")


def encode_array(array: NDArray[Any]) -> tuple[bytes, int]:
    """An array of any shape as the bytes of a .npy file, and the offset of its data in them."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    data = out.getvalue()
    return data, len(data) - array.nbytes


def pixels_to_x0(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """x0 = pixels/127.5 − 1, mirrored left to right where asked.

    pixels: (B, 3, H, W) uint8; mirrored: (B,) bool. Returns (B, 3, H, W) float32 in [-1, 1].
    """
    x0 = pixels.float() / 127.5 - 1.0
    return torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)


def sample_latents(moments: Tensor, noise: Tensor, scale_factor: float) -> Tensor:
    """z = (mean + std * noise) * scale_factor, "High-Resolution Image Synthesis with Latent Diffusion Models", G.

    moments: (B, 2C, H, W), logvar clamped to [-30, 20]; noise: (B, C, H, W) float32. Returns (B, C, H, W) float32.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise) * scale_factor
