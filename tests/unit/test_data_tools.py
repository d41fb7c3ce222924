"""Crops (golden/crops.npz), pixels as stored (golden/to_uint8.npz), and the jobs that make latents and references."""

import json
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from data_tools.crops import adm_crop, coco_crop
from data_tools.fid_reference import write_reference
from data_tools.precompute_latents import precompute
from data_tools.sources import open_source
from data_tools.units import plan_units
from tests.golden_values import GOLDEN
from tests.tiny import DEMO, ROOT, tiny_config
from uvit_dist.config_data import DataConfig
from uvit_dist.data.shards import read_index
from uvit_dist.errors import ConfigError, DataError
from uvit_dist.models.features import digits_pixels_8x8, to_uint8

CROPS = np.load(GOLDEN / "crops.npz")


@pytest.mark.parametrize("case", [0, 1, 2, 3])
@pytest.mark.parametrize(("crop", "name"), [(adm_crop, "imagenet_crop"), (coco_crop, "coco_crop")])
def test_crops_are_the_official_ones_of_crops_npz(crop, name, case):
    pixels = crop(Image.fromarray(CROPS[f"image{case}"]), int(CROPS[f"size{case}"]))
    same_pillow = PIL.__version__.split(".")[0] == str(CROPS["pillow_version"]).split(".")[0]
    difference = np.abs(pixels.astype(int) - CROPS[f"{name}{case}"].astype(int)).max()
    assert difference <= (0 if same_pillow else 1)
    flipped = crop(Image.fromarray(CROPS[f"image{case}"][::-1]), int(CROPS[f"size{case}"]))
    assert np.abs(flipped.astype(int) - CROPS[f"{name}{case}"].astype(int)).max() > 1, "the control"


def test_uint8_is_what_an_image_writer_stores():
    golden = np.load(GOLDEN / "to_uint8.npz")
    assert np.array_equal(to_uint8(torch.from_numpy(golden["x"])).numpy(), golden["uint8"])


def test_digits_features_are_the_digits():
    from sklearn.datasets import load_digits

    data = DataConfig(format="digits", image_size=32, crop="none", index="unused", lanes=1)
    source = open_source(data)
    images = torch.from_numpy(np.stack([source.load(i) for i in range(50)])).permute(0, 3, 1, 2)
    expected = load_digits().images[:50].reshape(50, 64) / 8.0 - 1.0
    assert np.abs(digits_pixels_8x8(images)["pixels"].numpy() - expected).max() < 0.1
    assert source.labels[:10] == list(range(10))
    with pytest.raises(ConfigError, match=r"images of 32 pixels; set data\.image_size 32 \(now 64\)"):
        open_source(data.model_copy(update={"image_size": 64}))


