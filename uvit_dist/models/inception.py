"""Inception features, in which FID is defined: the network and the weights of pytorch-fid, from a local file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import inception_v3

from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.models.frozen import load_strictly, read_state_dict, true_fp32

FEATURES = 2048
"""Features of an image."""

CLASSES = 1008
"""Outputs of the classifier in the file of weights; it is not used."""

SIDE = 299
"""Height and width that images are resized to, in pixels."""

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""Name of the published file; its last 8 digits begin the SHA-256 of its contents."""

REMEDY = (
    f"set evaluate.inception to the local path of {WEIGHTS} (about 91 MB), which is under the release fid_weights of"
    " github.com/mseitzer/pytorch-fid"
)

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8})\.\w+$")


class Inception(nn.Module):
    """Images to the features that FID compares."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def features(self, images: Tensor) -> Tensor:
        """Features (B, 2048) float64 of images (B, 3, H, W) uint8, always in fp32 (neither autocast nor TF32).

        Source: pytorch-fid 0.3.0, ``get_activations`` with 2048 dimensions. Raises ``TypeError`` for other dtypes.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images of {images.dtype}: must be uint8 in [0, 255]; round them with features.to_uint8")
        with torch.autocast(images.device.type, enabled=False), true_fp32():
            scaled = interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
            return self.network(2 * scaled - 1).double()


def load_inception(path: str | Path) -> Inception:
    """The network with the weights of a local file, in fp32, frozen and in evaluation mode.

    The file is pytorch-fid's (`WEIGHTS`) or has its keys. If its name ends in 8 hexadecimal digits (as torch.hub's
    names do), its SHA-256 must begin with them.
    Raises ``MissingInputError``, or ``DataError`` where the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"Inception weights {path}: no such file; {REMEDY}")
    stated = _HASH_IN_NAME.search(path.name)
    if stated is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(stated[1]):
            raise DataError(
                f"Inception weights {path}: its SHA-256 begins with {found[:8]}, and by its name with {stated[1]};"
                " copy it again"
            )
    network = _network()
    load_strictly(network, read_state_dict(path, "Inception weights"), f"Inception weights {path}")
    network.fc = nn.Identity()
    return Inception(network).eval().requires_grad_(False)


def _network() -> nn.Module:
    """torchvision's Inception v3 with the blocks that pytorch-fid replaces, on the meta device."""
    with torch.device("meta"):
        network = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
        for name, (inputs, pooled) in {"Mixed_5b": (192, 32), "Mixed_5c": (256, 64), "Mixed_5d": (288, 64)}.items():
            setattr(network, name, FIDInceptionA(inputs, pool_features=pooled))
        for name, channels in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}.items():
            setattr(network, name, FIDInceptionC(768, channels_7x7=channels))
        network.Mixed_7b = FIDInceptionE_1(1280)
        network.Mixed_7c = FIDInceptionE_2(2048)
    return network
