"""What a run will take, by arithmetic alone: parameters, FLOP, memory, bytes, hours, and what failures cost of them.

Everything follows from the configuration's sections and a few rates; nothing is read or built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from uvit_dist.config import Config, ModelConfig, TrainConfig, ZeroConfig
from uvit_dist.config_rules import micro_batch_size

Checkpointing = bool | Literal["selective"]
KEPT: dict[Checkpointing, str] = {False: "all kept", "selective": "products kept", True: "blocks recomputed"}
"""What becomes of activations, by model.use_checkpoint; the more is recomputed the later."""
RESIDUAL_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}
"""Of an element of the residual stream before the first skip connection: pos_embed makes it fp32 under autocast."""
COMPUTE_BYTES = {"fp32": 4, "bf16_autocast": 2, "bf16": 2}
"""Of an element of what the linear layers take and give."""
WEIGHT_BYTES = {"fp32": 4, "bf16_autocast": 4, "bf16": 2}
"""Of a weight that the network computes with, and of its gradient."""
STATE_BYTES = 16
"""Of a parameter in a checkpoint: fp32 master weight, Adam's two moments, EMA."""
ALLOWANCE_BYTES = 2.5e9
"""Assumed for the CUDA context, NCCL's buffers, workspaces and what the allocator cannot use."""
ALL_REDUCE_ELEMENTS = 500_000_000
"""Of gradients that DeepSpeed joins for one all-reduce at stage 0."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters."""
STALL_SHARE = 0.12
"""Share of a save for which training waits, where it is written beside the steps: the bound of benchmark C9."""
KNOWN_SAMPLES = {
    ("cifar10", "train"): 50_000,
    ("celeba", "train"): 162_770,
    ("imagenet_tars", "train"): 1_281_167,
    ("digits", "train"): 1_797,
}
"""Images of published data sets, by data.format and data.split."""


