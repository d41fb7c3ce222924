"""Linear layers as convolutions: the same numbers, shared weights, and only where they are faster."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn
from torch.nn.functional import linear

from uvit_dist.models.cpu import ConvolutionLinear, for_inference
from uvit_dist.models.features import to_uint8, to_unit_range
from uvit_dist.models.uvit import UViT

NETWORK = {"img_size": 8, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_it_is_the_linear_layer() -> None:
    layer = ConvolutionLinear(24, 40)
    for shape in ((3, 7, 24), (1, 7, 24), (3, 1, 24), (5, 24), (2, 3, 4, 24)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            found = layer(given)
            assert found.shape == (*shape[:-1], 40)
            torch.testing.assert_close(found, linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_gives_the_same_and_shares_its_weights() -> None:
    for more in ({"num_classes": 5}, {"clip_dim": 6, "num_clip_token": 3, "mlp_time_embed": True}):
        network = UViT(**NETWORK, **more).eval().requires_grad_(False)  # type: ignore[arg-type]
        twin = for_inference(network)
        linears = [module for module in twin.modules() if isinstance(module, nn.Linear)]
        assert linears
        assert all(type(module) is ConvolutionLinear for module in linears)
        assert not any(type(module) is ConvolutionLinear for module in network.modules())
        assert all(a is b for a, b in zip(network.parameters(), twin.parameters(), strict=True))
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
        given = {"y": torch.tensor([1, 4])} if "num_classes" in more else {"context": torch.randn(2, 3, 6)}
        torch.testing.assert_close(twin(x, t, **given), network(x, t, **given), rtol=1e-5, atol=1e-5)
        network.decoder_pred.weight.zero_()
        torch.testing.assert_close(twin(x, t, **given), network(x, t, **given), rtol=1e-5, atol=1e-5)


def test_other_networks_stay_what_they_are() -> None:
    bare = nn.GELU()
    assert for_inference(bare) is bare
    elsewhere = nn.Linear(3, 4, device="meta")
    assert for_inference(elsewhere) is elsewhere


def test_rounding_goes_by_images_and_keeps_the_layout() -> None:
    images = torch.linspace(-1.2, 1.2, 4 * 3 * 10 * 6).view(4, 3, 10, 6)
    expected = ((images + 1.0) / 2.0).clamp(0.0, 1.0).mul(255.0).add(0.5).to(torch.uint8)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_uint8(images), expected)
    assert torch.equal(to_uint8(last), expected)
    assert to_uint8(last).stride() == last.stride()
    assert torch.equal(to_unit_range(expected), expected.float() / 255)
    assert images.min() < -1.1, "the images themselves are left as they are"


REUSE = """
import resource, sys
import torch
from uvit_dist.models.cpu import keep_memory

assert not int(sys.argv[1]) or keep_memory()
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [torch.ones(12 * 2**20) for _ in range(3)]
    del large
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again() -> None:
    """Page faults of the last of twelve rounds with three tensors of 48 MiB; the heap takes a few to settle."""
    freed, kept = (int(subprocess.check_output([sys.executable, "-c", REUSE, keep])) for keep in ("0", "1"))
    assert kept < freed / 20
