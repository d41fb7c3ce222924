"""CLIP score: equal to open_clip's own towers and preprocessing on the same weights; errors."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny import tiny_config
from uvit_dist.config_evaluate import EvaluateConfig
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.models.clip import ClipScore, load_clip
from uvit_dist.pretrained import load_extractor

CAPTIONS = ["a green train", "two dogs on a beach, seen from above", ""]
TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model under a name of its own, as a user would add one."""
    path = tmp_path_factory.mktemp("configs") / "tiny-clip-of-a-test.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def theirs(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.create_model(name, load_weights=False).eval()


@pytest.fixture(scope="module")
def file(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_file(
        {key: value.contiguous() for key, value in theirs.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def ours(name: str, file: Path) -> ClipScore:
    return load_clip(name, file)


@pytest.mark.parametrize("size", [32, 48, 256])
def test_scores_are_open_clips(ours: ClipScore, theirs: torch.nn.Module, name: str, size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    coarse = torch.rand(3, 3, 8, 8, generator=draw)
    images = (torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") * 255).to(torch.uint8)
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.inference_mode():
        of_images, of_texts = theirs.encode_image(pixels), theirs.encode_text(open_clip.get_tokenizer(name)(CAPTIONS))
    expected = 100 * torch.nn.functional.cosine_similarity(of_images, of_texts)
    found = ours(images, CAPTIONS)["clip"]
    assert found.shape == (3, 1)
    assert found[:, 0].sub(expected).abs().max() < (1e-3 if size == 32 else 0.5)  # their resize is Pillow's
    others = ours(images, CAPTIONS[::-1])["clip"]
    assert found[:, 0].sub(others[:, 0]).abs().max() > 1  # the control


def test_it_is_asked_for_by_the_configuration(name: str, file: Path, tmp_path: Path) -> None:
    changes = ["evaluate.scores=[frechet_distance, clip_score]", f"evaluate.clip={file}"]
    with pytest.raises(ConfigError, match="clip_score needs captions"):
        tiny_config(tmp_path, tmp_path / "run", *changes)
    evaluate = EvaluateConfig(
        features="pixels_8x8", scores=("frechet_distance", "clip_score"), reference="", clip=str(file), clip_model=name
    )
    extract, identity = load_extractor(evaluate, torch.device("cpu"))
    found = extract(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), CAPTIONS)
    assert {kind: value.shape for kind, value in found.items()} == {"pixels": (3, 192), "clip": (3, 1)}
    assert identity.startswith(f"pixels_8x8 clip {name} ")


def test_mistakes_are_explained(name: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingInputError, match=r"evaluate\.clip .*nowhere: no such file.*open_clip_model\.safetensors"
    ):
        load_clip(name, tmp_path / "nowhere")
    with pytest.raises(MissingInputError, match=r"Hugging Face's timm/vit_large_patch14_clip_224\.openai"):
        load_clip("ViT-L-14-quickgelu", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"evaluate\.clip_model 'ViT-L-15': open_clip .* did you mean"):
        load_clip("ViT-L-15", file)
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(DataError, match=r"evaluate\.clip .* disagree"):
        load_clip(name, tmp_path)
