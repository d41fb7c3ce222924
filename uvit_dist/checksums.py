"""Exact sums of a tensor's bits, on its device: equal bits give equal sums, and any one flipped bit another one."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 8
"""Bytes."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's 64-bit words, modulo 2^64: a scalar int64, the same in whichever order it is summed.

    tensor: of any shape and dtype. No synchronisation with the device.
    """
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % WORD:
        data = data.clone()
    whole = data.numel() // WORD * WORD
    total = data[:whole].view(torch.int64).sum()
    if whole < data.numel():
        last = data.new_zeros(WORD)
        last[: data.numel() - whole] = data[whole:]
        total = total + last.view(torch.int64)[0]
    return total


@torch.no_grad()
def flip_bit(tensor: Tensor, bit: int) -> Tensor:
    """Flip one bit of the first element, in place, as a fault on demand. tensor: any shape, float.

    bit: from the lowest, of a mantissa, to the sign.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    first = tensor.view(whole)[(0,) * tensor.ndim]
    first.bitwise_xor_(1 << bit)
    return tensor
