"""The arithmetic of the dry run, against the network itself and against figures known otherwise."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import ROOT
from uvit_dist import forecast
from uvit_dist.config import ModelConfig, TrainConfig, ZeroConfig
from uvit_dist.config_yaml import load_config
from uvit_dist.models.uvit import UViT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = {"img_size": 16, "patch_size": 2, "in_chans": 4, "embed_dim": 192, "depth": 4, "num_heads": 4}
VARIANTS = [
    {"num_classes": 11},
    {"clip_dim": 32, "conv": False, "qkv_bias": True},
    {"skip": False, "mlp_time_embed": True, "mlp_ratio": 3.0, "depth": 6},
]


def inputs(model: ModelConfig, batch: int):
    images = torch.rand(batch, model.in_chans, model.img_size, model.img_size)
    labels = torch.zeros(batch, dtype=torch.long) if model.num_classes > 0 else None
    contexts = torch.rand(batch, model.num_clip_token, model.clip_dim) if model.clip_dim is not None else None
    return images, torch.rand(batch), labels, contexts


@pytest.mark.parametrize("model", [load_config(path).model for path in CONFIGS], ids=[path.stem for path in CONFIGS])
def test_parameters_and_flop_are_those_of_the_network(model):
    check_counts(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_flop_of_every_option(variant):
    check_counts(ModelConfig(**{**SMALL, **variant}))


def check_counts(model: ModelConfig):
    with torch.device("meta"):
        net = UViT(**model.model_dump()).eval()
        arguments = inputs(model, 1)
        with FlopCounterMode(display=False) as counter:
            net(*arguments)
    assert forecast.parameters(model) == sum(p.numel() for p in net.parameters())
    assert forecast.forward_flop(model) == counter.get_total_flops()


def kept_bytes(model: ModelConfig, precision: str, batch: int) -> float:
    """What autograd keeps of a forward pass for each image: storages that are no weight, nor a copy of one."""
    net = UViT(**model.model_dump()).train()
    if precision == "bf16":
        net = net.bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    shapes = {shape for p in net.parameters() for shape in (tuple(p.shape), tuple(reversed(p.shape)))}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images, times, labels, contexts = inputs(model, batch)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast", cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        net(images, times, labels, contexts)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / batch


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_what_autograd_keeps(precision, variant):
    model = ModelConfig(**{**SMALL, **variant})
    kept = kept_bytes(model, precision, 8)
    assert forecast.activation_bytes(model, precision) == pytest.approx(kept, rel=0.03)
    selective = model.model_copy(update={"use_checkpoint": "selective"})
    assert forecast.activation_bytes(selective, precision) == pytest.approx(
        kept_bytes(selective, precision, 8), rel=0.03
    )
    recomputed = model.model_copy(update={"use_checkpoint": True})
    one_block = forecast.tokens(model) * model.embed_dim * 4 * (8 + 10 + 2 * model.mlp_ratio)
    said, kept = forecast.activation_bytes(recomputed, precision), kept_bytes(recomputed, precision, 8)
    assert kept * 0.95 < said < kept + one_block  # which is there only in the backward pass


def test_figures_of_the_h_network():
    model = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml").model
    assert forecast.parameters(model) == 500_942_656
    assert forecast.forward_flop(model) == pytest.approx(266.4e9, rel=1e-3)
    plain = model.model_copy(update={"use_checkpoint": False})
    assert forecast.training_flop(plain) == pytest.approx(799e9, rel=1e-3)
    assert forecast.training_flop(model) == pytest.approx(1066e9, rel=1e-3)
    assert forecast.activation_bytes(plain, "bf16_autocast") == pytest.approx(0.29e9, rel=0.1)


@pytest.mark.parametrize(
    ("world_size", "gigabytes"), [(1, (10, 10, 10, 10)), (8, (10, 3.0, 2.1, 1.25)), (64, (10, 2.1, 1.1, 0.16))]
)
def test_state_by_zero_stage(world_size, gigabytes):
    config = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml")
    train = config.train.model_copy(update={"precision": "bf16"})
    for stage, expected in enumerate(gigabytes):
        zero = config.zero.model_copy(update={"stage": stage})
        memory = forecast.gpu_memory(config.model, train, zero, world_size, 16)
        assert memory.state / 1e9 == pytest.approx(expected, rel=0.05)


def test_fp32_weights_are_their_own_masters_at_stage_0():
    config = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml", ["zero.stage=0"])
    memory = forecast.gpu_memory(config.model, config.train, config.zero, 8, 1)
    assert memory.state == forecast.parameters(config.model) * (4 + 4 + 8 + 4)


def test_batch_arithmetic():
    config = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml")
    assert forecast.batch(config, 32) == forecast.Batch(32, 1, 32)
    assert forecast.batch(config, 8) == forecast.Batch(32, 4, 8)
    assert forecast.batch(config, 64) == forecast.Batch(16, 1, 64)


def test_the_interval_of_young_and_daly_is_where_goodput_is_highest():
    stall, restart, mtbf = 20.0, 120.0, 40_000.0
    best = forecast.young_daly_s(stall, mtbf)
    assert best == math.sqrt(2 * stall * mtbf)
    at_best = forecast.goodput(best, stall, restart, mtbf)
    grid = [forecast.goodput(best * factor, stall, restart, mtbf) for factor in (0.25, 0.5, 0.8, 1.25, 2, 4)]
    assert all(share < at_best for share in grid)
    loss = stall / best + (best / 2 + restart) / mtbf  # to first order
    assert 1 - at_best == pytest.approx(loss, rel=0.05)


def test_goodput_at_its_ends():
    assert forecast.goodput(3600, 0.0, 0.0, 1e15) == pytest.approx(1.0, abs=1e-6)
    assert forecast.goodput(1e6, 10.0, 10.0, 100.0) == 0.0
    simulated = simulate(interval=600.0, stall=15.0, restart=90.0, mtbf=3_000.0)
    assert forecast.goodput(600.0, 15.0, 90.0, 3_000.0) == pytest.approx(simulated, rel=0.01)


def simulate(interval: float, stall: float, restart: float, mtbf: float) -> float:
    """Useful share of the time of a run whose failures come without memory, also while it restarts."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.empty(400_000, dtype=torch.float64).exponential_(1 / mtbf, generator=generator).tolist()
    useful = spent = 0.0
    need, until = interval + stall, gaps.pop()
    while gaps:
        if until >= need:
            until, spent, useful, need = until - need, spent + need, useful + interval, interval + stall
        else:
            spent, until, need = spent + until, gaps.pop(), restart + interval + stall
    return useful / spent


