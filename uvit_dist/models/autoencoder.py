"""The autoencoder of latent diffusion: diffusers' `AutoencoderKL`, with official key names in and out.

Three kinds of weights are read, all from local paths and none through a hub: an official Stable Diffusion
`.pth` or `.safetensors`, a diffusers folder, and a diffusers-keyed `.safetensors` that holds its config.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import nn

from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.models.frozen import StateDict, read_state_dict, some_keys, true_fp32

OFFICIAL_NORM_GROUPS = 32
"""Groups of every GroupNorm in the official autoencoder; the shapes of the weights do not tell."""

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
"""Modules of the attention block: official name → diffusers name."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the folders that older versions of diffusers wrote (Stable Diffusion's own VAEs among them)."""

RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
"""Modules of the residual block: official name → diffusers name."""

REMEDY = (
    "set it to the local path of the official autoencoder_kl.pth or autoencoder_kl_ema.pth (about 335 MB each), which"
    " are in the folder stable-diffusion of the downloads that the README of github.com/baofff/U-ViT links to, or of"
    " any diffusers AutoencoderKL (a folder or .safetensors)"
)
"""What to do where there is no such file."""

_LINEAR_IN_DIFFUSERS = re.compile(r"\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight$")
_OLD_ATTENTION_KEY = re.compile(r"(\.attentions\.0\.)(query|key|value|proj_attn)\.")


class Autoencoder(nn.Module):
    """Images to moments of latents, and latents to images. Scaling and sampling are the caller's."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode_moments(self, images: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """quant_conv(encoder(x)): mean and unclamped logvar, in fp32 (neither autocast nor TF32), or bf16 autocast.

        images: (B, 3, H, W) in [-1, 1]. Returns (B, 2C, H/factor, W/factor), fp32.
        """
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
        with autocast, contextlib.nullcontext() if bf16 else true_fp32():
            hidden = self.vae.encoder(images.float())
            hidden = hidden if self.vae.quant_conv is None else self.vae.quant_conv(hidden)
        return hidden.float()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), near [-1, 1] but not clamped. z: (B, C, H/factor, W/factor), unscaled."""
        hidden = z if self.vae.post_quant_conv is None else self.vae.post_quant_conv(z)
        return self.vae.decoder(hidden)

    @property
    def latent_channels(self) -> int:
        """C, the channels of a latent; the moments have 2C."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """How many pixels of a side one latent stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all weights, by name."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def encoder_fingerprint(self) -> str:
        """`encoder_fingerprint` of these weights."""
        return encoder_fingerprint(self.vae.state_dict())


