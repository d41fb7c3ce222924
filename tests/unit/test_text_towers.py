"""Text towers asked for by open_clip's names: tokens and contexts equal open_clip's, fingerprints, errors."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import MT5Config, PreTrainedTokenizerFast, RobertaConfig

from uvit_dist.config import TextConfig
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.models import text as text_module
from uvit_dist.models.text import TextEncoder, build_tower, load_text_encoder, load_text_tower, tower_config
from uvit_dist.pretrained import load_text

CAPTIONS = ["", "A green train.", "Stop! The dog runs!! away", "Look!☃ there", "a long caption " * 40]
SMALL = {"width": 64, "heads": 4, "layers": 2}
TINY_VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
REDUCED = [
    "ViT-H-14",
    "ViT-B-32-quickgelu",
    "EVA02-L-14",
    "MobileCLIP-S1",
    "ViT-B-16-SigLIP2",
    "ViT-L-14-CLIPA",
    "coca_ViT-B-32",
    "roberta-ViT-B-32",
    "mt5-base-ViT-B-32",
]
"""Models of open_clip's, here with few and narrow layers."""

WORDS = ["<s>", "<pad>", "</s>", "<unk>", "a", "green", "train", "dog", "the", "runs", "!", ".", "long", "caption"]


def reduced(name: str, folder: Path) -> dict[str, Any]:
    """The model's own config, but small, its vocabulary that of the test's tokenizer where it is not CLIP's."""
    config = dict(factory.get_model_config(name))
    config |= {"embed_dim": 16, "vision_cfg": TINY_VISION}
    text = dict(config["text_cfg"])
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    else:
        text |= SMALL
    if "hf_tokenizer_name" in text:
        text |= {"hf_tokenizer_name": str(folder), "vocab_size": len(WORDS)}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = {**config["multimodal_cfg"], **SMALL, "attn_pooler_heads": 4}
    return {**config, "text_cfg": text}


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    bare = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(folder)
    return folder


def hugging_face_folder(folder: Path, kind: str) -> Path:
    """A folder as of Hugging Face's, with the tokenizer's files and the config of a tiny tower."""
    if kind == "mt5":
        config = MT5Config(vocab_size=len(WORDS), d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=100, type_vocab_size=1, **sizes)
    config.save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: hugging_face_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("roberta", "mt5")}


@pytest.fixture(autouse=True, scope="module")
def small_models(folders: dict[str, Path]) -> Iterator[None]:
    """open_clip's registry with the models under the names that end in "-small"."""
    with pytest.MonkeyPatch.context() as patch:
        tokenizer = functools.cache(SimpleTokenizer)  # it takes half a second to read the tokenizer's words
        patch.setattr(text_module, "SimpleTokenizer", tokenizer)
        patch.setattr(factory, "SimpleTokenizer", tokenizer)
        for name in REDUCED:
            folder = folders["mt5" if name.startswith("mt5") else "roberta"]
            patch.setitem(factory._MODEL_CONFIGS, f"{name}-small", reduced(name, folder))
        yield


@pytest.fixture(scope="module")
def theirs(small_models: None) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {}
    for name in REDUCED:
        model = open_clip.create_model(f"{name}-small", pretrained=None, pretrained_text=False).eval()
        for parameter in model.requires_grad_(False).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found[name] = model
    return found


def folder_for(name: str, folders: dict[str, Path]) -> Path | None:
    if "hf_tokenizer_name" not in tower_config(name)["text_cfg"]:
        return None
    return folders["mt5" if name.startswith("mt5") else "roberta"]


def saved(model: nn.Module | dict[str, Tensor], path: Path) -> Path:
    tensors = model if isinstance(model, dict) else model.state_dict()
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path


