"""What makes a step faster and no other: compiled blocks, kernels of the attention, batches copied beside the step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from uvit_dist.config import Config, SpeedConfig
from uvit_dist.data.batch import Batch
from uvit_dist.errors import ConfigError
from uvit_dist.forecast import tokens
from uvit_dist.models.uvit import UViT

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Of ``speed.attention``, but for auto."""


def compile_blocks(net: nn.Module, speed: SpeedConfig, device: torch.device) -> None:
    """Have the network's blocks compiled, where that is asked for. Raises ``ConfigError`` for graphs without a GPU."""
    if speed.cuda_graphs and device.type != "cuda":
        raise ConfigError("speed.cuda_graphs needs a GPU, and this rank has none; set it to false")
    if speed.compile:
        assert isinstance(net, UViT), f"{type(net).__name__} has no blocks"
        # each shape gets code of its own: a batch size that may vary would make that of training slower
        net.compile_blocks(dynamic=False, mode="reduce-overhead" if speed.cuda_graphs else None)


def begin_graphs(speed: SpeedConfig) -> None:
    """Before the network is run anew: what it gave before may be overwritten, and nothing that it gives from now on."""
    if speed.cuda_graphs:  # each block is compiled by itself, so torch cannot tell where the network begins
        torch.compiler.cudagraph_mark_step_begin()


def attention_kernel(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What to enter around forward and backward passes, so that the attention uses the kernel asked for.

    It is tried on one image first. Raises ``ConfigError`` where it does not work for this network on this device.
    """
    name, model = config.speed.attention, config.model
    if name == "auto":
        return nullcontext
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    shape = (1, model.num_heads, tokens(model), model.embed_dim // model.num_heads)
    q, k, v = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    try:
        with sdpa_kernel([KERNELS[name]]):
            scaled_dot_product_attention(q, k, v).sum().backward()
    except RuntimeError as error:
        raise ConfigError(
            f"speed.attention {name}: no such kernel here for heads of {shape[-1]} in {dtype} on {device.type} "
            f"({str(error).splitlines()[0]}); set speed.attention auto"
        ) from None
    return partial(sdpa_kernel, [KERNELS[name]])


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_device(batch: Batch, device: torch.device, prefetch: bool) -> Batch:
    """The batch on a device, of (b, ...) tensors; prefetch: copied on a stream of its own, on a GPU.

    So the copy begins while the device is still busy with the last update, which the host does not wait for. From
    pinned memory it needs no thread of the host: such a batch must be held until the device has it, as the one
    synchronisation of a training step tells.
    """
    if device.type != "cuda" or not prefetch:
        return batch.to(device)
    with torch.cuda.stream(_copying(device)):
        moved = batch.to(device)
    current = torch.cuda.current_stream(device)
    current.wait_stream(_copying(device))
    for tensor in (moved.ids, moved.labels, moved.data, moved.contexts):
        if tensor is not None:
            tensor.record_stream(current)  # its memory is the other stream's
    return moved
