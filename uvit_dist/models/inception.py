"""Inception features, in which FID is defined: the network and the weights of pytorch-fid, from a local file.

Two protocols share the weights and differ in how images come to 299 pixels. pytorch-fid's, which the U-ViT paper used,
takes pixel centres at half; ADM's evaluator and torch-fidelity resize as TensorFlow 1 does in the graph of the original
network, whose grid starts at the first pixel. FIDs of one are not to be compared with the other's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import Inception3, inception_v3

from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.models.features import to_unit_range
from uvit_dist.models.frozen import load_strictly, read_state_dict, true_fp32
from uvit_dist.scores.kinds import ADM_LOGITS, ADM_POOL, ADM_SPATIAL, POOL, WIDTHS

FEATURES, CLASSES = WIDTHS[POOL], WIDTHS[ADM_LOGITS]

SPATIAL_CHANNELS = 7
"""The first channels of the 1x1 convolution of Mixed_6d ("mixed_6/conv" of the original graph), 17x17 pixels each."""

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
    """Images to the features of the kinds asked for, of ``WIDTHS``. network: torchvision's, with its classifier."""

    def __init__(self, network: Inception3, kinds: Iterable[str] = (POOL,)) -> None:
        super().__init__()
        self.network, self.kinds, self.classifier = network, tuple(kinds), network.fc
        network.fc = nn.Identity()
        self._spatial = torch.empty(0)
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    def forward(self, images: Tensor, texts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Kind → features (B, D) float32 of images (B, 3, H, W) uint8, always in fp32 (neither autocast nor TF32).

        Sources: pytorch-fid 0.3.0, ``get_activations`` with 2048 dimensions; ADM's evaluations/evaluator.py, whose
        spatial features are in the order (y, x, channel). Raises ``TypeError`` for other dtypes.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images of {images.dtype}: must be uint8 in [0, 255]; round them with features.to_uint8")
        out: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False), true_fp32():
            if POOL in self.kinds:
                scaled = interpolate(to_unit_range(images), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
                out[POOL] = self.network(2 * scaled - 1)
            if set(self.kinds) - {POOL}:
                out[ADM_POOL] = self.network((resize_as_tensorflow_1(images.float(), SIDE) - 128) / 128)
                out[ADM_SPATIAL] = self._spatial.permute(0, 2, 3, 1).flatten(1)
                out[ADM_LOGITS] = out[ADM_POOL] @ self.classifier.weight.T
        return {kind: out[kind] for kind in self.kinds}


def resize_as_tensorflow_1(images: Tensor, side: int) -> Tensor:
    """Bilinear, neither aligned corners nor half-pixel centres nor smoothing: pixel i of the result is at i·H / side.

    images: (B, C, H, W) float32. Returns (B, C, side, side).
    """
    low, high, weight = _taps(images.shape[3], side, images.device)
    left, right = images[..., low], images[..., high]
    images = left + (right - left) * weight
    low, high, weight = _taps(images.shape[2], side, images.device)
    top, bottom = images[:, :, low], images[:, :, high]
    return top + (bottom - top) * weight[:, None]


def _taps(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of ``side`` places: the pixel before it, the one behind it, and the weight of the latter; (side,)."""
    places = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(size / side, dtype=torch.float32)
    low = places.long()
    return low, (low + 1).clamp_max(size - 1), places - low


def load_inception(path: str | Path, kinds: Iterable[str] = (POOL,)) -> Inception:
    """The network with the weights of a local file, in fp32, frozen and in evaluation mode.

    kinds: of features, of ``WIDTHS``. The file is pytorch-fid's (`WEIGHTS`) or has its keys. If its name ends in 8
    hexadecimal digits (as torch.hub's names do), its SHA-256 must begin with them.
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
    return Inception(network, kinds).eval().requires_grad_(False)


def _network() -> Inception3:
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
