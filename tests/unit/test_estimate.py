"""What --dry-run says against what is made, and FLOP against a count by hand."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from data_tools.digits import digits_images
from data_tools.estimate import (
    GET_DOLLARS,
    PUT_DOLLARS,
    TFLOPS,
    UNIT_REQUESTS,
    UPLOAD_PART,
    Requests,
    encoder_flop,
    estimate,
)
from data_tools.precompute_latents import open_encoder
from tests.tiny import tiny_config
from uvit_dist.data.latents import Provenance, Sample, TextProvenance
from uvit_dist.data.shards import write_shard
from uvit_dist.models.autoencoder import Autoencoder


def config_of(tmp_path, *more):
    return tiny_config(tmp_path / "latents", tmp_path / "run", *more)


def files(directory, suffix):
    return sum(path.stat().st_size for path in directory.iterdir() if path.name.endswith(suffix))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bytes_are_those_of_the_shards(tmp_path, mirror, dtype):
    config = config_of(tmp_path, "data.samples_per_shard=7", f"data.mirror={str(mirror).lower()}",
                       f"data.moments_dtype={dtype}")  # fmt: skip
    autoencoder = open_encoder(config, torch.device("cpu"))
    found = estimate(config, 17, None, 1000, autoencoder, None, 3.0)
    side = 32 // autoencoder.factor
    shape = (2 * autoencoder.latent_channels, side, side)
    made = Provenance(kind="moments", dtype=dtype, shape=shape, source="drawn", image_size=32, crop="none",
                      mirror=mirror, classes=10, samples=17 * (1 + mirror), encoder_fingerprint="0" * 64)  # fmt: skip
    for number, count in enumerate([7, 7, 3] * (1 + mirror)):
        samples = [Sample(f"digit-{i:04d}", i, np.zeros(shape, dtype)) for i in range(count)]
        write_shard(str(tmp_path / "made"), f"latents-{number:06d}", samples, made)
    assert found.tar_bytes == files(tmp_path / "made", ".tar")
    assert found.table_bytes == files(tmp_path / "made", ".npy")
    assert 0.5 < found.sidecar_bytes / files(tmp_path / "made", ".json") < 2
    assert (found.samples, found.shards) == (17 * (1 + mirror), 3 * (1 + mirror))
    assert found.input_requests == found.output_requests == Requests(0, 0)


def test_bytes_with_captions(tmp_path):
    captions = ["x" * 60] * 5
    config = config_of(tmp_path, "data.samples_per_shard=4", "data.mirror=false", "model.num_classes=-1",
                       "diffusion.null_label=null", "model.clip_dim=64", "text={encoder: nowhere}",
                       "data.format=coco", "data.source=here", "data.captions=nowhere", "data.image_size=32",
                       "sample.cfg_scale=1.0")  # fmt: skip
    autoencoder = open_encoder(config, torch.device("cpu"))
    found = estimate(config, 4, 18, None, autoencoder, None, 3.0)
    shape = (2 * autoencoder.latent_channels, 8, 8)
    text = TextProvenance("unknown", "float16", (77, 64), "0" * 64)
    made = Provenance(kind="moments", dtype="float16", shape=shape, source="drawn", image_size=32, crop="coco",
                      mirror=False, classes=0, samples=4, text=text)  # fmt: skip
    counts = [4, 5, 4, 5]
    samples = [Sample(f"image-{n}", -1, np.zeros(shape, "float16"), captions[:count],
                      np.zeros((count, 77, 64), "float16")) for n, count in enumerate(counts)]  # fmt: skip
    write_shard(str(tmp_path / "made"), "latents-000000", samples, made)
    assert found.tar_bytes == files(tmp_path / "made", ".tar")
    assert found.table_bytes == files(tmp_path / "made", ".npy")


def test_requests_of_s3_and_their_price(tmp_path):
    config = config_of(tmp_path, "data.format=folder", "data.source=s3://bucket/images", "data.mirror=true",
                       "data.index=s3://bucket/latents/index.json", "data.samples_per_shard=4096")  # fmt: skip
    found = estimate(config, 10_000, None, 10**9, None, None, 3.0)
    assert found.input_requests == Requests(10_000, 10)
    assert found.tar_bytes / 6 < 2 * UPLOAD_PART
    files_made = 6 * 3
    assert found.output_requests == Requests(files_made, files_made + 1 + 3 * UNIT_REQUESTS + 1), (
        "files, listing, units, index"
    )
    assert found.input_requests.dollars == pytest.approx(10_000 * GET_DOLLARS + 10 * PUT_DOLLARS)
    large = config_of(tmp_path, "data.index=s3://bucket/latents/index.json", "data.samples_per_shard=200000",
                      "data.mirror=false")  # fmt: skip
    found = estimate(large, 200_000, None, None, None, None, 3.0)
    parts = -(-found.tar_bytes // UPLOAD_PART)
    assert parts > 2
    assert found.output_requests.puts == 2 + parts + 2 + 1 + UNIT_REQUESTS + 1


class Stack(nn.Module):
    """Two convolutions, the second one halving."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 8, 3, stride=2, padding=1)

    def forward(self, x):
        return self.two(self.one(x))


def test_flop_of_a_stack_by_hand(tmp_path):
    config = config_of(tmp_path)
    autoencoder = open_encoder(config, torch.device("cpu"))
    autoencoder.vae.encoder, autoencoder.vae.quant_conv = Stack(), nn.Conv2d(8, 8, 1)
    expected = 2 * (9 * 3 * 5 * 32 * 32 + 9 * 5 * 8 * 16 * 16 + 8 * 8 * 16 * 16)
    assert encoder_flop(autoencoder, 32) == expected
    found = estimate(config, 1000, None, None, autoencoder, 2.0, 4.0)
    passes = 1 + config.data.mirror
    assert found.gpu_hours == pytest.approx(expected * passes * 1000 / 2e12 / 3600)
    assert "as given" in found.describe()[-1]


def test_stable_diffusions_encoder_attention_counted():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
    flop = encoder_flop(Autoencoder(vae), 256)
    assert 0.27e12 < flop < 0.28e12, "4 convolutions of 3x3 on each level, 2 x 9.7 GFLOP each where width goes 1, 2, 4"
    tokens, width = 32 * 32, 512
    without = vae.encoder.mid_block.attentions[0]
    vae.encoder.mid_block.attentions[0] = None
    attention = 2 * (4 * tokens * width * width + 2 * tokens * tokens * width)
    assert without is not None
    assert encoder_flop(Autoencoder(vae), 256) == flop - attention


def test_what_it_says(tmp_path):
    config = config_of(tmp_path, "data.index=s3://bucket/latents/index.json")
    autoencoder = open_encoder(config, torch.device("cpu"))
    found = estimate(config, len(digits_images()[1]), None, 10**6, autoencoder, None, 3.0)
    text = "\n".join(found.describe())
    assert found.tflops == TFLOPS["fp32"]
    for part in ("1,797", "samples in", "input     1.0 MB", "PUT or LIST", "a month", "an assumption", "$3.00 an hour"):
        assert part in text, text
    pixels = config_of(tmp_path, "data.space=pixels", "autoencoder=null", "model.in_chans=3", "model.img_size=32")
    found = estimate(pixels, 100, None, None, None, None, 3.0)
    assert (found.samples, found.gpu_hours) == (100, None)
    assert not any("GPU" in line for line in found.describe())
