"""The text encoder: contexts and tokens equal Hugging Face's, kinds of files, errors."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import ftfy
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from uvit_dist.errors import DataError, MissingInputError
from uvit_dist.models.text import END_TOKEN, START_TOKEN, VOCABULARY, TextEncoder, load_text_encoder

WIDTH, HEADS, LAYERS, LENGTH = 128, 2, 2, 77
SIGN_ZERO = "Look!☃ there"
CAPTIONS = [
    "",
    "A green train.",
    "Stop! The dog runs!! away",
    "What a view!",
    SIGN_ZERO,
    "a long caption " * 40,
    "A dog and " * 24 + "one two! three",  # the 75th token is a "!"
    "  Two\tCATS \n and\u00a0a   MOUSE ",
    "Café naïve, 日本語 и Москва 🚂 e\u0301",
    "salt &amp; pepper &quot;it&#39;s 25 o'clock&quot; don’t",
]


def saved(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def small_config(**changes: object) -> CLIPTextConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
    }
    return CLIPTextConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def theirs() -> CLIPTextModel:
    torch.manual_seed(0)
    model = CLIPTextModel(small_config()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "position" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "layers" in name:
            parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def keys_5(theirs: CLIPTextModel) -> dict[str, torch.Tensor]:
    """Keys of transformers 5, without a prefix."""
    return {key.removeprefix("text_model."): value for key, value in theirs.state_dict().items()}


@pytest.fixture(scope="module")
def folder(theirs: CLIPTextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hugging_face")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> TextEncoder:
    return load_text_encoder(folder)


@pytest.fixture(scope="module")
def their_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    """Hugging Face's tokenizer from the files that it reads, written from open_clip's vocabulary."""
    bundled = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    path = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {specials.get(token, token): number for token, number in bundled.encoder.items()}
    merges = sorted(bundled.bpe_ranks, key=bundled.bpe_ranks.__getitem__)
    (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(path)


def their_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Versions before 5, which the official code ran on, mended the text with ftfy, and version 5 does not."""
    mended = [ftfy.fix_text(caption) for caption in captions]
    ids = tokenizer(mended, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return ids["input_ids"]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def test_tokens_are_hugging_faces(ours: TextEncoder, their_tokenizer: CLIPTokenizer) -> None:
    tokens = ours.tokenize(CAPTIONS)
    assert (tokens.shape, tokens.dtype) == ((len(CAPTIONS), LENGTH), torch.int64)
    assert torch.equal(tokens, their_tokens(their_tokenizer, CAPTIONS))
    assert tokens[0].tolist() == [START_TOKEN] + [END_TOKEN] * 76
    assert tokens[5, -2:].tolist() != [END_TOKEN] * 2
    assert tokens[5, -1] == END_TOKEN
    assert tokens[6, -2:].tolist() == [256, END_TOKEN]


def test_token_0_is_not_only_padding(ours: TextEncoder) -> None:
    """The sign "!" may be token 0 too; only what follows the end token is padding."""
    tokens = ours.tokenize(CAPTIONS)
    assert 0 in tokens[CAPTIONS.index(SIGN_ZERO)]
    open_clips = SimpleTokenizer()(CAPTIONS)
    for row, plain in zip(tokens, open_clips, strict=True):
        end = plain.tolist().index(END_TOKEN)
        assert torch.equal(row[: end + 1], plain[: end + 1])
        assert (plain[end + 1 :] == 0).all()
        assert (row[end:] == END_TOKEN).all()


def test_contexts_are_hugging_faces(ours: TextEncoder, theirs: CLIPTextModel, their_tokenizer: CLIPTokenizer) -> None:
    contexts = ours.encode(CAPTIONS)
    expected = theirs(input_ids=their_tokens(their_tokenizer, CAPTIONS)).last_hidden_state
    assert (contexts.shape, contexts.dtype) == ((len(CAPTIONS), LENGTH, WIDTH), torch.float32)
    assert (ours.length, ours.width) == (LENGTH, WIDTH)
    assert contexts.std() > 0.5
    torch.testing.assert_close(contexts, expected, rtol=0, atol=1e-5)


def test_padding_with_zero_would_differ(ours: TextEncoder) -> None:
    contexts = ours.encode(CAPTIONS[:2])
    padded_with_zero = ours.tower(SimpleTokenizer()(CAPTIONS[:2]))
    assert difference(padded_with_zero[1, :6], contexts[1, :6]) < 1e-5
    assert difference(padded_with_zero[1, 7:], contexts[1, 7:]) > 0.1


def test_plain_gelu_would_differ(ours: TextEncoder, theirs: CLIPTextModel) -> None:
    plain = CLIPTextModel(small_config(hidden_act="gelu")).eval()
    plain.load_state_dict(theirs.state_dict())
    assert difference(plain(ours.tokenize(CAPTIONS[:2])).last_hidden_state, ours.encode(CAPTIONS[:2])) > 1e-3


def test_frozen_and_fp32_under_autocast(ours: TextEncoder) -> None:
    precision = torch.backends.cuda.matmul.fp32_precision  # type: ignore[attr-defined]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        contexts = ours.encode(CAPTIONS[:3])
    assert torch.equal(contexts, ours.encode(CAPTIONS[:3]))
    assert not contexts.requires_grad
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert torch.backends.cuda.matmul.fp32_precision == precision  # type: ignore[attr-defined]


@pytest.mark.slow
def test_all_kinds_of_files_are_one_encoder(
    ours: TextEncoder, folder: Path, keys_5: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    others = {"visual.a": torch.zeros(1), "logit_scale": torch.zeros(()), "text_projection": torch.zeros(2, 2)}
    keys_4 = {f"text_model.{key}": value for key, value in keys_5.items()}
    keys_4 |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "vision_model.a": torch.zeros(1)}
    open_clips = dict(ours.tower.state_dict())
    custom = {f"text.{key}": value for key, value in open_clips.items()}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"text_config": {"num_attention_heads": 2}}')
    torch.save(keys_4, tmp_path / "folder" / "pytorch_model.bin")
    torch.save(custom | others | {"text.text_projection": torch.zeros(2, 2)}, tmp_path / "custom.pth")
    paths = [
        folder / "model.safetensors",
        saved(keys_4, tmp_path / "4.safetensors"),
        tmp_path / "folder",
        saved(open_clips | others, tmp_path / "whole.safetensors"),
        tmp_path / "custom.pth",
    ]
    for path in paths:
        encoder = load_text_encoder(str(path))
        assert encoder.fingerprint == ours.fingerprint, path
        assert torch.equal(encoder.encode(CAPTIONS[:2]), ours.encode(CAPTIONS[:2])), path
    open_clips["ln_final.bias"] = open_clips["ln_final.bias"] + 1e-3
    assert load_text_encoder(saved(open_clips, tmp_path / "other.safetensors")).fingerprint != ours.fingerprint


