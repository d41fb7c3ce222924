"""The shard contract: what a record holds, and how moments become latents.

A shard is a tar file. A sample is two members, ``KEY.npy`` (moments: mean and logvar stacked, (2C, H, W), float16 or
float32, little endian, C order) and ``KEY.cls`` (the label in decimal); the key of a mirrored image ends in ``_m``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist.errors import DataError

VERSION = 1
MIRROR_SUFFIX = "_m"


@dataclass(frozen=True)
class Provenance:
    """Where the moments of an index come from; training refuses an index that contradicts its configuration.

    encoder_fingerprint: hash of the autoencoder's encoder and quant_conv; scale_factor: 1/std of the latents, which
    the stored moments are *not* multiplied by; image_size: pixels; moments_shape: (2C, H, W).
    """

    autoencoder: str
    encoder_fingerprint: str
    scale_factor: float
    source: str
    image_size: int
    crop: str
    mirror: bool
    moments_dtype: str
    moments_shape: tuple[int, int, int]
    classes: int
    samples: int
    version: int = VERSION

    @staticmethod
    def from_dict(record: dict[str, Any], origin: str) -> Provenance:
        """Read the provenance of an index. Raises ``DataError`` where it is of another version or incomplete."""
        if record.get("version") != VERSION:
            raise DataError(
                f"{origin}: version {record.get('version')!r} of the shard format; this program reads {VERSION}. "
                "Make the shards anew."
            )
        try:
            return Provenance(**{**record, "moments_shape": tuple(record["moments_shape"])})
        except (TypeError, KeyError) as error:
            raise DataError(f"{origin}: incomplete provenance ({error}); make the shards anew") from None


def encode_moments(moments: NDArray[Any]) -> tuple[bytes, int]:
    """Moments (2C, H, W) as the bytes of a .npy file, and the offset of the array's data in them."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(moments), version=(1, 0), allow_pickle=False)
    data = out.getvalue()
    return data, len(data) - moments.nbytes


def sample_latents(moments: Tensor, noise: Tensor, scale_factor: float) -> Tensor:
    """z = (mean + std * noise) * scale_factor, "High-Resolution Image Synthesis with Latent Diffusion Models", G.

    moments: (B, 2C, H, W), logvar clamped to [-30, 20]; noise: (B, C, H, W) float32. Returns (B, C, H, W) float32.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise) * scale_factor
