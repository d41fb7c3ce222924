"""The fast crops against plain ones: the same bytes, for images of any size and content."""

import math

import numpy as np
import pytest
from PIL import Image

from data_tools import resample
from data_tools.crops import CROPS, fast_adm_crop, fast_coco_crop
from tests.golden_values import GOLDEN
from uvit_dist.compiled import library

GOLDEN_CROPS = np.load(GOLDEN / "crops.npz")
EDGES = [(1, 1), (1, 7), (3, 2), (31, 32), (63, 64), (64, 64), (65, 129), (128, 128), (127, 255), (256, 1024),
         (513, 40), (2, 900), (1025, 1027), (768, 2048), (1536, 1537)]  # fmt: skip


def plain_adm(image, size):
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    whole = np.array(image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC))
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    return whole[top : top + size, left : left + size]


def plain_coco(image, size):
    pixels = np.array(image)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.array(square.resize((size, size), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def photographs():
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def image_of(draw, photographs, width, height):
    """Noise, black and white noise, or a part of a photograph."""
    kind = draw.integers(3)
    if kind == 0:
        return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if kind == 1:
        return Image.fromarray(draw.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)
    photograph = Image.fromarray(photographs[draw.integers(len(photographs))])
    return photograph.resize((width, height), Image.Resampling.BILINEAR)


def test_the_kernel_is_used_where_there_is_a_compiler():
    import shutil

    assert resample.agrees_with_pillow() == (shutil.which("cc") is not None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_fast_crops_have_the_bytes_of_plain_ones(photographs, size):
    draw = np.random.default_rng(size)
    sizes = [*EDGES, *(tuple(int(2 ** draw.uniform(2, 10.7)) for _ in range(2)) for _ in range(60))]
    sizes = [pair for pair in sizes if max(pair) / min(pair) * size < 40_000]
    assert len(sizes) > 60
    for width, height in sizes:
        image = image_of(draw, photographs, width, height)
        assert np.array_equal(fast_adm_crop(image, size), plain_adm(image, size)), f"adm, {width}x{height}"
        assert np.array_equal(fast_coco_crop(image, size), plain_coco(image, size)), f"coco, {width}x{height}"
        assert np.array_equal(fast_adm_crop(np.asarray(image), size), plain_adm(image, size)), "an array"


def test_other_modes_are_made_rgb_and_arrays_need_not_be_whole(photographs):
    for mode in ("L", "P", "RGBA", "CMYK"):
        image = Image.fromarray(photographs[0]).convert(mode)
        assert np.array_equal(fast_adm_crop(image, 64), plain_adm(image.convert("RGB"), 64))
    part = photographs[1][13:340, 29:601]
    assert np.array_equal(fast_adm_crop(part, 256), plain_adm(Image.fromarray(part), 256))
    assert np.array_equal(fast_coco_crop(part[:200], 64), plain_coco(Image.fromarray(part[:200]), 64))


@pytest.mark.parametrize("case", [0, 1, 2, 3])
@pytest.mark.parametrize(("crop", "name"), [("adm", "imagenet_crop"), ("coco", "coco_crop")])
def test_fast_crops_are_the_golden_ones(crop, name, case):
    pixels = CROPS[crop](Image.fromarray(GOLDEN_CROPS[f"image{case}"]), int(GOLDEN_CROPS[f"size{case}"]))
    assert np.abs(pixels.astype(int) - GOLDEN_CROPS[f"{name}{case}"].astype(int)).max() <= 1


def test_without_a_compiler_pillow_does_the_work(monkeypatch, tmp_path, photographs):
    image = Image.fromarray(photographs[0])
    for cached in (resample.kernel, resample.agrees_with_pillow):
        cached.cache_clear()
    try:
        monkeypatch.setenv("CC", "no-such-compiler")
        monkeypatch.setenv("UVIT_DIST_CACHE", str(tmp_path))
        assert not resample.agrees_with_pillow()
        assert np.array_equal(fast_adm_crop(image, 200), plain_adm(image, 200))
        assert np.array_equal(fast_coco_crop(np.asarray(image), 200), plain_coco(image, 200))
    finally:
        for cached in (resample.kernel, resample.agrees_with_pillow):
            cached.cache_clear()


@pytest.mark.parametrize("size", [48, 300])
def test_processors_without_avx2_make_the_same_bytes(monkeypatch, photographs, size):
    """resample.c has one way with its instructions, and one for all others."""
    code = library(resample.SOURCE, "-DPORTABLE")
    resample.declare(code)
    monkeypatch.setattr(resample, "kernel", lambda: code)
    for width, height in [(75, 50), (301, 331), (333, 444), (640, 427)]:
        image = Image.fromarray(photographs[0]).resize((width, height))
        for given in (image, np.asarray(image)):
            assert np.array_equal(fast_adm_crop(given, size), plain_adm(image, size))
            assert np.array_equal(fast_coco_crop(given, size), plain_coco(image, size))


def test_another_arithmetic_is_noticed(monkeypatch, caplog):
    resample.agrees_with_pillow.cache_clear()
    other = resample.Filter(resample.BICUBIC.weight, 2.0, Image.Resampling.BILINEAR)
    monkeypatch.setattr(resample, "BICUBIC", other)
    assert not resample.agrees_with_pillow()
    assert "another way" in caplog.text
    monkeypatch.undo()
    resample.agrees_with_pillow.cache_clear()


def test_what_an_axis_comes_from_is_as_short_as_the_filter_allows():
    part = resample.axis(1000, 500, resample.BICUBIC, 100, 200)
    assert (part.begin_in, part.end_in) == (197, 403)
    assert math.isclose(part.coefficients.sum(axis=1).mean() / 2**resample.PRECISION, 1.0, abs_tol=1e-6)
