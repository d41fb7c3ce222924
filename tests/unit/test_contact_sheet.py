"""The picture of originals and what is decoded of their moments: it tells the right autoencoder from a wrong one."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.contact_sheet import WIDEST, contact_sheet, make_contact_sheet, psnr, read_sample
from data_tools.precompute_latents import open_encoder
from data_tools.sources import open_source
from data_tools.units import plan_units
from tests.tiny import tiny_config
from uvit_dist.data.latents import Provenance, Sample, pixels_to_x0
from uvit_dist.data.shards import read_index, write_index, write_shard
from uvit_dist.errors import DataError

CPU = torch.device("cpu")


def planned():
    """The shards of 24 images, eight in each, in the order of the index."""
    return sorted((shard for unit in plan_units(24, True, 8, 1) for shard in unit.shards), key=lambda shard: shard.name)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The index of 24 digits and their mirror images, eight to a shard, as the job lays them out."""
    directory = tmp_path_factory.mktemp("sheet")
    config = tiny_config(directory / "latents", directory / "run", "data.mirror=true")
    source, autoencoder = open_source(config.data), open_encoder(config, CPU)
    shape = (2 * autoencoder.latent_channels, 8, 8)
    provenance = Provenance(kind="moments", dtype="float16", shape=shape, source="digits", image_size=32, crop="none",
                            mirror=True, classes=10, samples=48)  # fmt: skip
    records = []
    for shard in planned():
        pixels = torch.from_numpy(np.stack([source.load(n) for n in shard.images])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            moments = autoencoder.encode_moments(pixels_to_x0(pixels, torch.full((8,), shard.mirrored)))
        samples = [
            Sample(key, 0, sample.numpy().astype(np.float16))
            for key, sample in zip(shard.keys(source.keys), moments, strict=True)
        ]
        records.append(write_shard(str(directory / "latents"), shard.name, samples, provenance))
    write_index(config.data.index, records, provenance)
    return config, read_index(config.data.index), source, autoencoder


def test_the_right_autoencoder_is_told_from_random_weights(made):
    config, index, source, autoencoder = made
    found = make_contact_sheet(config, index, source, autoencoder, CPU, 12)
    assert len(found) == 12
    assert min(found) > 30, found
    path = index.path.replace("index.json", "contact_sheet.png")
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert 0.5 < sheet.width / sheet.height < 2
    torch.manual_seed(0)
    wrong = open_encoder(config, CPU)
    for module in wrong.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert max(make_contact_sheet(config, index, source, wrong, CPU, 12)) < 10


def test_samples_are_those_that_were_written(made):
    _, index, source, _ = made
    plan = planned()
    for shard, row in ((0, 0), (0, 7), (3, 0), (5, 4)):
        key, data = read_sample(index, shard, row)
        assert key == plan[shard].keys(source.keys)[row]
        assert data.shape == index.provenance.shape


def test_keys_longer_than_a_tar_header_has_room_for(tmp_path):
    keys = ["n01440764/" + "x" * 150 + str(number) for number in range(3)]
    made = Provenance(kind="moments", dtype="float32", shape=(2, 1, 1), source="drawn", image_size=8, crop="none",
                      mirror=False, classes=10, samples=3)  # fmt: skip
    samples = [Sample(key, number, np.full((2, 1, 1), number, np.float32)) for number, key in enumerate(keys)]
    write_index(str(tmp_path / "index.json"), [write_shard(str(tmp_path), "latents-000000", samples, made)], made)
    index = read_index(str(tmp_path / "index.json"))
    found = [read_sample(index, 0, row) for row in range(3)]
    assert [(key, float(data.sum())) for key, data in found] == [(key, 2.0 * n) for n, key in enumerate(keys)]


def test_a_sample_of_no_image_is_refused(made):
    config, index, source, autoencoder = made

    class Other:
        name, keys = "others", [f"x{key}" for key in source.keys]

    with pytest.raises(DataError, match="no image of others has the key digit-"):
        make_contact_sheet(config, index, Other(), autoencoder, CPU, 3)


@pytest.mark.parametrize(("count", "side"), [(1, 32), (16, 512), (5, 64), (30, 256)])
def test_sheets_are_near_square_and_not_too_wide(count, side):
    draw = np.random.default_rng(0)
    originals = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    decoded = np.clip(originals.astype(int) + 5, 0, 255).astype(np.uint8)
    sheet, found = contact_sheet(originals, decoded)
    assert sheet.width <= WIDEST
    assert count == 1 or 0.5 <= sheet.width / sheet.height <= 2
    assert all(34 < value < 35 for value in found)


def test_psnr_by_hand():
    zeros = np.zeros((2, 2, 3), np.uint8)
    assert psnr(zeros, zeros) == math.inf
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(zeros, zeros + 255) == 0.0
    sheet, found = contact_sheet(zeros[None], zeros[None], ["a very long key that cannot be written below"])
    assert found == [math.inf]
    assert sheet.width < 400
