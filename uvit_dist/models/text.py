"""The text encoder: CLIP's text tower and tokenizer as open_clip has them, with the contexts of Hugging Face's.

U-ViT attends to all 77 tokens of a context, padding included, and its text systems were trained on contexts that
Hugging Face's ``CLIPTokenizer`` padded with the end token. open_clip pads with 0, which is also the token of "!"
within a longer run of signs; here no token but padding becomes the end token. The weights must be of a tower that was
trained with QuickGELU (OpenAI's): a file alone does not tell, so only a config.json is checked.

Any other tower of open_clip's is asked for by its name: its architecture, tokens and padding are then open_clip's own.

Weights, and the files that the towers and tokenizers of Hugging Face need, are read from local paths and never through
a hub.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.model import _build_text_tower
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.models.frozen import StateDict, fingerprint, load_strictly, true_fp32
from uvit_dist.models.text_weights import REMEDY, clip_file, contents, read_tower, weights_file

START_TOKEN, END_TOKEN, VOCABULARY = 49406, 49407, 49408
"""Of CLIP's tokenizer. The end token is also the padding."""

HEAD_WIDTH = 64
"""Width of a head in all of CLIP's own towers; the shapes of the weights do not tell."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
"""Files of Hugging Face's tokenizers; a folder has some of them."""

AFTER_THE_CONTEXT = {"pool_type", "proj_type", "proj_bias", "eos_id", "output_tokens", "hf_pooler_type", "hf_proj_type"}
WHERE_FILES_ARE = {"hf_model_name", "hf_tokenizer_name", "hf_model_pretrained"}
"""Settings of open_clip's text towers on which contexts do not depend, with those of ``AFTER_THE_CONTEXT``."""


class TextEncoder(nn.Module):
    """Captions to contexts. Which contexts are replaced by the empty caption's is the caller's.

    tokens_of: captions → tokens (B, length) int64, of numbers below ``vocabulary``; settings: what decides the contexts
    besides the weights.
    """

    def __init__(
        self,
        tower: TextTransformer | HFTextEncoder,
        tokens_of: Callable[[list[str]], Tensor],
        length: int,
        vocabulary: int,
        settings: str = "",
    ) -> None:
        super().__init__()
        self.tower, self.length, self._vocabulary = tower, length, vocabulary
        self._tokens_of, self._settings = tokens_of, settings

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokens (B, length) int64, cut and padded as the tower was trained.

        Raises ``TypeError`` for a bare str, ``DataError`` where the tokenizer is not the tower's.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions {captions!r}: a sequence of captions is needed; put the one caption in a list")
        tokens = self._tokens_of(list(captions))
        if tokens.numel() and int(tokens.max()) >= self._vocabulary:
            raise DataError(
                f"text.tokenizer: gives token {int(tokens.max())}, and the tower has {self._vocabulary} tokens;"
                " give the folder of the tower's own tokenizer"
            )
        return tokens

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Contexts (B, length, width) float32, always computed in fp32 (neither autocast nor TF32).

        The hidden states of all tokens after the last layer norm, without pooling and projection, as
        ``last_hidden_state`` of Hugging Face's models. Raises as ``tokenize``.
        """
        tokens = self.tokenize(captions).to(next(self.tower.parameters()).device)
        with torch.autocast(tokens.device.type, enabled=False), true_fp32():
            return _hidden_states(self.tower, tokens)

    @property
    def width(self) -> int:
        """Width of a token: 768 in ViT-L/14."""
        return int(self.tower.config.hidden_size if isinstance(self.tower, HFTextEncoder) else self.tower.width)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all weights, by open_clip's names, whichever form they were read from.

        And, of a tower that was asked for by its name, of its settings and its tokenizer.
        """
        weights = fingerprint(self.tower.state_dict())
        return hashlib.sha256(f"{self._settings}\n{weights}".encode()).hexdigest() if self._settings else weights


