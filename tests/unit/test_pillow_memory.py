"""Pixels of Pillow's images without a copy."""

import gc
import resource
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.pillow_memory import rgb_pixels


def photograph(height=40, width=60):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resident():
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_pixels_are_those_of_the_image():
    expected = photograph()
    image = Image.fromarray(expected)
    pixels = rgb_pixels(image)
    assert pixels.shape == (40, 60, 4)
    assert np.array_equal(pixels[:, :, :3], expected)
    assert not pixels.flags.writeable
    image.putpixel((5, 7), (1, 2, 3))
    assert pixels[7, 5, :3].tolist() == [1, 2, 3], "not a copy"


def test_pixels_outlive_the_image():
    expected = photograph()
    pixels = rgb_pixels(Image.fromarray(expected))[3:30, 4:]
    gc.collect()
    others = [Image.new("RGB", (60, 40), (n, n, n)) for n in range(50)]
    assert np.array_equal(pixels[:, :, :3], expected[3:30, 4:])
    assert len(others) == 50


def test_memory_is_given_back():
    """200 images of 6 MB, one after the other."""
    before = resident()
    for n in range(200):
        pixels = rgb_pixels(Image.new("RGB", (1500, 1000), (n, 0, 0)))
        assert pixels[999, 1499, 0] == n
        del pixels
    assert resident() - before < 200e6


def test_an_image_of_several_pieces_is_copied():
    expected = photograph(2100, 2200)
    pixels = rgb_pixels(Image.fromarray(expected))
    assert pixels.shape == (2100, 2200, 3)
    assert np.array_equal(pixels, expected)


def test_an_older_pillow_copies(monkeypatch):
    expected = photograph()
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    assert np.array_equal(rgb_pixels(Image.fromarray(expected)), expected)
