"""UViT against golden/uvit_*.npz and golden/presets.json: same function, same keys, same sizes."""

import json

import numpy as np
import pytest
import torch

from tests.golden_values import GOLDEN, golden_state_dict
from uvit_dist.models.uvit import UViT

PRESETS = json.loads((GOLDEN / "presets.json").read_text())


@pytest.mark.parametrize("name", ["class_cond", "uncond_conv", "text_cond", "mlp_time_qkv_bias"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
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


def test_checkpointing_changes_neither_output_nor_gradients():
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        net = UViT(8, 2, 4, 32, 4, 2, num_classes=3, use_checkpoint=use_checkpoint)
        net(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 2])).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