def load_text_encoder(path: str | Path) -> TextEncoder:
    """The text encoder in a local file or folder (see the module), in fp32, frozen and in evaluation mode.

    A file (.safetensors, or a state dict in .pt, .pth or .bin) holds a text tower alone or a whole CLIP, whose other
    weights are ignored; a folder is Hugging Face's. The architecture is that of the shapes.
    Raises ``MissingInputError``, or ``DataError`` where the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"text encoder {path}: no such file or folder; {REMEDY}")
    file, config = clip_file(path)
    weights = read_tower(file)
    tower = _build(weights, config, file)
    load_strictly(tower, weights, f"text encoder {file}")
    tokens_of = partial(_end_padded_tokens, tokenizer=SimpleTokenizer(), length=tower.context_length)
    return TextEncoder(tower, tokens_of, tower.context_length, VOCABULARY).eval().requires_grad_(False)


def load_text_tower(name: str, path: str | Path, tokenizer: str | Path | None = None) -> TextEncoder:
    """The text tower of open_clip's model ``name``, with its tokenizer; in fp32, frozen and in evaluation mode.

    path: a local file as of ``load_text_encoder``, or a folder with one of open_clip's. tokenizer: the folder of the
    tokenizer's files (and the tower's config.json) where they are Hugging Face's; none: they lie in ``path``.
    Raises ``ConfigError``, ``MissingInputError``, or ``DataError`` where the files are not those of the model.
    """
    config, path, remedy = tower_config(name), Path(path), tower_remedy(name)
    if not path.exists():
        raise MissingInputError(f"text encoder {path}: no such file or folder; {remedy}")
    text = config["text_cfg"]
    length = int(text.get("context_length", DEFAULT_CONTEXT_LENGTH))
    files: dict[str, str] = {}
    folder = config_folder = None
    if "hf_tokenizer_name" in text:
        folder = _tokenizer_folder(name, text["hf_tokenizer_name"], path, tokenizer)
        files |= _hashes(folder, TOKENIZER_FILES)
    elif tokenizer is not None:
        raise ConfigError(f"text.tokenizer {tokenizer}: {name} has open_clip's own tokenizer; drop text.tokenizer")
    if "hf_model_name" in text:
        config_folder = _config_folder(name, text["hf_model_name"], path, tokenizer)
        files |= _hashes(config_folder, ("config.json",))
    tokens_of = _tokenizer(text, length, folder)
    tower = build_tower(config, config_folder)
    file = weights_file(path)
    load_strictly(tower, read_tower(file, remedy, hugging_face=config_folder is not None), f"text encoder {file}")
    settings = {key: text[key] for key in text if key not in AFTER_THE_CONTEXT | WHERE_FILES_ARE}
    decided = json.dumps([settings, bool(config.get("quick_gelu")), files], sort_keys=True)
    return TextEncoder(tower, tokens_of, length, int(tower.vocab_size), decided).eval().requires_grad_(False)


def tower_config(name: str, key: str = "text.tower") -> dict[str, Any]:
    """What open_clip has of the model ``name``. key: of the configuration, for the error. Raises ``ConfigError``."""
    config: dict[str, Any] | None = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        known = {known.lower(): known for known in open_clip.list_models()}
        near = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ConfigError(f"{key} {name!r}: open_clip {open_clip.__version__} knows no such model; {hint}")
    return config


def tower_remedy(name: str) -> str:
    """What to do where the weights of open_clip's model ``name`` are missing. An unknown name is a ``ConfigError``."""
    tower_config(name)
    return (
        f"set text.encoder to the local path of weights of open_clip's {name}: a whole CLIP or its text tower, as"
        " open_clip_model.safetensors of the model's page at Hugging Face"
    )


def build_tower(config: Mapping[str, Any], folder: Path | None = None) -> TextTransformer | HFTextEncoder:
    """The text tower, without projection, that open_clip builds for a model's config; its weights are to be loaded.

    Its parameters are on the meta device or, where ``folder`` has the config.json of a tower of Hugging Face's, random.
    """
    text = {**config["text_cfg"], "pool_type": "none", "proj_type": "none", "output_tokens": False}
    quick_gelu = bool(config.get("quick_gelu", False))
    if folder is not None:  # built in memory: it has buffers that are not in the files
        tower = _build_text_tower(
            config["embed_dim"], {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}, quick_gelu
        )
        tower.proj = nn.Identity()
        return tower
    with torch.device("meta"):
        tower = _build_text_tower(config["embed_dim"], text, quick_gelu)
    if tower.attn_mask is not None:
        tower.attn_mask = tower.build_causal_mask()
    return tower


