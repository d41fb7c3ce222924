"""The autoencoder: golden values, key names, kinds of files, the fingerprint, the digits' weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file

from data_tools.digits import box_average, digits_images
from data_tools.train_digits_autoencoder import DEFAULT_OUT as DIGITS_WEIGHTS
from data_tools.train_digits_autoencoder import parse_arguments, psnr, sample
from tests.golden_values import GOLDEN, golden_state_dict
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.models.autoencoder import (
    Autoencoder,
    encoder_fingerprint,
    from_official_keys,
    load_autoencoder,
    to_official_keys,
)

SMALL = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 3,
}


def saved(tensors: dict[str, torch.Tensor], path: Path, **metadata: str) -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return path


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key


@pytest.fixture(scope="module")
def small() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def diffusers_keys(small: AutoencoderKL) -> dict[str, torch.Tensor]:
    return dict(small.state_dict())


@pytest.fixture
def folder(small: AutoencoderKL, diffusers_keys: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "vae"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **SMALL}))
    saved(diffusers_keys, path / "diffusion_pytorch_model.safetensors")
    return path


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    return digits_images()


@pytest.fixture(scope="module")
def digits_vae() -> Autoencoder:
    return load_autoencoder(DIGITS_WEIGHTS)


def as_network_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1


@pytest.mark.slow
def test_stable_diffusion_golden(tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "vae.npz")
    shapes = json.loads((GOLDEN / "vae_state_dict.json").read_text())
    official = golden_state_dict(shapes, str(golden["salt"]))
    path = tmp_path / "autoencoder_kl.pth"
    torch.save(official, path)
    vae = load_autoencoder(path)
    path.unlink()
    assert (vae.latent_channels, vae.factor) == (4, 8)
    moments = vae.encode_moments(torch.from_numpy(golden["image"]))
    decoded = vae.decode(torch.from_numpy(golden["z"]) / 0.18215)
    torch.testing.assert_close(moments, torch.from_numpy(golden["moments"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded, torch.from_numpy(golden["decoded"]), rtol=0, atol=1e-4)
    assert_equal(to_official_keys(vae.vae.state_dict()), official)


def test_keys_round_trip_both_ways(diffusers_keys: dict[str, torch.Tensor]) -> None:
    official = to_official_keys(diffusers_keys)
    assert official["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert torch.equal(
        official["decoder.up.2.block.0.conv1.weight"],
        diffusers_keys["decoder.up_blocks.0.resnets.0.conv1.weight"],
    )
    assert_equal(from_official_keys(official), diffusers_keys)
    assert_equal(to_official_keys(from_official_keys(official)), official)


@pytest.mark.slow
def test_three_kinds_of_files_are_one_autoencoder(
    small: AutoencoderKL, diffusers_keys: dict[str, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    official = to_official_keys(diffusers_keys)
    torch.save(official, tmp_path / "official.pth")
    paths = [
        tmp_path / "official.pth",
        saved(official, tmp_path / "official.safetensors"),
        folder,
        saved(diffusers_keys, tmp_path / "single.safetensors", config=json.dumps(SMALL)),
    ]
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    moments = small.quant_conv(small.encoder(images))
    for path in paths:
        vae = load_autoencoder(path)
        assert not vae.training
        assert not any(parameter.requires_grad for parameter in vae.parameters())
        assert (vae.latent_channels, vae.factor) == (3, 4)
        assert torch.equal(vae.encode_moments(images), moments), path
        assert torch.equal(vae.decode(moments[:, :3]), small.decode(moments[:, :3]).sample), path
        assert vae.encoder_fingerprint == encoder_fingerprint(official)


def test_old_diffusers_attention_names(diffusers_keys: dict[str, torch.Tensor], folder: Path) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in diffusers_keys.items():
        for new, name in names.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        old[key] = value
    assert old.keys() != diffusers_keys.keys()
    saved(old, folder / "diffusion_pytorch_model.safetensors")
    assert_equal(dict(load_autoencoder(folder).vae.state_dict()), diffusers_keys)
    assert encoder_fingerprint(old) == encoder_fingerprint(diffusers_keys)


def test_moments_are_fp32_under_autocast(small: AutoencoderKL) -> None:
    vae = Autoencoder(small)
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = vae.encode_moments(images)
    assert torch.equal(moments, vae.encode_moments(images))
    assert moments.dtype == torch.float32
    assert torch.backends.cudnn.conv.fp32_precision == precision  # type: ignore[attr-defined]


def test_fingerprint_is_the_encoders(diffusers_keys: dict[str, torch.Tensor]) -> None:
    before = encoder_fingerprint(diffusers_keys)
    for key in ("encoder.mid_block.attentions.0.to_q.weight", "quant_conv.bias"):
        changed = {**diffusers_keys, key: diffusers_keys[key] + 1e-3}
        assert encoder_fingerprint(changed) != before
        assert encoder_fingerprint(to_official_keys(changed)) == encoder_fingerprint(changed)
    for key in ("decoder.conv_in.weight", "post_quant_conv.bias"):
        assert encoder_fingerprint({**diffusers_keys, key: diffusers_keys[key] + 1e-3}) == before
    encoder_only = {key: value for key, value in diffusers_keys.items() if key.startswith(("enc", "quant"))}
    assert encoder_fingerprint(dict(reversed(encoder_only.items()))) == before
    assert encoder_fingerprint({key: value.half() for key, value in diffusers_keys.items()}) != before
    with pytest.raises(DataError, match=r"no encoder\.\*"):
        encoder_fingerprint({"decoder.conv_in.weight": torch.zeros(1)})


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"no such file or folder; give the path"):
        load_autoencoder(tmp_path / "none.pth")
    with pytest.raises(MissingInputError, match=r"config\.json"):
        load_autoencoder(tmp_path)


def test_wrong_keys(diffusers_keys: dict[str, torch.Tensor], tmp_path: Path) -> None:
    official = to_official_keys(diffusers_keys)
    with pytest.raises(DataError, match=r"loss\.logvar.*bare state dict"):
        from_official_keys({**official, "loss.logvar": torch.zeros(())})
    with pytest.raises(DataError, match="no keys"):
        from_official_keys({})
    with pytest.raises(DataError, match="diffusers AutoencoderKL"):
        to_official_keys(official)
    partial = {key: value for key, value in official.items() if key != "decoder.mid.attn_1.q.bias"}
    with pytest.raises(DataError, match=r"to_q\.bias"):
        load_autoencoder(saved(partial, tmp_path / "partial.safetensors"))
    with pytest.raises(DataError, match=r"no post_quant_conv\.weight"):
        load_autoencoder(saved({"quant_conv.weight": torch.zeros(6, 6, 1, 1)}, tmp_path / "q.safetensors"))
    with pytest.raises(DataError, match="no config in the file's metadata"):
        load_autoencoder(saved(diffusers_keys, tmp_path / "bare.safetensors"))


def test_wrong_files(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_autoencoder(broken)
    for content, message in ((b"not a pickle", "not a file of plain tensors"), (b"", "not a file of plain")):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_autoencoder(tmp_path / "broken.pth")
    torch.save({"state_dict": {}}, tmp_path / "wrapped.pth")
    with pytest.raises(DataError, match="holds keys state_dict"):
        load_autoencoder(tmp_path / "wrapped.pth")
    (folder / "config.json").write_text(json.dumps({**SMALL, "latent_channels": 4}))
    with pytest.raises(DataError, match="disagree"):
        load_autoencoder(folder)
    (folder / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(DataError, match="UNet2DModel"):
        load_autoencoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_autoencoder(folder)


def test_digits_pictures_give_the_digits_back(pictures: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.datasets import load_digits

    images, labels = pictures
    assert images.shape == (1797, 32, 32, 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    misses = np.abs(box_average(images) - load_digits().images)
    assert misses.max() < 0.64
    assert misses.mean() < 0.05
    assert (misses < 0.5).mean() > 0.999


@pytest.mark.slow
def test_digits_autoencoder_is_what_its_header_says(
    pictures: tuple[np.ndarray, np.ndarray], digits_vae: Autoencoder
) -> None:
    with safe_open(DIGITS_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    images = as_network_input(pictures[0])
    assert (digits_vae.latent_channels, digits_vae.factor) == (4, 4)
    assert DIGITS_WEIGHTS.stat().st_size <= 2**20
    moments = torch.cat([digits_vae.encode_moments(part) for part in images.split(256)])
    assert moments.shape == (1797, 8, 8, 8)
    decoded = torch.cat([digits_vae.decode(part) for part in moments[:, :4].split(256)])
    assert float(metadata["psnr_db"]) >= 30
    assert psnr(decoded, images) == pytest.approx(float(metadata["psnr_db"]), abs=0.02)
    latents = sample(moments, int(metadata["seed"]))
    assert 1 / latents.std().item() == pytest.approx(float(metadata["scale_factor"]), rel=1e-3)
    assert latents.mean((0, 2, 3)).abs().max() < 0.01
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.01)


def test_decoded_digits_are_recognised(pictures: tuple[np.ndarray, np.ndarray], digits_vae: Autoencoder) -> None:
    """Five nearest real digits (the digit itself apart) name the digits of decoded latents."""
    images, labels = pictures
    chosen = np.arange(0, len(images), 6)
    latents = sample(digits_vae.encode_moments(as_network_input(images[chosen])), 7)
    levels = (digits_vae.decode(latents).clamp(-1, 1) + 1) * 127.5
    decoded = box_average(levels.permute(0, 2, 3, 1).numpy()).reshape(len(chosen), 64)
    real = box_average(images).reshape(len(images), 64)
    distances = (decoded**2).sum(1)[:, None] + (real**2).sum(1) - 2 * decoded @ real.T
    distances[np.arange(len(chosen)), chosen] = np.inf
    nearest = labels[np.argsort(distances, axis=1)[:, :5]]
    votes = np.array([np.bincount(row, minlength=10).argmax() for row in nearest])
    assert (votes == labels[chosen]).mean() >= 0.97


def test_training_command_refuses_zero_steps() -> None:
    with pytest.raises(ConfigError, match="--batch-size 0: must be at least 1"):
        parse_arguments(["--batch-size", "0"])