def test_a_mirror_image_never_meets_its_original_and_every_image_is_there_once():
    units = plan_units(images=100, mirror=True, per_shard=16, seed=5)
    assert [len(unit.images) for unit in units] == [16] * 6 + [4]
    shards = sorted((shard for unit in units for shard in unit.shards), key=lambda shard: shard.name)
    assert [shard.name for shard in shards] == [f"latents-{number:06d}" for number in range(14)]
    assert [shard.mirrored for shard in shards] == [False] * 7 + [True] * 7
    keys = [f"{number:03d}" for number in range(100)]
    assert sorted(k for shard in shards for k in shard.keys(keys)) == sorted([*keys, *(f"{k}_m" for k in keys)])
    assert all(len(set(shard.images)) == len(shard.images) for shard in shards)
    assert plan_units(100, True, 16, 6) != units
    assert len({number // 25 for number in units[0].images}) == 4, "a shard of a sorted source is a sample of all of it"


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
    return tiny_config(data, tmp_path / "run", "data.format=folder", f"data.source={folder}", "data.crop=adm",
                       "data.mirror=true", "data.samples_per_shard=4", "model.num_classes=3",
                       "diffusion.null_label=2", *more)  # fmt: skip


def test_a_folder_becomes_shards_and_a_restart_keeps_what_is_done(folder, tmp_path):
    config = folder_config(folder, tmp_path)
    device = torch.device("cpu")
    precompute(config, device)
    index = read_index(config.data.index)
    assert (index.provenance.samples, sum(index.counts), index.provenance.classes) == (18, 18, 2)
    made = index.provenance
    assert (made.kind, made.dtype, made.shape, made.class_counts) == ("moments", "float16", (8, 8, 8), (8, 10))
    labels = np.concatenate([index.rows(shard)["label"] for shard in range(len(index.shards))])
    assert np.bincount(labels).tolist() == [8, 10]
    directory = tmp_path / "latents"
    whole = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert b"n01/pic_0_m.npy" in b"".join(whole.values()), "a mirrored image by its key"

    for name in ("index.json", "latents-000001.json"):
        (directory / name).unlink()
    (directory / "latents-000003.tar").write_bytes(b"damaged")
    (directory / "latents-000002.rows.npy").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in directory.iterdir() if path.is_file()}
    precompute(config, device)
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == whole
    kept = {name for name in times if (directory / name).stat().st_mtime_ns == times[name] and name.endswith(".tar")}
    assert kept == {f"latents-{number:06d}.tar" for number in (0, 4, 5)}, "no original is made again with its mirror"

    precompute(folder_config(folder, tmp_path, "data.samples_per_shard=5", "seed=99"), device)
    other = read_index(config.data.index)
    assert sum(other.counts) == 18, "shards of another cut are not taken for finished"


def test_a_configuration_for_another_command_is_refused(folder, tmp_path):
    pixels = ["data.space=pixels", "autoencoder=null", "model.in_chans=3", "model.img_size=32"]
    text = ["model.num_classes=-1", "diffusion.null_label=null", "model.clip_dim=64", "text={encoder: nowhere}",
            "data.format=coco", "data.captions=nowhere", "sample.cfg_scale=1.0"]  # fmt: skip
    for changes, remedy in ((pixels, "use data_tools.pack_images"), (text, "use data_tools.precompute_text")):
        with pytest.raises(ConfigError, match=f"not for data_tools.precompute_latents; {remedy}"):
            precompute(folder_config(folder, tmp_path, *changes), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"data\.image_size 34 must be divisible by the autoencoder's factor 4"):
        precompute(folder_config(folder, tmp_path, "data.image_size=34"), torch.device("cpu"))


def test_a_reference_of_images_without_labels_has_no_accuracy(folder, tmp_path):
    config = folder_config(folder, tmp_path, "evaluate.neighbours=1")
    write_reference(config)
    labelled = dict(np.load(config.evaluate.reference))
    assert labelled["labels"].tolist().count(0) == 4
    for path in list(folder.rglob("*.png")):
        path.rename(folder / f"{path.parent.name}-{path.name}")
    write_reference(config)
    bare = dict(np.load(config.evaluate.reference))
    assert labelled.keys() - bare.keys() == {"labels", "class_accuracy_halves"}
    assert np.allclose(np.sort(labelled["features"], 0), np.sort(bare["features"], 0))


@pytest.mark.slow
def test_the_command_explains_a_mistake(tmp_path):
    command = [sys.executable, "-m", "data_tools.precompute_latents", "--config", str(DEMO),
               f"data.index={tmp_path}/index.json", "autoencoder.encoder=nowhere.pth"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 66
    assert "error: autoencoder.encoder nowhere.pth: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "index.json").exists()


def test_moments_that_do_not_fit_the_type_are_refused(folder, tmp_path, monkeypatch):
    config = folder_config(folder, tmp_path)
    from uvit_dist.models.autoencoder import Autoencoder

    monkeypatch.setattr(Autoencoder, "encode_moments", lambda self, x: torch.full((len(x), 8, 8, 8), 1e6))
    with pytest.raises(DataError, match=r"moments are not finite in float16; set data\.moments_dtype float32"):
        precompute(config, torch.device("cpu"))
    assert not (tmp_path / "latents" / "index.json").exists()
    precompute(folder_config(folder, tmp_path, "data.moments_dtype=float32"), torch.device("cpu"))
    assert json.loads((tmp_path / "latents" / "index.json").read_text())["provenance"]["dtype"] == "float32"
    monkeypatch.setattr(Autoencoder, "encode_moments", lambda self, x: torch.full((len(x), 8, 8, 8), torch.inf))
    with pytest.raises(DataError, match=r"moments are not finite; mend or remove"):
        precompute(folder_config(folder, tmp_path, "data.moments_dtype=float32", "seed=1"), torch.device("cpu"))
