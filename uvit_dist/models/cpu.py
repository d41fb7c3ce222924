"""Networks on a CPU: memory that stays with the process, and for inference linear layers by oneDNN."""

from __future__ import annotations

import copy
import ctypes
import logging

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
MAPPED_FROM = 2**30
"""Bytes from which on a tensor's memory comes from the kernel and goes back to it."""


def keep_memory() -> bool:
    """Have the process keep the memory of tensors that are freed, for the next ones. Returns whether that could be set.

    Else glibc gives tensors of 32 MiB and more, and what is free at the end of its heap, back to the kernel, which
    hands out pages filled with zeros again, at each step: a fiftieth of a step's time or more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and mallopt(_M_TRIM_THRESHOLD, -1) == 1 and mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM) == 1
    if not kept:
        log.debug("this C library does not let a process keep the memory of freed tensors")
    return kept


class ConvolutionLinear(nn.Linear):
    """A linear layer as a 1x1 convolution, which PyTorch gives to oneDNN where it gives a product to MKL.

    On AMD processors MKL's fp32 products are at half the speed of oneDNN's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, L, in). Returns (B, L, out); other shapes take the usual way."""
        if input.dim() != 3:
            return super().forward(input)
        pixels = input[:, None].permute(0, 3, 1, 2)  # (B, in, 1, L), channels last in memory: nothing is copied
        return conv2d(pixels, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)[:, 0]


def for_inference(network: nn.Module) -> nn.Module:
    """The network as it is best run here. On a CPU a twin of it, which shares its weights; elsewhere itself."""
    weights = [*network.parameters(), *network.buffers()]
    if not weights or any(w.device.type != "cpu" for w in weights) or not torch.backends.mkldnn.is_available():
        return network
    twin = copy.deepcopy(network, {id(weight): weight for weight in weights})
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                linear = ConvolutionLinear(child.in_features, child.out_features, child.bias is not None, device="meta")
                linear.weight, linear.bias = child.weight, child.bias
                setattr(parent, name, linear.train(child.training))
    return twin