def test_sampling_counts_guidance_twice():
    config = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml")
    assert forecast.sampling_flop(config) == pytest.approx(1.33e18, rel=0.01)
    free = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml", ["sample.cfg_scale=0"])
    assert forecast.sampling_flop(free) * 2 == forecast.sampling_flop(config)


def test_bytes_of_a_sample():
    assert forecast.sample_bytes(load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml")) == 64 * 1024
    assert forecast.sample_bytes(load_config(ROOT / "configs" / "uvit_s_cifar10.yaml")) == 3 * 32 * 32
    assert forecast.sample_bytes(load_config(ROOT / "configs" / "uvit_s_mscoco.yaml")) == 16 * 1024 + 2 * 77 * 768


def test_memory_counts_what_zero_and_recomputing_change():
    train = TrainConfig(steps=1, global_batch_size=8, micro_batch_size=1)
    model = ModelConfig(**SMALL, num_classes=11)
    zero = ZeroConfig(stage=1, bucket_size=1000, overlap_comm=False)
    memory = forecast.gpu_memory(model, train, zero, 8, 2)
    assert memory.buckets == 4000
    beside = zero.model_copy(update={"overlap_comm": True})
    assert forecast.gpu_memory(model, train, beside, 8, 2).buckets == 16_000, "two to fill, one in order, one of sums"
    assert memory.activations == 2 * forecast.activation_bytes(model, "bf16_autocast")
    assert memory.copies == 2 * forecast.parameters(model)
    backward = memory.copies + memory.activations + memory.flow
    assert memory.total == pytest.approx(memory.state + memory.buckets + backward + forecast.ALLOWANCE_BYTES)
    none = forecast.gpu_memory(model, train, zero.model_copy(update={"stage": 0}), 8, 0)
    assert none.total == pytest.approx(none.state + 4 * forecast.parameters(model) + forecast.ALLOWANCE_BYTES)


@pytest.mark.parametrize("kind", list(forecast.KEPT), ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_largest_micro_batch_fits_and_one_image_more_does_not(stage, kind):
    config = load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml", [f"zero.stage={stage}"])
    model, room = config.model.model_copy(update={"use_checkpoint": kind}), 80e9
    most = forecast.largest_micro_batch(model, config.train, config.zero, 32, room)
    need = [forecast.gpu_memory(model, config.train, config.zero, 32, micro).total for micro in (most, most + 1)]
    assert need[0] <= room < need[1]
    assert forecast.what_fits(config, 32, room)[stage][kind] == most
    assert forecast.largest_micro_batch(model, config.train, config.zero, 32, 2e9) == 0


HEADER = re.compile(
    r"# Cost: (\S+) FLOP, (\d) times the forward pass of (\d+) GFLOP .*?(\d+) H100 hours if 40%", re.DOTALL
)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("uvit_*.yaml")), ids=lambda path: path.stem)
def test_the_cost_in_the_header_of_a_configuration_is_the_forecast_of_it(path):
    config, told = load_config(path), HEADER.search(path.read_text())
    forward, training = forecast.forward_flop(config.model), forecast.training_flop(config.model)
    total = config.train.steps * config.train.global_batch_size * training
    hours = total / (0.4 * 989e12) / 3600
    assert told.groups() == (f"{total:.1e}", str(training // forward), f"{forward / 1e9:.0f}", f"{hours:.0f}")
