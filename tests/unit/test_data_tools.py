"""Sources, crops (golden/crops.npz), pixels as stored (golden/to_uint8.npz), and the precompute job on folders."""

import json
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from data_tools.images import FolderSource, adm_crop, open_source
from data_tools.precompute_latents import plan_shards, precompute
from tests.golden_values import GOLDEN
from tests.tiny import DEMO, ROOT, tiny_config
from uvit_dist.data.shards import read_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError
from uvit_dist.models.features import digits_pixels_8x8, to_uint8

CROPS = np.load(GOLDEN / "crops.npz")


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_adm_crop_is_the_official_one(case):
    crop = adm_crop(Image.fromarray(CROPS[f"image{case}"]), int(CROPS[f"size{case}"]))
    same_pillow = PIL.__version__.split(".")[0] == str(CROPS["pillow_version"]).split(".")[0]
    difference = np.abs(crop.astype(int) - CROPS[f"imagenet_crop{case}"].astype(int)).max()
    assert difference <= (0 if same_pillow else 1)


def test_uint8_is_what_an_image_writer_stores():
    golden = np.load(GOLDEN / "to_uint8.npz")
    assert np.array_equal(to_uint8(torch.from_numpy(golden["x"])).numpy(), golden["uint8"])


def test_digits_features_are_the_digits():
    from sklearn.datasets import load_digits

    source = open_source("digits", 32, "none")
    images = torch.from_numpy(np.stack([source.load(i) for i in range(50)])).permute(0, 3, 1, 2)
    expected = load_digits().images[:50].reshape(50, 64) / 8.0 - 1.0
    assert np.abs(digits_pixels_8x8(images).numpy() - expected).max() < 0.1
    assert source.labels[:10] == list(range(10))
    with pytest.raises(DataError, match=r"images of 32 pixels; set data\.image_size 32 \(now 64\)"):
        open_source("digits", 64, "none")


def test_a_mirror_image_never_meets_its_original_and_every_image_is_there_once():
    shards = plan_shards(images=100, mirror=True, per_shard=16, seed=5)
    assert [len(shard) for shard in shards] == [16] * 6 + [4] + [16] * 6 + [4]
    assert sorted(item for shard in shards for item in shard) == [(i, m) for i in range(100) for m in (False, True)]
    assert all(len({number for number, _ in shard}) == len(shard) for shard in shards)
    assert plan_shards(100, True, 16, 6) != shards
    assert len({number // 25 for number, _ in shards[0]}) == 4, "a shard of a sorted source is a sample of all of it"


@pytest.fixture
def folder(tmp_path):
    """Two classes of odd-sized pictures."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(["n02", "n01"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5 - label):
            pixels = draw.integers(0, 255, (40 + i, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"pic.{i}.png")
    return tmp_path / "images"


def folder_config(folder, tmp_path, *more):
    data = tmp_path / "latents"
    return tiny_config(data, tmp_path / "run", f"data.source={folder}", "data.crop=adm", "data.mirror=true",
                       "data.samples_per_shard=4", "model.num_classes=3", "diffusion.null_label=2", *more)  # fmt: skip


def test_a_folder_becomes_shards_and_a_restart_keeps_what_is_done(folder, tmp_path):
    config = folder_config(folder, tmp_path)
    device = torch.device("cpu")
    precompute(config, 4, device)
    index = read_index(config.data.index)
    assert (index.provenance.samples, sum(index.counts), index.provenance.classes) == (18, 18, 2)
    assert index.provenance.moments_shape == (8, 8, 8)
    directory = tmp_path / "latents"
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert b"n01/pic_0_m.npy" in b"".join(whole.values()), "a mirrored image by its key"

    for name in ("index.json", "latents-000001.json"):
        (directory / name).unlink()
    (directory / "latents-000003.tar").write_bytes(b"damaged")
    times = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    precompute(config, 4, device)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole
    assert (directory / "latents-000000.tar").stat().st_mtime_ns == times["latents-000000.tar"]

    precompute(folder_config(folder, tmp_path, "data.samples_per_shard=5", "seed=99"), 4, device)
    other = read_index(config.data.index)
    assert sum(other.counts) == 18, "shards of another cut are not taken for finished"


def test_labels_are_the_sorted_folders(folder):
    source = FolderSource(str(folder), 32, "adm")
    assert (source.keys[0], source.labels[0], source.classes) == ("n01/pic_0", 0, 2)
    assert source.labels == [0] * 4 + [1] * 5


def test_what_is_wrong_with_images_is_said(folder, tmp_path):
    with pytest.raises(MissingInputError, match=r"data\.source .*nowhere: no such folder"):
        open_source(str(tmp_path / "nowhere"), 32, "adm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInputError, match=r"no images \(\.bmp, \.jpeg"):
        open_source(str(tmp_path / "empty"), 32, "adm")
    with pytest.raises(DataError, match=r"pic\.0\.png: 70x40 pixels, data\.image_size is 32; set data\.crop: adm"):
        FolderSource(str(folder), 32, "none").load(0)
    with pytest.raises(ConfigError, match=r"data\.image_size 34 must be divisible by the autoencoder's factor 4"):
        precompute(folder_config(folder, tmp_path, "data.image_size=34"), 4, torch.device("cpu"))
    (folder / "n01" / "pic.0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"pic\.0\.png: cannot be read as an image"):
        FolderSource(str(folder), 32, "adm").load(0)
    (folder / "n01" / "pic_0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"their keys would be the same \(n01/pic_0\); rename one"):
        FolderSource(str(folder), 32, "adm")


@pytest.mark.slow
def test_the_command_explains_a_mistake(tmp_path):
    command = [sys.executable, "-m", "data_tools.precompute_latents", "--config", str(DEMO),
               f"data.index={tmp_path}/index.json", "autoencoder.encoder=nowhere.pth"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 66
    assert "error: autoencoder nowhere.pth: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "index.json").exists()


def test_moments_that_do_not_fit_the_type_are_refused(folder, tmp_path, monkeypatch):
    config = folder_config(folder, tmp_path)
    from uvit_dist.models.autoencoder import Autoencoder

    monkeypatch.setattr(Autoencoder, "encode_moments", lambda self, x: torch.full((len(x), 8, 8, 8), 1e6))
    with (
        pytest.warns(RuntimeWarning, match="overflow"),
        pytest.raises(DataError, match=r"not finite in float16; set data\.moments_dtype float32"),
    ):
        precompute(config, 4, torch.device("cpu"))
    assert not (tmp_path / "latents" / "index.json").exists()
    precompute(folder_config(folder, tmp_path, "data.moments_dtype=float32"), 4, torch.device("cpu"))
    assert json.loads((tmp_path / "latents" / "index.json").read_text())["provenance"]["moments_dtype"] == "float32"