def tokens(model: ModelConfig) -> int:
    """Length of the sequence: time, label or text, patches."""
    extra = 1 + (model.num_classes > 0) + (model.num_clip_token if model.clip_dim is not None else 0)
    return extra + (model.img_size // model.patch_size) ** 2


def parameters(model: ModelConfig) -> int:
    """Number of weights of the network, those that ``UViT`` would have."""
    d, hidden, patch = model.embed_dim, int(model.embed_dim * model.mlp_ratio), model.patch_size**2 * model.in_chans
    qkv = 3 * d * d + 3 * d * model.qkv_bias
    block = 2 * 2 * d + qkv + (d * d + d) + (d * hidden + hidden) + (hidden * d + d)
    skips = (model.depth // 2) * (2 * d * d + d) * model.skip
    ends = (patch * d + d) + tokens(model) * d + 2 * d + (d * patch + patch)
    ends += model.conv * (9 * model.in_chans**2 + model.in_chans)
    ends += max(0, model.num_classes) * d
    ends += (model.clip_dim * d + d) if model.clip_dim is not None else 0
    ends += ((d * 4 * d + 4 * d) + (4 * d * d + d)) * model.mlp_time_embed
    return (model.depth + 1) * block + skips + ends


def forward_flop(model: ModelConfig) -> int:
    """FLOP of the network for one image, two for a multiplication with its addition: products and convolutions."""
    d, length, hidden = model.embed_dim, tokens(model), int(model.embed_dim * model.mlp_ratio)
    pixels, patch = model.img_size**2, model.patch_size**2 * model.in_chans
    block = length * (4 * d * d + 2 * d * hidden) + 2 * length * length * d
    skips = (model.depth // 2) * length * 2 * d * d * model.skip
    ends = (model.img_size // model.patch_size) ** 2 * patch * d + length * d * patch
    ends += model.conv * 9 * model.in_chans**2 * pixels
    ends += model.num_clip_token * model.clip_dim * d if model.clip_dim is not None else 0
    ends += 8 * d * d * model.mlp_time_embed
    return 2 * ((model.depth + 1) * block + skips + ends)


def training_flop(model: ModelConfig) -> int:
    """Of a forward and a backward pass for one image; blocks recomputed whole cost one more forward pass."""
    return (4 if model.use_checkpoint is True else 3) * forward_flop(model)


def activation_bytes(model: ModelConfig, precision: str) -> int:
    """What is kept of one image's forward pass until the backward pass, at its most.

    A block keeps the inputs of its two norms, four linear layers and GELU, and q, k, v and their result; behind a skip
    connection, the joined input as well. Selective checkpointing drops the results of norms, GELU and joining, and
    keeps what they are made of. Recomputed whole, the blocks keep their inputs, and one of them all else.
    """
    residual, compute, ratio = RESIDUAL_BYTES[precision], COMPUTE_BYTES[precision], model.mlp_ratio
    half, inner = model.depth // 2, compute * (6 + 2 * ratio)
    plain, ends = 2 * residual + inner, 2 * compute
    joined = 4 * compute + inner if model.skip else plain
    behind = compute if model.skip else residual  # the residual stream after the first skip connection
    if model.use_checkpoint is True:
        units = residual * (half + 2) + behind * (half - 1) + ends + max(plain, joined)
    elif model.use_checkpoint == "selective":
        inner = compute * (4 + ratio)
        plain = 2 * residual + inner
        joined = 3 * compute + inner if model.skip else plain
        units = (half + 1) * plain + half * joined + (residual - behind) + ends
    else:
        units = (half + 1) * plain + half * joined + ends
    return round(units * tokens(model) * model.embed_dim)


def flow_bytes(model: ModelConfig, precision: str) -> int:
    """Of one image's gradients on their way back through a block: of its output, its GELU and its MLP's input."""
    units = RESIDUAL_BYTES[precision] + COMPUTE_BYTES[precision] * (1 + model.mlp_ratio)
    return round(units * tokens(model) * model.embed_dim)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU at the peak of an update of several passes; one of a single pass takes no more.

    copies: of weights, in bf16 or gathered; sums: what summing gradients takes beyond themselves, when activations are
    gone; flow: gradients of activations.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    buckets: float
    sums: float
    activations: float
    flow: float
    allowance: float = ALLOWANCE_BYTES

    @property
    def state(self) -> float:
        """Without what depends on the batch, and without the allowance."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """All of it: the backward pass, or the sums after it, whichever takes more."""
        return self.state + self.buckets + max(self.copies + self.activations + self.flow, self.sums) + self.allowance


def gpu_memory(model: ModelConfig, train: TrainConfig, zero: ZeroConfig, world_size: int, micro: int) -> GpuMemory:
    """Memory of a rank. micro: its images in one forward pass.

    Sharded over the ranks from stage 1: fp32 masters, Adam's moments and the EMA; from 2: gradients; at 3: weights.
    At stage 0 fp32 weights are their own masters. At stage 3 DeepSpeed lets up to LIVE_ELEMENTS of gathered weights
    live from the forward pass to the backward pass, so that smaller networks are there whole.
    """
    count, each = parameters(model), WEIGHT_BYTES[train.precision]
    masters = 0 if zero.stage == 0 and each == 4 else 4
    gathered = min(count, LIVE_ELEMENTS) * each if zero.stage == 3 else 0
    bucket = zero.bucket_size * each
    share, beside = count * each / world_size, zero.stage >= 2 or (zero.stage == 1 and zero.overlap_comm)
    # A bucket is filled, or with overlap_comm two; to be summed it is put in order of the ranks, and the sums arrive.
    buckets = (zero.stage > 0) * (1 + zero.overlap_comm + 2 * beside) * bucket
    sums = {0: min(count, ALL_REDUCE_ELEMENTS) * each, 1: share + 2 * bucket * (not beside), 2: 2 * share, 3: share}
    return GpuMemory(
        weights=count * each / (world_size if zero.stage == 3 else 1),
        gradients=count * each / (world_size if zero.stage >= 2 else 1),
        optimizer=count * (masters + 12) / (world_size if zero.stage >= 1 else 1),
        copies=gathered + (_cast_bytes(model) if train.precision == "bf16_autocast" else 0.0),
        buckets=buckets,
        sums=sums[zero.stage],
        activations=micro * activation_bytes(model, train.precision),
        flow=micro * flow_bytes(model, train.precision),
    )


def _cast_bytes(model: ModelConfig) -> float:
    """Of the bf16 copies of weights that the backward pass needs, under autocast.

    Recomputed blocks make them again, one block at a time; selectively recomputed ones but for attention's projection.
    """
    everything, blocks = 2.0 * parameters(model), model.depth + 1
    if model.use_checkpoint == "selective":
        return 2.0 * blocks * model.embed_dim**2 + everything / blocks / 2
    return everything / blocks if model.use_checkpoint else everything


def largest_micro_batch(model: ModelConfig, train: TrainConfig, zero: ZeroConfig, world_size: int, room: float) -> int:
    """Images of a rank in one forward pass that fit into ``room`` bytes at most; 0: not one does."""
    one = gpu_memory(model, train, zero, world_size, 1)
    if one.total > room:
        return 0
    left = room - one.state - one.buckets - one.copies - one.allowance
    return int(left // (one.activations + one.flow))


def what_fits(config: Config, world_size: int, room: float) -> dict[int, dict[Checkpointing, int]]:
    """The largest micro-batches that fit into ``room`` bytes of each rank, by ZeRO stage and model.use_checkpoint."""
    table: dict[int, dict[Checkpointing, int]] = {}
    for stage in range(1 if config.train.precision == "bf16" else 0, 4):
        zero = config.zero.model_copy(update={"stage": stage})
        table[stage] = {}
        for kind in KEPT:
            model = config.model.model_copy(update={"use_checkpoint": kind})
            table[stage][kind] = largest_micro_batch(model, config.train, zero, world_size, room)
    return table


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one update: sums of gradients, and gathered weights."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights


def traffic(model: ModelConfig, train: TrainConfig, zero: ZeroConfig, world_size: int, passes: int = 1) -> Traffic:
    """The least that ZeRO's collectives send, with rings. passes: micro-batches of a rank in an update.

    A ring sends (N - 1)/N of a tensor to scatter its sums or to gather its parts, twice that for an all-reduce. Stages
    2 and 3 scatter the gradients of every micro-batch; stage 3 gathers the weights for each pass forward and backward.
    """
    count, ring = parameters(model), (world_size - 1) / world_size
    summed = {"fp32": 4, "bf16": 2, None: WEIGHT_BYTES[train.precision]}[zero.reduce_dtype]
    weight = WEIGHT_BYTES[train.precision]
    scatters = {0: 2, 1: 1, 2: passes, 3: passes}[zero.stage]
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * passes}[zero.stage]
    return Traffic(scatters * ring * count * summed, gathers * ring * count * weight)


def sample_bytes(config: Config) -> int:
    """Of one sample as it is read: moments or pixels, and one context where there are captions; without tar headers."""
    model, data = config.model, config.data
    pixels = data.space == "pixels"
    each = 1 if pixels else {"float16": 2, "float32": 4}[data.moments_dtype]
    channels = model.in_chans if pixels else 2 * model.in_chans
    context = {"float16": 2, "float32": 4}[data.contexts_dtype] * model.num_clip_token * (model.clip_dim or 0)
    return channels * model.img_size**2 * each + context


@dataclass(frozen=True)
class Batch:
    """global_batch_size = micro × accumulation × world_size."""

    micro: int
    accumulation: int
    world_size: int


def batch(config: Config, world_size: int) -> Batch:
    """How the global batch is cut over the ranks."""
    micro = micro_batch_size(config.train, world_size)
    return Batch(micro, config.train.global_batch_size // world_size // micro, world_size)


def sampling_flop(config: Config) -> int:
    """FLOP of the network for the images of an evaluation; guidance takes each call twice. Decoding is not counted."""
    calls = config.sample.steps * (2 if config.sample.cfg_scale else 1)
    return config.evaluate.samples * calls * forward_flop(config.model)


def young_daly_s(stall_s: float, mtbf_s: float) -> float:
    """The interval of saves that loses least, √(2·cost·MTBF) (Young 1974, Daly 2006, first order), seconds."""
    return math.sqrt(2 * stall_s * mtbf_s)


def goodput(interval_s: float, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """Expected share of time that makes steps which last: Daly 2006, eq. 20, for failures without memory.

    interval_s: training between two saves; stall_s: of a save; restart_s: from a failure to the first step.
    """
    spent = (interval_s + stall_s) / mtbf_s
    if spent > 700 or restart_s / mtbf_s > 700:  # beyond floating point: such a run never gets anywhere
        return 0.0
    return interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(spent))
