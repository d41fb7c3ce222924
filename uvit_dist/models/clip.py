"""CLIP score: how well an image fits its caption, by open_clip's two towers, with weights from a local file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, normalize, resize

from uvit_dist.errors import MissingInputError
from uvit_dist.models.frozen import load_strictly, read_state_dict, true_fp32
from uvit_dist.models.text import tower_config
from uvit_dist.models.text_weights import weights_file
from uvit_dist.scores.kinds import CLIP

MODELS = {
    "ViT-L-14-quickgelu": "timm/vit_large_patch14_clip_224.openai",
    "ViT-B-32-quickgelu": "timm/vit_base_patch32_clip_224.openai",
}
"""open_clip's names of OpenAI's models → where Hugging Face has their weights, as open_clip_model.safetensors."""


class ClipScore(nn.Module):
    """100 times the cosine of the angle between the embeddings of an image and of its caption."""

    def __init__(self, network: open_clip.CLIP, tokenize: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.network, self._tokenize = network, tokenize
        settings = open_clip.get_model_preprocess_cfg(network)
        self._size, self._mean, self._std = settings["size"], list(settings["mean"]), list(settings["std"])
        linear = settings.get("interpolation") == "bilinear"
        self._interpolation = InterpolationMode.BILINEAR if linear else InterpolationMode.BICUBIC

    def forward(self, images: Tensor, texts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """{"clip": (B, 1) float32} of images (B, 3, H, W) uint8 and their captions, always in fp32.

        Source: Hessel et al. 2021, with the scale 100 that is usual for text-to-image models instead of 2.5.
        """
        assert texts is not None, "a CLIP score needs the captions"
        size = self._size if isinstance(self._size, int) else self._size[0]
        pixels = center_crop(resize(images, size, self._interpolation, antialias=True), [size, size])
        with torch.autocast(images.device.type, enabled=False), true_fp32():
            of_images = self.network.encode_image(
                normalize(pixels.float() / 255, self._mean, self._std), normalize=True
            )
            of_texts = self.network.encode_text(self._tokenize(list(texts)).to(images.device), normalize=True)
            return {CLIP: 100 * (of_images * of_texts).sum(1, keepdim=True)}


def load_clip(name: str, path: str | Path) -> ClipScore:
    """open_clip's model ``name`` with the weights of a local file or folder, in fp32, frozen, in evaluation mode.

    Raises ``ConfigError`` for a name that open_clip does not know, ``MissingInputError``, ``DataError``.
    """
    tower_config(name, "evaluate.clip_model")
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"evaluate.clip {path}: no such file or folder; {remedy(name)}")
    file = weights_file(path)
    network = open_clip.create_model(name, load_weights=False, precision="fp32", device="cpu")
    load_strictly(network, read_state_dict(file, "evaluate.clip"), f"evaluate.clip {file}")
    return ClipScore(network, open_clip.get_tokenizer(name)).eval().requires_grad_(False)


def remedy(name: str) -> str:
    """What to do where the weights of open_clip's model ``name`` are missing."""
    where = f" of Hugging Face's {MODELS[name]}" if name in MODELS else " of the model's page at Hugging Face"
    return (
        f"set evaluate.clip to the local path of the weights of open_clip's {name}: open_clip_model.safetensors{where}"
    )
