"""Exact sums over a tensor's bits, on its device: equal bits give equal sums, and any one flipped bit another one.

Each word is mixed first, by x (2x + 1) modulo 2^64, as in the cipher RC6: one to one, so that no change of one word is
lost, and not linear. Plain sums would lose two flips of the same bit in half of all cases, once up and once down, and a
stuck bit flips often.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 8
"""Bytes."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's mixed 64-bit words, modulo 2^64: a scalar int64, whichever order it is summed in.

    tensor: of any shape and dtype. No synchronisation with the device.
    """
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.storage_offset() % WORD:
        data = data.clone()
    whole = data.numel() // WORD * WORD
    total = _mixed(data[:whole]).sum()
    if whole < data.numel():
        last = data.new_zeros(WORD)
        last[: data.numel() - whole] = data[whole:]
        total = total + _mixed(last)[0]
    return total


def _mixed(data: Tensor) -> Tensor:
    words = data.view(torch.int64)
    return torch.addcmul(words, words, words, value=2)


@torch.no_grad()
def flip_bit(tensor: Tensor, bit: int) -> Tensor:
    """Flip one bit of the first element, in place, as a fault on demand. tensor: any shape, float.

    bit: from the lowest, of a mantissa, to the sign.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    first = tensor.view(whole)[(0,) * tensor.ndim]
    first.bitwise_xor_(1 << bit)
    return tensor