def their_contexts(model: nn.Module, tokens: Tensor) -> Tensor:
    """What open_clip's own forward pass has after the last norm."""
    tower = getattr(model, "text", model)
    if isinstance(tower, open_clip.model.HFTextEncoder):
        tower.output_tokens = True
        return tower(tokens)[1]
    if getattr(tower, "cls_emb", None) is not None:
        assert tower.output_tokens
        return tower.ln_final(tower(tokens)[1])
    seen: list[Tensor] = []
    hook = tower.ln_final.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode_text(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", REDUCED)
def test_tokens_and_contexts_are_open_clips(
    name: str, theirs: dict[str, nn.Module], folders: dict[str, Path], tmp_path: Path
) -> None:
    model, small, folder = theirs[name], f"{name}-small", folder_for(f"{name}-small", folders)
    encoder = load_text_tower(small, saved(model, tmp_path / "whole.safetensors"), folder)
    tokens = open_clip.get_tokenizer(small)(CAPTIONS)
    assert torch.equal(encoder.tokenize(CAPTIONS), tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        contexts = encoder.encode(CAPTIONS)
    length = tower_config(small)["text_cfg"].get("context_length", 77)
    assert (contexts.shape, contexts.dtype) == ((len(CAPTIONS), length, 64), torch.float32)
    assert (encoder.length, encoder.width) == (length, 64)
    torch.testing.assert_close(contexts, their_contexts(model, tokens), rtol=0, atol=1e-6)
    assert contexts.std() > 0.05
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any("visual" in key or "projection" in key or ".proj." in key for key in encoder.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-H-14", "coca_ViT-B-32", "roberta-ViT-B-32"])
def test_all_kinds_of_files_are_one_encoder(
    name: str, theirs: dict[str, nn.Module], folders: dict[str, Path], tmp_path: Path
) -> None:
    small, folder = f"{name}-small", folder_for(f"{name}-small", folders)
    whole = theirs[name].state_dict()
    bare = {key.removeprefix("text."): value for key, value in whole.items() if key.startswith("text.")}
    bare = bare or {key: value for key, value in whole.items() if not key.startswith("visual.")}
    torch.save({f"text.{key}": value for key, value in bare.items()}, tmp_path / "custom.pt")
    torch.save(bare, tmp_path / "tower.bin")
    (tmp_path / "folder").mkdir()
    saved(whole, tmp_path / "folder" / "open_clip_model.safetensors")
    for file in folder.iterdir() if folder else ():
        (tmp_path / "folder" / file.name).write_bytes(file.read_bytes())
    first = load_text_tower(small, saved(bare, tmp_path / "tower.safetensors"), folder)
    for path, beside in (("custom.pt", folder), ("tower.bin", folder), ("folder", None)):
        encoder = load_text_tower(small, tmp_path / path, beside)
        assert encoder.fingerprint == first.fingerprint, path
        assert torch.equal(encoder.encode(CAPTIONS[:2]), first.encode(CAPTIONS[:2])), path
    missing = dict(list(bare.items())[1:])
    last = next(key for key in reversed(bare) if "resblocks" in key or "encoder.layer" in key)
    for wrong in (missing, {key: value for key, value in bare.items() if key != last}, bare | {"a.b": torch.zeros(1)}):
        with pytest.raises(DataError, match=r"disagree|no text tower"):
            load_text_tower(small, saved(wrong, tmp_path / "wrong.safetensors"), folder)


def test_fingerprints_tell_towers_and_tokenizers_apart(
    theirs: dict[str, nn.Module], folders: dict[str, Path], tmp_path: Path
) -> None:
    path = saved(theirs["ViT-H-14"], tmp_path / "clip.safetensors")
    plain, quick, same = (
        load_text_tower(f"{name}-small", path) for name in ("ViT-H-14", "ViT-B-32-quickgelu", "ViT-H-14")
    )
    default = load_text_encoder(path)
    assert len({plain.fingerprint, quick.fingerprint, default.fingerprint}) == 3
    assert same.fingerprint == plain.fingerprint
    assert default.fingerprint == text_module.fingerprint(default.tower.state_dict())
    assert not torch.allclose(plain.encode(CAPTIONS), quick.encode(CAPTIONS), atol=1e-3)

    path = saved(theirs["roberta-ViT-B-32"], tmp_path / "roberta.safetensors")
    (tmp_path / "other").mkdir()
    other = write_tokenizer(tmp_path / "other", [*WORDS[:4], *reversed(WORDS[4:])])
    (other / "config.json").write_bytes((folders["roberta"] / "config.json").read_bytes())
    one, two = (load_text_tower("roberta-ViT-B-32-small", path, folder) for folder in (folders["roberta"], other))
    assert one.fingerprint != two.fingerprint


ALL_MODELS = open_clip.list_models()


@pytest.mark.slow
def test_every_tower_of_open_clips_can_be_built(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").touch()
    built: set[str] = set()
    for name in ALL_MODELS:
        config = tower_config(name)
        text = config["text_cfg"]
        if "hf_tokenizer_name" in text:
            with pytest.raises(
                MissingInputError, match=r"text\.tokenizer.*Hugging Face's.*set text\.tokenizer"
            ) as told:
                load_text_tower(name, tmp_path / "weights.safetensors")
            assert text["hf_tokenizer_name"] in str(told.value)
        if "hf_model_name" in text:
            assert "hf_tokenizer_name" in text
            continue
        settings = json.dumps([text | {"hf_tokenizer_name": ""}, config.get("quick_gelu")])
        if settings in built:
            continue
        built.add(settings)
        tower = build_tower(config)
        assert all(parameter.is_meta for parameter in tower.parameters())
        assert not any(buffer.is_meta for buffer in tower.buffers())
        assert (tower.width, tower.transformer.layers) == (text["width"], text["layers"])
    assert len(built) > 20


def test_unknown_names(tmp_path: Path) -> None:
    for name, near in (("vit-h-14", "ViT-H-14"), ("ViT-B32", "ViT-B-32"), ("siglip", "SigLIP"), ("zzz", "list_models")):
        with pytest.raises(ConfigError, match=rf"text\.tower '{name}': open_clip .* knows no such model; .*{near}"):
            load_text(TextConfig(encoder=str(tmp_path / "none"), tower=name))


def test_missing_files(theirs: dict[str, nn.Module], folders: dict[str, Path], tmp_path: Path) -> None:
    name, path = "roberta-ViT-B-32-small", saved(theirs["roberta-ViT-B-32"], tmp_path / "roberta.safetensors")
    with pytest.raises(MissingInputError, match=r"text\.encoder .*none: no such file.*weights of open_clip's ViT-H-14"):
        load_text(TextConfig(encoder=str(tmp_path / "none"), tower="ViT-H-14"))
    assert isinstance(
        load_text(TextConfig(encoder=str(path), tower=name, tokenizer=str(folders["roberta"]))), TextEncoder
    )
    (tmp_path / "empty").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    (tmp_path / "broken" / "config.json").write_bytes((folders["roberta"] / "config.json").read_bytes())
    for given, kind, message in (
        (None, MissingInputError, r"text\.tokenizer: missing"),
        ("none", MissingInputError, r"text\.tokenizer .*none: no such folder"),
        ("empty", MissingInputError, "no tokenizer's files in it, but nothing"),
        ("tokenizer", MissingInputError, r"its tower is Hugging Face's, and no config\.json"),
        ("broken", DataError, "transformers cannot use it"),
    ):
        with pytest.raises(kind, match=message):
            load_text_tower(name, path, tmp_path / given if given else None)
    for text, message in (
        ("[]", "not the config"),
        ("{", "not the config"),
        ('{"model_type": "clip"}', "of model_type clip"),
    ):
        (tmp_path / "tokenizer" / "config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            load_text_tower(name, path, tmp_path / "tokenizer")
    with pytest.raises(MissingInputError, match=r"open_clip's holds open_clip_model\.safetensors or .*here is nothing"):
        load_text_tower("ViT-H-14-small", tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"has open_clip's own tokenizer; drop text\.tokenizer"):
        load_text_tower("ViT-H-14-small", path, tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"no text tower of a CLIP; set text\.encoder .*ViT-H-14"):
        load_text_tower("ViT-H-14-small", path)


def test_another_models_tokenizer_is_refused(
    theirs: dict[str, nn.Module], folders: dict[str, Path], tmp_path: Path
) -> None:
    path = saved(theirs["ViT-B-16-SigLIP2"], tmp_path / "siglip.safetensors")
    more = write_tokenizer(tmp_path / "more", [*WORDS, "cat"])
    encoder = load_text_tower("ViT-B-16-SigLIP2-small", path, more)
    with pytest.raises(DataError, match=r"text\.tokenizer: gives token 14, and the tower has 14 tokens"):
        encoder.encode(["a cat"])


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingInputError, match=r"transformers is not installed; pip install transformers"):
        load_text_tower("roberta-ViT-B-32", tmp_path)


def test_the_hub_is_never_asked(
    theirs: dict[str, nn.Module], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    path = saved(theirs["roberta-ViT-B-32"], tmp_path / "roberta.safetensors")
    assert json.loads((folders["roberta"] / "config.json").read_text())["model_type"] == "roberta"
    assert load_text_tower("roberta-ViT-B-32-small", path, folders["roberta"]).encode(["a dog"]).isfinite().all()
