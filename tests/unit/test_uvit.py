"""UViT against golden/uvit_*.npz and golden/presets.json: same function, same keys, same sizes."""

import json

import numpy as np
import pytest
import torch

from tests.golden_values import GOLDEN, golden_state_dict
from uvit_dist.models.uvit import UViT

PRESETS = json.loads((GOLDEN / "presets.json").read_text())


@pytest.mark.parametrize("name", ["class_cond", "uncond_conv", "text_cond", "mlp_time_qkv_bias"])
@pytest.mark.parametrize("use_checkpoint", [False, True, "selective"])
def test_forward_equals_the_official_network(name, use_checkpoint):
    golden = np.load(GOLDEN / f"uvit_{name}.npz")
    net = UViT(**json.loads(str(golden["config"])), use_checkpoint=use_checkpoint)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    net.load_state_dict(golden_state_dict(shapes, str(golden["salt"])))
    inputs = {k: torch.from_numpy(golden[k]) for k in ("x", "timesteps", "y", "context") if k in golden}
    out = net(**inputs)
    assert (out - torch.from_numpy(golden["output"])).abs().max() <= 2e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_keys_shapes_and_sizes(preset):
    record = PRESETS[preset]
    arguments = {key: value for key, value in record["config"]["nnet"].items() if key != "name"}
    with torch.device("meta"):
        net = UViT(**arguments)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == record["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == record["params"]


def test_without_skips_the_out_blocks_have_no_skip_linear():
    net = UViT(img_size=8, patch_size=2, in_chans=4, embed_dim=32, depth=2, num_heads=2, skip=False)
    assert not [key for key in net.state_dict() if "skip_linear" in key]
    assert net(torch.zeros(1, 4, 8, 8), torch.ones(1)).shape == (1, 4, 8, 8)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    net = UViT(img_size=8, patch_size=2, in_chans=4, embed_dim=256, depth=2, num_heads=4, num_classes=1001)
    weight = net.mid_block.mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert weight.abs().max() > 0.04 * 1.5, "no truncation at two standard deviations"
    assert net.label_emb.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert net.mid_block.attn.proj.bias.abs().max() == 0
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def one_pass(use_checkpoint, skip=True):
    """Gradients of a small network, and the bytes that autograd kept for them, each storage once, without weights."""
    torch.manual_seed(0)
    net = UViT(8, 2, 4, 32, 4, 2, num_classes=3, use_checkpoint=use_checkpoint, skip=skip)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 2])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(x, timesteps, labels).square().mean()
    loss.backward()
    return [p.grad for p in net.parameters()], sum(kept.values())


@pytest.mark.parametrize("skip", [True, False])
def test_checkpointing_changes_no_gradient_and_keeps_less(skip):
    (plain, all_bytes), (whole, block_bytes), (some, selective_bytes) = (
        one_pass(use_checkpoint, skip) for use_checkpoint in (False, True, "selective")
    )
    for gradients in (whole, some):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))
    assert block_bytes < selective_bytes < all_bytes
    tokens = 2 * 18 * 32 * 4  # bytes of (B, L, D) in fp32
    recomputed = 5 * (2 + 4) + (2 * 2 if skip else 0)  # two norms and GELU of each block; what skips join
    joined = 2 if skip else 0  # what is to be joined is kept instead; the skip itself is kept anyhow
    statistics = 5 * 2 * 2 * (2 * 18 * 4)  # mean and deviation of each token in each norm
    assert all_bytes - selective_bytes == (recomputed - joined) * tokens + statistics


def test_under_autocast_checkpointing_changes_no_gradient_either():
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain, *others = (one_pass(use_checkpoint)[0] for use_checkpoint in (False, True, "selective"))
    for gradients in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))


def test_selective_checkpointing_does_no_product_again():
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for use_checkpoint in (False, "selective"):
        with FlopCounterMode(display=False) as counter:
            one_pass(use_checkpoint)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
