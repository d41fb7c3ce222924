"""Images on the host as an encoder takes them: the same bits as ``pixels_to_x0``, in memory used again."""

import pytest
import torch

from data_tools.x0 import HostImages, kernel
from uvit_dist.data.latents import pixels_to_x0


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("mirrored", [[False], [True], [False, True], [True, False]], ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["in C", "without a compiler"])
@pytest.mark.parametrize("size", [(24, 16), (3, 7), (2, 1030)], ids=str)  # the last: wider than x0.c has rows in parts
def test_bits_and_layout(count, mirrored, compiled, size, monkeypatch):
    assert kernel() is not None, "there is no C compiler here"
    if not compiled:
        monkeypatch.setattr("data_tools.x0.kernel", lambda: None)
    images = HostImages()
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=draw)
        found = images.x0(pixels, mirrored)
        assert len(found) == len(mirrored)
        for flag, x0 in zip(mirrored, found, strict=True):
            assert torch.equal(x0, pixels_to_x0(pixels.permute(0, 3, 1, 2), torch.full((count,), flag)))
            assert x0.is_contiguous()


def test_memory_is_used_again_for_batches_of_one_size():
    images, pixels = HostImages(), torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    first, mirrored = images.x0(pixels, [False, True])
    assert images.x0(pixels, [False])[0].data_ptr() == first.data_ptr() != mirrored.data_ptr()
    assert images.x0(pixels[:2], [False])[0].shape == (2, 3, 8, 8)
