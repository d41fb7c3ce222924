"""Files of weights of text towers, read under open_clip's names whichever form they are in."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.models.frozen import StateDict, read_state_dict, some_keys

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a Hugging Face folder, the preferred one first."""

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", *FOLDER_FILES)
"""Files of weights in a folder of open_clip's, the preferred one first."""

HUGGING_FACE_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
"""Weights outside the blocks: Hugging Face's key → open_clip's."""

HUGGING_FACE_MODULES = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Modules of a block, other than the projections to q, k and v: Hugging Face's name → open_clip's."""

REMEDY = (
    "set text.encoder to the local path of the weights of CLIP ViT-L/14 (about 1.7 GB): model.safetensors of Hugging"
    " Face's openai/clip-vit-large-patch14, or open_clip's ViT-L-14-quickgelu, pretrained openai"
    " (open_clip_model.safetensors of Hugging Face's timm/vit_large_patch14_clip_224.openai)"
)

_BLOCK_KEY = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_NOT_OF_THE_TOWER = re.compile(
    r"visual\.|vision_model\.|visual_projection\.|text_projection(\.weight|\.bias)?$|logit_scale$|logit_bias$"
    r"|attn_mask$|(input_resolution|context_length|vocab_size)$|embeddings\.position_ids$"
)
_NOT_OF_A_HUGGING_FACE_TOWER = re.compile(
    r"visual\.|proj\.|logit_scale$|logit_bias$|transformer\.embeddings\.position_ids$"
)


def weights_file(path: Path, names: Sequence[str] = OPEN_CLIP_FILES, kind: str = "open_clip") -> Path:
    """The file of weights: ``path`` itself, or the first of ``names`` in the folder. Raises ``MissingInputError``."""
    if not path.is_dir():
        return path
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise MissingInputError(
            f"text encoder {path}: a folder of {kind}'s holds {' or '.join(names)}, and here is {contents(path)};"
            " give the whole folder, or the file of the weights itself"
        )
    return files[0]


def contents(folder: Path) -> str:
    """What a folder holds, for an error."""
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


def clip_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """File of weights and, of a Hugging Face folder, the text tower's config (else empty).

    Raises ``MissingInputError``, or ``DataError`` where that config is not of a tower with QuickGELU.
    """
    file = weights_file(path, FOLDER_FILES, "Hugging Face")
    if file == path or not (path / "config.json").is_file():
        return file, {}
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        activation = config.get("hidden_act", "quick_gelu")
    except (json.JSONDecodeError, AttributeError) as error:
        raise DataError(f"text encoder {path / 'config.json'}: not a JSON object ({error}); copy it again") from error
    if activation != "quick_gelu":
        raise DataError(
            f"text encoder {path}: its hidden_act is {activation}, and U-ViT's contexts are of a tower with quick_gelu;"
            f" {REMEDY}"
        )
    return file, config


def read_tower(file: Path, remedy: str = REMEDY, *, hugging_face: bool = False) -> StateDict:
    """The text tower's weights (any shapes, as stored) in a file of it alone or of a whole CLIP.

    Under the names of open_clip's ``TextTransformer`` or, with ``hugging_face``, ``HFTextEncoder``; without the
    projection. Raises ``DataError``.
    """
    if _is_program(file):
        raise DataError(
            f"text encoder {file}: a TorchScript archive (as OpenAI's own ViT-L-14.pt), which is a program, and only"
            f" plain tensors are read; {remedy}"
        )
    weights = read_state_dict(file, "text encoder")
    tower = _hugging_face_tower(weights) if hugging_face else _text_tower(weights, file)
    if not tower:
        raise DataError(f"text encoder {file}: holds {some_keys(weights)}, and no text tower of a CLIP; {remedy}")
    return tower


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _text_tower(weights: StateDict, path: Path) -> StateDict:
    """None where there is no tower in them."""
    for form, prefixes in (("embeddings.", ("text_model.", "")), ("", ("text.", ""))):
        for prefix in prefixes:
            if f"{prefix}{form}token_embedding.weight" in weights:
                tower = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
                tower = {key: value for key, value in tower.items() if not _NOT_OF_THE_TOWER.match(key)}
                return _from_hugging_face_keys(tower, path) if form else tower
    return {}


def _hugging_face_tower(weights: StateDict) -> StateDict:
    """None where there is no tower in them. A whole CLIP has the prefix."""
    prefix = "text." if any(key.startswith("text.") for key in weights) else ""
    tower = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not any(key.startswith("transformer.") for key in tower):
        return {}
    return {key: value for key, value in tower.items() if not _NOT_OF_A_HUGGING_FACE_TOWER.match(key)}


def _from_hugging_face_keys(weights: StateDict, path: Path) -> StateDict:
    """Keys that have no name in open_clip stay as they are, for the loading to refuse."""
    renamed: StateDict = {}
    for key, value in weights.items():
        block = _BLOCK_KEY.fullmatch(key)
        if block is None:
            renamed[HUGGING_FACE_NAMES.get(key, key)] = value
            continue
        layer, module, kind = block.groups()
        ours = f"transformer.resblocks.{layer}"
        if module in HUGGING_FACE_MODULES:
            renamed[f"{ours}.{HUGGING_FACE_MODULES[module]}.{kind}"] = value
        elif module == "self_attn.q_proj":
            parts = [weights.get(f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}") for name in "qkv"]
            if any(part is None for part in parts):
                raise DataError(f"text encoder {path}: no k_proj or v_proj beside {key}; give the whole file")
            renamed[f"{ours}.attn.in_proj_{kind}"] = torch.cat([part for part in parts if part is not None])
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            renamed[key] = value
    return renamed