def _hidden_states(tower: TextTransformer | HFTextEncoder, tokens: Tensor) -> Tensor:
    """(B, length, width) of tokens (B, length), without the class token that CoCa appends to the caption's."""
    if isinstance(tower, HFTextEncoder):
        mask = (tokens != tower.config.pad_token_id).long()
        return tower.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state
    if tower.cls_emb is None:
        return tower(tokens)
    last = tower.forward_intermediates(
        tokens, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
    )
    return last["text_intermediates"][-1]


def _end_padded_tokens(captions: list[str], tokenizer: SimpleTokenizer, length: int) -> Tensor:
    """(B, length): start, at most length - 2 of the caption, end, and the end again as padding.

    Source: ``CLIPTokenizer`` with ``padding="max_length", truncation=True``.
    """
    tokens = torch.full((len(captions), length), END_TOKEN, dtype=torch.int64)
    for row, caption in zip(tokens, captions, strict=True):
        ids = [START_TOKEN, *tokenizer.encode(caption)[: length - 2]]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def _tokenizer_folder(name: str, wanted: str, path: Path, given: str | Path | None) -> Path:
    """The folder of Hugging Face's tokenizer: the one given, or the encoder's own."""
    remedy = f"set text.tokenizer to a local folder of the tokenizer's files, as of Hugging Face's {wanted}"
    if importlib.util.find_spec("transformers") is None:
        raise MissingInputError(
            f"text.tower {name}: its tokenizer is Hugging Face's, and transformers is not installed;"
            " pip install transformers"
        )
    if given is None and not path.is_dir():
        raise MissingInputError(f"text.tokenizer: missing; the tokenizer of {name} is Hugging Face's; {remedy}")
    folder, key = (path, "text.encoder") if given is None else (Path(given), "text.tokenizer")
    if not folder.is_dir():
        raise MissingInputError(f"{key} {folder}: no such folder; {remedy}")
    if not _hashes(folder, TOKENIZER_FILES):
        raise MissingInputError(f"{key} {folder}: no tokenizer's files in it, but {contents(folder)}; {remedy}")
    return folder


def _tokenizer(text: Mapping[str, Any], length: int, folder: Path | None) -> SimpleTokenizer | HFTokenizer:
    """The tokenizer that ``open_clip.get_tokenizer`` gives, with Hugging Face's files from the folder."""
    options = text.get("tokenizer_kwargs", {})
    if folder is None:
        return SimpleTokenizer(context_length=length, **options)
    try:
        tokenizer = HFTokenizer(
            str(folder),
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
        tokenizer([""])
    except ImportError as error:
        first = str(error).strip().splitlines()[0]
        raise MissingInputError(
            f"text.tokenizer {folder}: needs a package that is not installed ({first}); install it"
        ) from error
    except Exception as error:  # tokenizers raises Exception itself
        raise DataError(
            f"text.tokenizer {folder}: transformers cannot use it ({str(error).strip().partition(chr(10))[0]});"
            f" copy the tokenizer's files of Hugging Face's {text['hf_tokenizer_name']} again"
        ) from error
    return tokenizer


def _config_folder(name: str, wanted: str, path: Path, given: str | Path | None) -> Path:
    """The folder whose config.json is that of the tower, where it is Hugging Face's."""
    sought = [folder for folder in map(Path, (given or path, path)) if folder.is_dir()]
    folders = [folder for folder in sought if (folder / "config.json").is_file()]
    remedy = f"put config.json of Hugging Face's {wanted} beside the tokenizer's files"
    if not folders:
        raise MissingInputError(
            f"text.tower {name}: its tower is Hugging Face's, and no config.json is in"
            f" {' or '.join(dict.fromkeys(map(str, sought)))}; {remedy}"
        )
    file = folders[0] / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the config of a model of Hugging Face's ({error!r}); {remedy}") from error
    if kind not in arch_dict:
        raise DataError(f"{file}: of model_type {kind}, and open_clip has {', '.join(arch_dict)}; {remedy}")
    return folders[0]


def _hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of those of the files that are there."""
    there = [name for name in names if (folder / name).is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in there}


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
