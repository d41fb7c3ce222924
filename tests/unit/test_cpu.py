"""Linear layers in another layout: the same numbers, shared weights; and the memory of a process."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from uvit_dist.host_memory import HUGE_FROM, HUGE_PAGE, MAPPED_FROM, use_huge_pages
from uvit_dist.models.cpu import _PACKED, PackedLinear, for_inference
from uvit_dist.models.features import to_uint8, to_unit_range
from uvit_dist.models.uvit import UViT

NETWORK = {"img_size": 8, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True])
def test_it_is_the_linear_layer_with_gelu_or_without(gelu: bool) -> None:
    layer = PackedLinear(plain := nn.Linear(24, 40), gelu)
    for shape in ((3, 7, 24), (1, 7, 24), (3, 1, 24), (5, 24), (2, 3, 4, 24)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            found, expected = layer(given), plain(given)
            assert found.shape == (*shape[:-1], 40)
            torch.testing.assert_close(found, functional.gelu(expected) if gelu else expected, rtol=1e-5, atol=1e-5)


def test_with_gradients_or_in_another_dtype_it_is_the_linear_layer_itself() -> None:
    layer, x = PackedLinear(nn.Linear(24, 40), gelu=True), torch.randn(2, 3, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
    torch.testing.assert_close(layer(x), functional.gelu(functional.linear(x, layer.weight, layer.bias)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = functional.linear(x, layer.weight, layer.bias)
        assert half.dtype == torch.bfloat16
        assert torch.equal(layer(x), functional.gelu(half))
    with torch.no_grad():
        double, given = layer.double(), x.double()
        assert torch.equal(double(given), functional.gelu(functional.linear(given, double.weight, double.bias)))


@torch.no_grad()
def test_a_network_gives_the_same_and_shares_its_weights() -> None:
    for more in ({"num_classes": 5}, {"clip_dim": 6, "num_clip_token": 3, "mlp_time_embed": True}):
        network = UViT(**NETWORK, **more).eval().requires_grad_(False)  # type: ignore[arg-type]
        twin = for_inference(network)
        linears = [module for module in twin.modules() if isinstance(module, nn.Linear)]
        assert linears
        assert all(type(module) is PackedLinear for module in linears)
        assert not any(type(module) is PackedLinear for module in network.modules())
        assert all(a is b for a, b in zip(network.parameters(), twin.parameters(), strict=True))
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
        given = {"y": torch.tensor([1, 4])} if "num_classes" in more else {"context": torch.randn(2, 3, 6)}
        weight = network.mid_block.mlp.fc1.weight
        pairs = [(twin(x, t, **given), network(x, t, **given))]
        weight.mul_(-2)
        pairs.append((twin(x, t, **given), network(x, t, **given)))
        weight.data = torch.ones(128, 32)
        pairs.append((twin(x, t, **given), network(x, t, **given)))
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        (first, _), (second, _), (third, _) = pairs
        assert not torch.allclose(first, second, rtol=1e-3)
        assert not torch.allclose(second, third, rtol=1e-3)


@torch.no_grad()
def test_twins_share_what_is_made_of_a_weight_and_it_goes_with_the_weight() -> None:
    network = nn.Sequential(nn.Linear(24, 40))
    first, second = for_inference(network), for_inference(network)
    first(torch.ones(2, 24))
    known = len(_PACKED)
    second(torch.ones(2, 24))
    assert len(_PACKED) == known
    del network, first, second
    gc.collect()
    assert len(_PACKED) < known


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
from uvit_dist.host_memory import keep_memory

mapped_from, size = (int(number) for number in sys.argv[1:])
assert not mapped_from or keep_memory(mapped_from)
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = [torch.ones(size * 2**18) for _ in range(3)]
    del large
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again() -> None:
    """Page faults of the last of twelve rounds with three tensors; the heap takes a few to settle."""
    freed, kept, given_back, small = (
        int(subprocess.check_output([sys.executable, "-c", REUSE, str(mapped_from), str(mebibytes)]))
        for mapped_from, mebibytes in ((0, 48), (MAPPED_FROM, 48), (2**23, 48), (2**23, 6))
    )
    assert kept < freed / 20
    assert given_back > freed / 2, "tensors of more than is kept"
    assert small < given_back / 20, "of less"


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages, of the parts of this process's memory in which a tensor lies."""
    begin, end, found, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < end and int(bounds[2], 16) > begin
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


def test_large_tensors_are_put_into_huge_pages_where_they_lie() -> None:
    small, large = torch.arange(HUGE_FROM // 8).float(), torch.arange(HUGE_FROM // 2).float()
    place, kept = large.data_ptr(), large.clone()
    advised = use_huge_pages([small, large])
    assert large.nbytes - 2 * HUGE_PAGE <= advised <= large.nbytes
    assert large.data_ptr() == place
    assert torch.equal(large, kept)
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and "[never]" not in setting.read_text():
        assert huge_bytes(large) >= HUGE_PAGE
    assert use_huge_pages([small, torch.empty(0), torch.empty(2**30, device="meta")]) == 0
