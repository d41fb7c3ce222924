"""The text encoder: CLIP's text tower and tokenizer as open_clip has them, with the contexts of Hugging Face's.

U-ViT attends to all 77 tokens of a context, padding included, and its text systems were trained on contexts that
Hugging Face's ``CLIPTokenizer`` padded with the end token. open_clip pads with 0, which is also the token of "!"
within a longer run of signs; here no token but padding becomes the end token.

Weights are read from local paths and never through a hub, in open_clip's or Hugging Face's key names. They must be of
a tower that was trained with QuickGELU (OpenAI's): a file alone does not tell, so only a config.json is checked.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.models.frozen import StateDict, fingerprint, load_strictly, read_state_dict, some_keys, true_fp32

START_TOKEN, END_TOKEN, VOCABULARY = 49406, 49407, 49408
"""Of CLIP's tokenizer. The end token is also the padding."""

HEAD_WIDTH = 64
"""Width of a head in all of CLIP's own towers; the shapes of the weights do not tell."""

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a Hugging Face folder, the preferred one first."""

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
    "set text.encoder to the local path of the weights of CLIP ViT-L/14: model.safetensors of Hugging Face's"
    " openai/clip-vit-large-patch14, or open_clip's ViT-L-14-quickgelu, pretrained openai (open_clip_model.safetensors"
    " of Hugging Face's timm/vit_large_patch14_clip_224.openai)"
)

_BLOCK_KEY = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_NOT_OF_THE_TOWER = re.compile(
    r"visual\.|vision_model\.|visual_projection\.|text_projection(\.weight)?$|logit_scale$|logit_bias$"
    r"|attn_mask$|(input_resolution|context_length|vocab_size)$|embeddings\.position_ids$"
)


class TextEncoder(nn.Module):
    """Captions to contexts. Which contexts are replaced by the empty caption's is the caller's."""

    def __init__(self, tower: TextTransformer) -> None:
        super().__init__()
        self.tower = tower
        self._tokenizer = SimpleTokenizer()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokens (B, length) int64: start, at most length - 2 of the caption, end, and the end again as padding.

        Source: ``CLIPTokenizer`` with ``padding="max_length", truncation=True``. Raises ``TypeError`` for a bare str.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions {captions!r}: a sequence of captions is needed; put the one caption in a list")
        tokens = torch.full((len(captions), self.length), END_TOKEN, dtype=torch.int64)
        for row, caption in zip(tokens, captions, strict=True):
            ids = [START_TOKEN, *self._tokenizer.encode(caption)[: self.length - 2]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Contexts (B, length, width) float32, always computed in fp32 (neither autocast nor TF32).

        The hidden states of all tokens after the last layer norm, without the projection: ``last_hidden_state`` of
        Hugging Face's ``CLIPTextModel``. Raises ``TypeError`` for a bare str.
        """
        tokens = self.tokenize(captions).to(self.tower.positional_embedding.device)
        with torch.autocast(tokens.device.type, enabled=False), true_fp32():
            return self.tower(tokens)

    @property
    def width(self) -> int:
        """Width of a token: 768 in ViT-L/14."""
        return int(self.tower.positional_embedding.shape[1])

    @property
    def length(self) -> int:
        """Tokens of a context: 77 in CLIP."""
        return int(self.tower.positional_embedding.shape[0])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all weights, by open_clip's names, whichever form they were read from."""
        return fingerprint(self.tower.state_dict())


def load_text_encoder(path: str | Path) -> TextEncoder:
    """The text encoder in a local file or folder (see the module), in fp32, frozen and in evaluation mode.

    A file (.safetensors, or a state dict in .pt, .pth or .bin) holds a text tower alone or a whole CLIP, whose other
    weights are ignored; a folder is Hugging Face's. The architecture is that of the shapes.
    Raises ``MissingInputError``, or ``DataError`` where the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"text encoder {path}: no such file or folder; {REMEDY}")
    file, config = _open_folder(path) if path.is_dir() else (path, {})
    if _is_program(file):
        raise DataError(
            f"text encoder {file}: a TorchScript archive (as OpenAI's own ViT-L-14.pt), which is a program, and only"
            f" plain tensors are read; {REMEDY}"
        )
    weights = _text_tower(read_state_dict(file, "text encoder"), file)
    tower = _build(weights, config, file)
    load_strictly(tower, weights, f"text encoder {file}")
    return TextEncoder(tower).eval().requires_grad_(False)


def _open_folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """File of weights and the text tower's config (empty where there is none) of a Hugging Face folder."""
    files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not files:
        held = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise MissingInputError(
            f"text encoder {path}: a Hugging Face folder holds {' or '.join(FOLDER_FILES)}, and here is {held};"
            " give the whole folder, or the file of the weights itself"
        )
    if not (path / "config.json").is_file():
        return files[0], {}
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
    return files[0], config


def _is_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _text_tower(weights: StateDict, path: Path) -> StateDict:
    """The text tower's weights under open_clip's names."""
    for form, prefixes in (("embeddings.", ("text_model.", "")), ("", ("text.", ""))):
        for prefix in prefixes:
            if f"{prefix}{form}token_embedding.weight" in weights:
                tower = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
                tower = {key: value for key, value in tower.items() if not _NOT_OF_THE_TOWER.match(key)}
                return _from_hugging_face_keys(tower, path) if form else tower
    raise DataError(f"text encoder {path}: holds {some_keys(weights)}, and no text tower of a CLIP; {REMEDY}")


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


def _build(weights: StateDict, config: Mapping[str, Any], path: Path) -> TextTransformer:
    """The tower that the shapes belong to, its parameters on the meta device, its causal mask not."""
    try:
        vocabulary = len(weights["token_embedding.weight"])
        length, width = weights["positional_embedding"].shape
        hidden = len(weights["transformer.resblocks.0.mlp.c_fc.weight"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"text encoder {path}: weights of the text tower (in open_clip's names) are missing or misshapen ({error});"
            " give the whole file"
        ) from error
    heads = config.get("num_attention_heads", max(1, width // HEAD_WIDTH))
    blocks = (re.match(r"transformer\.resblocks\.(\d+)\.", key) for key in weights)
    if vocabulary != VOCABULARY or width % heads:
        raise DataError(
            f"text encoder {path}: {vocabulary} tokens, width {width}, {heads} heads; CLIP's tokenizer has"
            f" {VOCABULARY} tokens, and heads must divide the width; {REMEDY}"
        )
    with torch.device("meta"):
        tower = TextTransformer(
            context_length=length,
            vocab_size=vocabulary,
            width=width,
            heads=heads,
            layers=1 + max(int(block[1]) for block in blocks if block),
            mlp_ratio=(hidden + 0.5) / width,  # open_clip truncates ratio times width
            pool_type="none",
            proj_type="none",
            act_layer=QuickGELU,
        )
    tower.attn_mask = tower.build_causal_mask()
    return tower
