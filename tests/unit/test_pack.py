"""Shards of pixels, shards of the official features, and the scale factor measured on shards."""

import io
import json
import pickle
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools.latent_scale import measure
from data_tools.official_features import read_npy
from data_tools.pack_images import make as pack_images
from data_tools.pack_latents import file_number
from data_tools.pack_latents import pack as pack_latents
from data_tools.sources import DigitsSource
from tests.tiny import tiny_config
from uvit_dist.data.latents import Provenance, Sample
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import read_index, write_index, write_shard
from uvit_dist.errors import ConfigError, DataError, MissingInputError

SHAPE = (8, 8, 8)
PIXELS = ["data.space=pixels", "autoencoder=null", "model.in_chans=3", "model.img_size=32", "data.mirror=true",
          "data.samples_per_shard=64"]  # fmt: skip


def read_all(config):
    index = read_index(config.data.index)
    return index, SampleReader(index, 0).read_ids(np.arange(index.provenance.samples))


def keys_of(index):
    """Keys of all samples in order of their ids, from the tars themselves."""
    names = []
    for shard in range(len(index.shards)):
        with tarfile.open(index.shard_path(shard)) as tar:
            names += [name.removesuffix(".cls") for name in tar.getnames() if name.endswith(".cls")]
    return names


def test_pixels_are_stored_once_as_they_are(tmp_path, monkeypatch):
    source = DigitsSource()
    source.keys, source.labels = source.keys[:230], source.labels[:230]
    monkeypatch.setattr(sys.modules[pack_images.__module__], "open_images", lambda config: source)
    config = tiny_config(tmp_path, tmp_path, *PIXELS)
    pack_images(config)
    index, batch = read_all(config)
    made = index.provenance
    assert (made.kind, made.dtype, made.shape, made.mirror, made.samples) == (
        "pixels",
        "uint8",
        (3, 32, 32),
        False,
        230,
    )
    assert made.class_counts == tuple(np.bincount(source.labels))
    assert [record.name for record in index.shards] == [f"images-{n:06d}.tar" for n in range(4)]
    assert (made.autoencoder, made.encoder_fingerprint, made.scale_factor) == (None, None, None)
    numbers = [source.keys.index(key) for key in keys_of(index)]
    assert numbers != sorted(numbers)
    assert batch.labels.tolist() == [source.labels[n] for n in numbers]
    assert all(np.array_equal(x.permute(1, 2, 0), source.load(n)) for x, n in zip(batch.data, numbers, strict=True))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    pack_images(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == times
    with pytest.raises(ConfigError, match=r"data\.space latents, .*not for data_tools\.pack_images; use .*ute_latents"):
        pack_images(tiny_config(tmp_path, tmp_path))


def old_npy(path, moments, label):
    """What ``np.save(path, (moments, label))`` of numpy 1.23 writes: protocol 3, and the old name of numpy's core."""
    array = np.empty(2, dtype=object)
    array[0], array[1] = moments, label
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": (2,)})
    path.write_bytes(out.getvalue() + pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core"))


def official_imagenet(folder, images, batch):
    """Batches of originals and then of their mirror images, in one numbering; labels sorted, two images of each."""
    folder.mkdir()
    draw, idx, written = np.random.default_rng(0), 0, {}
    for first in range(0, images, batch):
        for mirrored in (False, True):
            for number in range(first, min(images, first + batch)):
                moments = draw.standard_normal(SHAPE).astype(np.float32)
                old_npy(folder / f"{idx}.npy", moments, np.int64(number // 2))
                written[f"{number:07d}{'_m' * mirrored}"] = (moments, number // 2)
                idx += 1
    return written


def features_config(tmp_path, *more):
    return tiny_config(tmp_path / "out", tmp_path / "run", "data.format=folder", "data.source=unused",
                       "data.mirror=true", "data.moments_dtype=float32", "data.samples_per_shard=5", *more)  # fmt: skip


def test_official_features_of_imagenet_become_shards(tmp_path):
    written = official_imagenet(tmp_path / "features", images=14, batch=4)
    config = features_config(tmp_path)
    pack_latents(config, str(tmp_path / "features"), 4)
    index, batch = read_all(config)
    made, keys = index.provenance, keys_of(index)
    assert sorted(keys) == sorted(written)
    assert all(np.array_equal(data, written[key][0]) for data, key in zip(batch.data, keys, strict=True))
    assert batch.labels.tolist() == [written[key][1] for key in keys]
    assert (made.dtype, made.mirror, made.classes, made.class_counts) == ("float32", True, 10, (4,) * 7 + (0,) * 3)
    assert (made.source, made.text) == ("official features features 28", None)
    cut = np.split(np.array([key[:7] for key in keys]), np.cumsum(index.counts)[:-1])
    assert [len(shard) for shard in cut] == [5, 5, 4] * 2
    assert all(len(set(shard)) == len(shard) for shard in cut), "an image and its mirror image are apart"

    half = features_config(tmp_path, "data.moments_dtype=float16", f"data.index={tmp_path}/half/index.json")
    pack_latents(half, str(tmp_path / "features"), 4)
    assert torch.equal(read_all(half)[1].data, batch.data.half())


def test_files_are_numbered_as_the_official_extraction_does():
    images, batch = 600, 256
    order = [(n, m) for first in range(0, images, batch) for m in (False, True)
             for n in range(first, min(images, first + batch))]  # fmt: skip
    assert [file_number(item, images, batch) for item in order] == list(range(2 * images))
    assert [file_number((n, False), 20, 20) for n in range(20)] == list(range(20)), "without mirror images"


def test_what_is_wrong_with_features_is_said(tmp_path):
    official_imagenet(tmp_path / "features", images=14, batch=4)
    folder, config = str(tmp_path / "features"), features_config(tmp_path)
    with pytest.raises(MissingInputError, match=r"--features nowhere: no such folder"):
        pack_latents(config, "nowhere", 4)
    with pytest.raises(DataError, match=r"should be an image and its mirror image, .*correct --mirrored-batches 7"):
        pack_latents(config, folder, 7)
    with pytest.raises(ConfigError, match=r"--mirrored-batches 0: must be at least 1"):
        pack_latents(config, folder, 0)
    with pytest.raises(
        DataError, match=r"float32 \(8, 8, 8\), and model\.in_chans and model\.img_size ask for .*16, 16"
    ):
        pack_latents(features_config(tmp_path, "model.img_size=16"), folder, 4)
    with pytest.raises(DataError, match=r"label [3-6], and model\.num_classes 4 leaves 3 classes"):
        pack_latents(features_config(tmp_path, "model.num_classes=4", "diffusion.null_label=3"), folder, 4)
    with pytest.raises(ConfigError, match=r"data\.space pixels: .*use data_tools\.pack_images"):
        pack_latents(tiny_config(tmp_path, tmp_path, *PIXELS), folder, 4)
    elsewhere = "autoencoder.encoder=nowhere.pth"
    with pytest.raises(ConfigError, match=r"nowhere\.pth: no such file, .* as autoencoder\.encoder_fingerprint"):
        pack_latents(features_config(tmp_path, elsewhere), folder, 4)
    with pytest.raises(ConfigError, match=r"its hash is 5adb2115.*, autoencoder\.encoder_fingerprint says abc"):
        pack_latents(features_config(tmp_path, "autoencoder.encoder_fingerprint=abc"), folder, 4)
    with pytest.raises(DataError, match=r"holds no contexts of captions, and model\.clip_dim needs them"):
        pack_latents(coco_features_config(tmp_path), folder, 4)
    given = features_config(tmp_path, elsewhere, "autoencoder.encoder_fingerprint=abc")
    pack_latents(given, folder, 4)
    assert read_index(given.data.index).provenance.encoder_fingerprint == "abc"
    (tmp_path / "features" / "27.npy").unlink()
    with pytest.raises(DataError, match=r"27 files, an odd number, and with data\.mirror half are mirror images"):
        pack_latents(config, folder, 4)
    for number in (3, 9, 10, 11):
        (tmp_path / "features" / f"{number}.npy").unlink()
    with pytest.raises(DataError, match=r"4 files are missing \(the first: 3\.npy, 9\.npy, 10\.npy\)"):
        pack_latents(config, folder, 4)


class Shout:
    def __reduce__(self):
        return print, ("a pickle ran this",)

    def __repr__(self):
        return "Shout()"


@pytest.mark.parametrize("content", [Shout(), np.array([Shout(), 1], dtype=object), b"bytes", {"a": 1}], ids=str)
def test_pickles_of_anything_but_arrays_are_refused(tmp_path, capsys, content):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|O", "fortran_order": False, "shape": (2,)})
    (tmp_path / "0.npy").write_bytes(out.getvalue() + pickle.dumps(content, protocol=3))
    with pytest.raises(DataError, match=r"0\.npy: not an array, or a damaged one"):
        read_npy(str(tmp_path / "0.npy"))
    assert capsys.readouterr().out == ""


def test_damaged_features_are_named(tmp_path):
    old_npy(tmp_path / "0.npy", np.zeros(SHAPE, np.float32), np.int64(3))
    whole = (tmp_path / "0.npy").read_bytes()
    assert read_npy(str(tmp_path / "0.npy"))[1] == 3
    for length in (0, 5, 100, 140, 300, len(whole) - 1):
        (tmp_path / "0.npy").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"0\.npy: not an array, or a damaged one"):
            read_npy(str(tmp_path / "0.npy"))
    np.save(tmp_path / "0.npy", np.arange(5.0))
    assert read_npy(str(tmp_path / "0.npy")).tolist() == [0, 1, 2, 3, 4]


def coco_features_config(tmp_path, *more):
    return features_config(tmp_path, "data.format=coco", "data.captions=unused", "data.mirror=false", "data.crop=coco",
                           "model.num_classes=-1", "diffusion.null_label=null", "model.clip_dim=16",
                           "data.contexts_dtype=float32", "text.encoder=nowhere", *more)  # fmt: skip


def official_coco(folder):
    folder.mkdir(parents=True)
    draw, written = np.random.default_rng(1), {}
    for number, captions in enumerate((2, 1, 3, 1, 2, 2)):
        written[number] = [draw.standard_normal(SHAPE).astype(np.float32)]
        np.save(folder / f"{number}.npy", written[number][0])
        for k in range(captions):
            written[number].append(draw.standard_normal((77, 16)).astype(np.float32))
            np.save(folder / f"{number}_{k}.npy", written[number][-1])
    written["empty"] = draw.standard_normal((77, 16)).astype(np.float32)
    np.save(folder.parent / "empty_context.npy", written["empty"])
    return written


def test_official_features_of_coco_become_shards(tmp_path):
    written = official_coco(tmp_path / "coco256_features" / "train")
    folder, config = str(tmp_path / "coco256_features" / "train"), coco_features_config(tmp_path)
    with pytest.raises(ConfigError, match=r"features of COCO hold no mirror images; set data\.mirror false"):
        pack_latents(coco_features_config(tmp_path, "data.mirror=true"), folder, 256)
    pack_latents(config, folder, 256)
    index, batch = read_all(config)
    keys = [int(key) for key in keys_of(index)]
    assert sorted(keys) == list(range(6))
    assert all(np.array_equal(data, written[key][0]) for data, key in zip(batch.data, keys, strict=True))
    assert batch.labels.tolist() == [-1] * 6
    assert np.array_equal(index.empty_context(), written["empty"])
    text = index.provenance.text
    assert (text.encoder_fingerprint, text.dtype, text.shape) == ("unknown", "float32", (77, 16))
    reader, drawn = SampleReader(index, 0), {key: set() for key in keys}
    for epoch in range(40):
        for key, context in zip(keys, reader.read_ids(np.arange(6), epoch).contexts.numpy(), strict=True):
            drawn[key] |= {k for k, own in enumerate(written[key][1:]) if np.array_equal(own, context)}
    assert {key: len(ks) for key, ks in drawn.items()} == {key: len(written[key]) - 1 for key in keys}


def test_coco_features_that_are_not_whole_are_refused(tmp_path):
    folder = tmp_path / "coco256_features" / "train"
    official_coco(folder)
    with pytest.raises(DataError, match=r"holds contexts of captions, and without model\.clip_dim there are labels"):
        pack_latents(features_config(tmp_path), str(folder), 256)
    (folder.parent / "empty_context.npy").rename(tmp_path / "empty_context.npy")
    with pytest.raises(MissingInputError, match=r"no empty_context\.npy in it or one folder up"):
        pack_latents(coco_features_config(tmp_path), str(folder), 256)
    (tmp_path / "empty_context.npy").rename(folder / "empty_context.npy")
    np.save(folder / "3_0.npy", np.zeros((77, 15), np.float32))
    with pytest.raises(DataError, match=r"3_0\.npy: float32 \(77, 15\), and model\.num_clip_token and model\.clip_dim"):
        pack_latents(coco_features_config(tmp_path), str(folder), 256)
    np.save(folder / "3_0.npy", np.full((77, 16), 1e6, np.float32))
    with pytest.raises(DataError, match=r"3_\*\.npy: contexts are not finite in float16; set data\.contexts_dtype"):
        pack_latents(coco_features_config(tmp_path, "data.contexts_dtype=float16"), str(folder), 256)
    for name, lacking in (("2_1", "2_1"), ("3_0", "3_0"), ("5", "5")):
        (folder / f"{name}.npy").unlink()
        with pytest.raises(DataError, match=rf"1 files are missing \(the first: {lacking}\.npy\)"):
            pack_latents(coco_features_config(tmp_path), str(folder), 256)
        np.save(folder / f"{name}.npy", np.zeros((77, 16) if "_" in name else SHAPE, np.float32))


def made_of(tmp_path, mean, std, scale_factor, samples=600):
    made = Provenance(kind="moments", dtype="float32", shape=SHAPE, source="a test", image_size=64, crop="none",
                      mirror=False, classes=0, samples=samples, scale_factor=scale_factor)  # fmt: skip
    moments = np.empty(SHAPE, np.float32)
    moments[:4], moments[4:] = mean, 2 * np.log(std)
    shards = [[Sample(f"{n:03d}", -1, moments) for n in range(s, samples, 3)] for s in range(3)]
    records = [write_shard(str(tmp_path), f"latents-{s}", shard, made) for s, shard in enumerate(shards)]
    write_index(str(tmp_path / "index.json"), records, made)
    return read_index(str(tmp_path / "index.json"))


def test_the_scale_factor_is_one_over_the_std_of_drawn_latents(tmp_path):
    index = made_of(tmp_path / "a", mean=3.0, std=5.0, scale_factor=1.0)
    found = measure(index, None, seed=0)
    assert found["scale_factor"] == pytest.approx(0.2, rel=0.01)
    assert found["std"] == pytest.approx(5.0, rel=0.01)
    assert found["mean"] == pytest.approx(3.0, abs=0.05)
    assert found["samples"] == 600
    other = replace(index, provenance=replace(index.provenance, scale_factor=0.18215))
    assert measure(other, None, seed=0) == found
    assert measure(index, None, seed=1) != found
    part = measure(index, 200, seed=0)
    assert part["samples"] == 200
    assert part["std"] == pytest.approx(5.0, rel=0.02)
    assert part["std"] != found["std"]
    spread = made_of(tmp_path / "c", np.linspace(-6, 6, 4)[:, None, None], std=1e-3, scale_factor=1.0)
    assert measure(spread, None, 0)["std"] == pytest.approx(np.linspace(-6, 6, 4).std(), rel=0.001), "the means' count"


def test_what_cannot_be_measured_is_said(tmp_path):
    index = made_of(tmp_path, 0.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"--samples 601: .* holds 600; give 1…600"):
        measure(index, 601, 0)
    tar = tmp_path / "latents-1.tar"
    content = bytearray(tar.read_bytes())
    content[int(index.rows(1)["offset"][4])] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"latents-1\.tar: the sample at byte \d+ differs"):
        measure(index, None, 0)
    tree = json.loads((tmp_path / "index.json").read_text())
    tree["provenance"]["kind"] = "pixels"
    (tmp_path / "index.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"holds pixels; only latents have a scale factor"):
        measure(read_index(str(tmp_path / "index.json")), None, 0)