def test_heads_are_the_configs(folder: Path, theirs: CLIPTextModel, tmp_path: Path) -> None:
    model = CLIPTextModel(small_config(num_attention_heads=4)).eval()
    model.load_state_dict(theirs.state_dict())
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    expected = model(encoder.tokenize(CAPTIONS[:3])).last_hidden_state
    torch.testing.assert_close(encoder.encode(CAPTIONS[:3]), expected, rtol=0, atol=1e-5)
    assert difference(load_text_encoder(folder).encode(CAPTIONS[:3]), expected) > 1e-3


def test_half_precision_weights_become_fp32(keys_5: dict[str, torch.Tensor], tmp_path: Path) -> None:
    encoder = load_text_encoder(saved({k: v.half() for k, v in keys_5.items()}, tmp_path / "half.safetensors"))
    assert encoder.encode(["a"]).dtype == torch.float32


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such file.*text\.encoder.*clip-vit-large-patch14.*quickgelu"):
        load_text_encoder(tmp_path / "none.safetensors")
    with pytest.raises(MissingInputError, match=r"model\.safetensors or pytorch_model\.bin, and here is nothing"):
        load_text_encoder(tmp_path)


def test_programs_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(DataError, match=r"TorchScript.*only plain tensors.*open_clip_model\.safetensors"):
        load_text_encoder(tmp_path / "ViT-L-14.pt")


def test_wrong_contents(keys_5: dict[str, torch.Tensor], ours: TextEncoder, tmp_path: Path) -> None:
    open_clips = dict(ours.tower.state_dict())
    small = {"token_embedding.weight": torch.zeros(9, WIDTH)}
    fewer = {key: value for key, value in keys_5.items() if "layers.1.self_attn.k_proj.bias" not in key}
    shallow = {key: value for key, value in open_clips.items() if "resblocks" not in key}
    cases = [
        ({"a.weight": torch.zeros(1)}, r"holds keys a\.weight, and no text tower"),
        (open_clips | small, r"9 tokens.*has 49408 tokens"),
        (open_clips | {"positional_embedding": torch.zeros(77)}, "missing or misshapen"),
        (shallow, r"missing or misshapen \('transformer\.resblocks\.0\.mlp\.c_fc\.weight'\)"),
        (fewer, r"no k_proj or v_proj beside encoder\.layers\.1\.self_attn\.q_proj\.bias"),
        (open_clips | {"cls_emb": torch.zeros(1)}, r"disagree \(Unexpected key.*cls_emb"),
        (keys_5 | {"encoder.layers.0.extra.weight": torch.zeros(1)}, r"disagree.*layers\.0\.extra"),
    ]
    for number, (weights, message) in enumerate(cases):
        path = saved(weights, tmp_path / f"{number}.safetensors")
        with pytest.raises(DataError, match=message):
            load_text_encoder(path)


def test_wrong_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_text_encoder(tmp_path / "broken.safetensors")
    for content in (b"not a pickle", b""):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(DataError, match="not a file of plain tensors"):
            load_text_encoder(tmp_path / "broken.pt")
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "wrapped.pt")
    with pytest.raises(DataError, match="holds keys epoch, state_dict"):
        load_text_encoder(tmp_path / "wrapped.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(DataError, match="not a file of plain tensors"):
        load_text_encoder(tmp_path / "other.pt")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    configs = {
        '{"hidden_act": "gelu"}': "hidden_act is gelu",
        "{": "not a JSON object",
        "[]": "not a JSON object",
        '{"num_attention_heads": 3}': "width 128, 3 heads",
    }
    for text, message in configs.items():
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            load_text_encoder(tmp_path)


def test_one_caption_is_given_in_a_list(ours: TextEncoder) -> None:
    with pytest.raises(TypeError, match="put the one caption in a list"):
        ours.encode("A green train.")