def load_autoencoder(path: str | Path) -> Autoencoder:
    """The autoencoder in a local file or folder (see the module), in fp32, frozen and in evaluation mode.

    Raises ``MissingInputError``, or ``DataError`` where the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(
            f"autoencoder {path}: no such file or folder; give the path of an official autoencoder_kl.pth or"
            " .safetensors, or of a diffusers AutoencoderKL folder"
        )
    config: dict[str, Any] | None
    if path.is_dir():
        config, weights = _read_folder(path)
    elif path.suffix == ".safetensors":
        config, weights = _read_safetensors(path)
    else:
        config, weights = None, read_state_dict(path, "autoencoder")
    if config is None:
        try:
            weights = from_official_keys(weights)
            config = _infer_config(weights)
        except DataError as error:
            raise DataError(f"autoencoder {path}: {error}") from error
    vae = _build(config, _modern_attention_keys(weights), path)
    return Autoencoder(vae).eval().requires_grad_(False)


def from_official_keys(sd: Mapping[str, torch.Tensor]) -> StateDict:
    """Official Stable Diffusion keys to diffusers keys; 1x1 attention convolutions (C, C, 1, 1) to (C, C)."""
    names = _module_names(_count(sd, r"^decoder\.up\.(\d+)\."), _count(sd, r"\.block\.(\d+)\."))
    return _modern_attention_keys(_rename(sd, names, "official Stable Diffusion autoencoder"))


def to_official_keys(sd: Mapping[str, torch.Tensor]) -> StateDict:
    """The inverse of `from_official_keys`: equal tensors under equal keys after a round trip, either way.

    Shapes: attention matrices (C, C) become (C, C, 1, 1).
    """
    sd = _modern_attention_keys(sd)
    levels = _count(sd, r"^decoder\.up_blocks\.(\d+)\.")
    names = _module_names(levels, _count(sd, r"_blocks\.\d+\.resnets\.(\d+)\."))
    shaped = {key: v[:, :, None, None] if _LINEAR_IN_DIFFUSERS.search(key) else v for key, v in sd.items()}
    return _rename(shaped, {new: old for old, new in names.items()}, "diffusers AutoencoderKL")


def encoder_fingerprint(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of what makes the moments: the tensors of encoder and quant_conv, and nothing else.

    Names (in diffusers' form, sorted), dtype, shape and bytes are hashed, so that the official and the
    diffusers form of the same weights have one fingerprint, and so have two that differ only in the decoder.
    Raises ``DataError`` where there is no encoder.
    """
    part = {key: value for key, value in state_dict.items() if key.startswith(("encoder.", "quant_conv."))}
    if not any(key.startswith("encoder.") for key in part):
        raise DataError(
            f"state dict with {some_keys(state_dict)}: no encoder.* among the keys; give that of an autoencoder"
        )
    if _is_official(part):
        names = _module_names(_count(part, r"^encoder\.down\.(\d+)\."), _count(part, r"\.block\.(\d+)\."))
        part = _rename(part, names, "official Stable Diffusion autoencoder")
    part = _modern_attention_keys(part)
    digest = hashlib.sha256()
    for key in sorted(part):
        value = part[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _module_names(levels: int, resnets: int) -> dict[str, str]:
    """Every module with weights of an autoencoder: official name → diffusers name (one to one).

    Official decoder levels count from the finest, diffusers' from the coarsest.
    """
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        for plain, new in {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}.items():
            names[f"{side}.{plain}"] = f"{side}.{new}"
        for plain, new in ATTENTION.items():
            names[f"{side}.mid.attn_1.{plain}"] = f"{side}.mid_block.attentions.0.{new}"
        for i in range(2):
            blocks[f"{side}.mid.block_{i + 1}"] = f"{side}.mid_block.resnets.{i}"
    for i in range(levels):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        names[f"encoder.down.{i}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        names[f"decoder.up.{i}.upsample.conv"] = f"{up}.upsamplers.0.conv"
        for j in range(resnets):
            blocks[f"encoder.down.{i}.block.{j}"] = f"{down}.resnets.{j}"
            blocks[f"decoder.up.{i}.block.{j}"] = f"{up}.resnets.{j}"
    for block, new_block in blocks.items():
        names |= {f"{block}.{plain}": f"{new_block}.{new}" for plain, new in RESNET.items()}
    return names


def _rename(sd: Mapping[str, torch.Tensor], names: Mapping[str, str], kind: str) -> StateDict:
    renamed: StateDict = {}
    unknown = []
    for key, value in sd.items():
        module, _, leaf = key.rpartition(".")
        if module in names and leaf in ("weight", "bias"):
            renamed[f"{names[module]}.{leaf}"] = value
        else:
            unknown.append(key)
    if unknown or not renamed:
        raise DataError(
            f"state dict with {some_keys(unknown)}: not in the key names of the {kind};"
            " give a bare state dict of that form (no wrapper, no prefix, no optimizer)"
        )
    return renamed


def _modern_attention_keys(sd: Mapping[str, torch.Tensor]) -> StateDict:
    """Old diffusers attention names to the present ones, with weights (C, C); other keys as they are."""
    modern: StateDict = {}
    for key, value in sd.items():
        new = _OLD_ATTENTION_KEY.sub(lambda found: f"{found[1]}{OLD_ATTENTION[found[2]]}.", key)
        modern[new] = value.flatten(1) if _LINEAR_IN_DIFFUSERS.search(new) and value.ndim == 4 else value
    return modern


def _is_official(sd: Mapping[str, torch.Tensor]) -> bool:
    return any(key.startswith(("encoder.mid.", "decoder.mid.")) for key in sd)


def _count(sd: Mapping[str, torch.Tensor], pattern: str) -> int:
    """1 + the largest number that the pattern's group takes among the keys."""
    found = (re.search(pattern, key) for key in sd)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _infer_config(sd: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The architecture that the shapes of an official state dict (in diffusers keys) belong to."""
    levels = _count(sd, r"^encoder\.down_blocks\.(\d+)\.")
    try:
        widths = [len(sd[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)]
        latent_channels = sd["post_quant_conv.weight"].shape[1]
        in_channels = sd["encoder.conv_in.weight"].shape[1]
        out_channels = sd["decoder.conv_out.weight"].shape[0]
    except KeyError as error:
        raise DataError(
            f"no {error.args[0]} (diffusers' name) among the weights, and all are needed; give the whole file"
        ) from error
    if any(width % OFFICIAL_NORM_GROUPS for width in widths):
        raise DataError(
            f"widths {widths}: norms of the official form have {OFFICIAL_NORM_GROUPS} groups, so widths"
            " must be multiples of that; give other autoencoders in diffusers' form, with their config"
        )
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": _count(sd, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": latent_channels,
        "norm_num_groups": OFFICIAL_NORM_GROUPS,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in sd,
    }


def _build(config: Mapping[str, Any], weights: StateDict, path: Path) -> AutoencoderKL:
    """The network on the meta device, then the weights put in its place: nothing is initialised in vain."""
    name = config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise DataError(f"autoencoder {path}: its config is of a {name}; give one of an AutoencoderKL")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(**settings)
        vae.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise DataError(
            f"autoencoder {path}: weights and architecture disagree ({first});"
            " give weights and config that belong together, whole"
        ) from error
    return vae


def _read_folder(path: Path) -> tuple[dict[str, Any], StateDict]:
    """config.json and weights of a diffusers folder; the full-precision file where there are several."""
    config = path / "config.json"
    files = sorted(path.glob("*.safetensors"))
    if not config.is_file() or not files:
        raise MissingInputError(
            f"autoencoder {path}: a diffusers folder holds config.json and a .safetensors file, and here is"
            f" {', '.join(sorted(p.name for p in path.iterdir())) or 'nothing'}; give the VAE's whole folder"
        )
    preferred = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"]
    if not preferred and len(files) > 1:
        raise DataError(
            f"autoencoder {path}: {', '.join(file.name for file in files)} and no"
            " diffusion_pytorch_model.safetensors among them; leave one"
        )
    return _parse_config(config.read_text(encoding="utf-8"), config), _tensors((preferred or files)[0])[1]


def _read_safetensors(path: Path) -> tuple[dict[str, Any] | None, StateDict]:
    """Config (None for the official form, which needs none) and weights of one file."""
    metadata, weights = _tensors(path)
    if "config" in metadata:
        return _parse_config(metadata["config"], path), weights
    if not _is_official(weights) and any(".mid_block." in key for key in weights):
        raise DataError(
            f"autoencoder {path}: key names of diffusers, and no config in the file's metadata;"
            " give the diffusers folder with its config.json instead"
        )
    return None, weights


def _tensors(path: Path) -> tuple[dict[str, str], StateDict]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"autoencoder {path}: not a whole safetensors file ({error}); copy it again") from error


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"autoencoder {path}: its config is not JSON ({error}); give the whole file") from error
    if not isinstance(config, dict):
        raise DataError(
            f"autoencoder {path}: its config is a {type(config).__name__}, and an object is needed; give the whole file"
        )
    return config
