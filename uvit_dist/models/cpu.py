"""Networks on a CPU: memory that stays with the process, huge pages, and for inference linear layers by oneDNN."""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.weak import WeakTensorKeyDictionary

from uvit_dist.models.uvit import Mlp

log = logging.getLogger(__name__)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""What Linux is advised of memory: to use huge pages in future, and to move what is there now into such."""
MAPPED_FROM = 2**30
"""Bytes from which on a tensor's memory comes from the kernel and goes back to it."""
HUGE_PAGE, HUGE_FROM = 2**21, 2**25
"""Bytes of a huge page, and those from which on a tensor is put into such."""


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


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Put tensors of a CPU, any shape and dtype, where they lie, into huge pages. Returns the bytes that may have them.

    For memory that is gone through from end to end at each step: in pages of 4 KiB an update of the EMA took 1.4 times
    as long (docs/performance.md). Small tensors are left out, and where the kernel has no huge pages nothing is done.
    Huge pages for all tensors (THP_MEM_ALLOC_ENABLE) made a training step slower.
    """
    madvise, done = getattr(ctypes.CDLL(None), "madvise", None), 0
    for tensor in tensors:
        if madvise is None or tensor.device.type != "cpu" or tensor.nbytes < HUGE_FROM or not tensor.is_contiguous():
            continue
        begin = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE - begin
        if madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_HUGEPAGE) == 0:
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_COLLAPSE)  # Linux 6.1; before, in a while
            done += size
    return done


_PACKED = WeakTensorKeyDictionary()
"""Weights in oneDNN's layout, by the weight, and which state of it that was; gone with the weight."""


class PackedLinear(nn.Linear):
    """A linear layer for inference in fp32, with GELU behind it or not, by oneDNN with the weight in its own layout.

    The layout is made at the first use of a weight, by whichever layer, and again after the weight has changed. It
    takes as much memory as the weight. Where gradients are wanted, and in another dtype, it is the linear layer itself.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input: (…, in). Returns (…, out)."""
        fp32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if torch.is_grad_enabled() or not fp32:
            output = super().forward(input)
            return gelu(output) if self.gelu else output
        after, kind = ("gelu", "none") if self.gelu else ("none", "")  # exact: with erf, not its approximation
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, _packed(self.weight), self.bias, after, [], kind)
        return product


def _packed(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's layout."""
    state = (weight.data_ptr(), weight._version)
    if weight not in _PACKED or _PACKED[weight][0] != state:
        _PACKED[weight] = state, torch.ops.mkldnn._reorder_linear_weight(weight)
    packed: Tensor = _PACKED[weight][1]
    return packed


def for_inference(network: nn.Module) -> nn.Module:
    """The network as it is best run here. On a CPU a twin of it, which shares its weights; elsewhere itself."""
    weights = [*network.parameters(), *network.buffers()]
    if (
        not weights
        or any(w.device.type != "cpu" for w in weights)
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return network
    twin = copy.deepcopy(network, {id(weight): weight for weight in weights})
    for parent in list(twin.modules()):
        with_gelu = type(parent) is Mlp
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, gelu=with_gelu and name == "fc1"))
        if with_gelu:
            parent.act = nn.Identity()
    return twin
