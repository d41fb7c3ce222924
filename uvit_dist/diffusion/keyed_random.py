"""Random numbers as pure functions of identity: (seed, purpose, epoch, id), never of call order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over the batch in
int64 arithmetic, so that the integers are equal on every device. A key is (seed, purpose); a counter is
(draw, epoch, id). The floating-point numbers made of them may differ between devices in the last bit.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def _multiply(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of value * factor; int64 wraps modulo 2^64, which keeps both right."""
    product = value * factor
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10. counter: four int64 tensors that broadcast, values in 0…2^32-1. Returns four of the same kind.

    All of one shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The 64-bit Philox key of a seed and a purpose, as two 32-bit words."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keyed_bits(seed: int, purpose: str, epoch: int, ids: Tensor, count: int) -> Tensor:
    """``count`` 32-bit integers for each id. ids: (B,) int64, ≥ 0. Returns (B, count) int64 in 0…2^32-1.

    Raises ``ValueError`` for an epoch beyond 32 bits.
    """
    if not 0 <= epoch <= _MASK:
        raise ValueError(f"epoch {epoch} must lie in 0…2^32-1")
    draws = torch.arange((count + 3) // 4, dtype=torch.int64, device=ids.device)[None]
    ids = ids.to(torch.int64)[:, None]
    counter = (draws, torch.full_like(draws, epoch), ids & _MASK, (ids >> 32) & _MASK)
    words = torch.stack(philox(counter, key_of(seed, purpose)), dim=-1)
    return words.reshape(len(ids), -1)[:, :count]


def keyed_uniform(seed: int, purpose: str, epoch: int, ids: Tensor, count: int = 1) -> Tensor:
    """Uniform numbers in [0, 1), 24 bits each. ids: (B,) int64. Returns (B, count) float32."""
    return (keyed_bits(seed, purpose, epoch, ids, count) >> 8).to(torch.float32) * 2.0**-24


def keyed_integers(seed: int, purpose: str, epoch: int, ids: Tensor, low: int, high: int) -> Tensor:
    """One integer in low…high-1 for each id, bias below (high-low)/2^32. ids: (B,) int64. Returns (B,) int64."""
    return low + ((keyed_bits(seed, purpose, epoch, ids, 1)[:, 0] * (high - low)) >> 32)


def keyed_normal(seed: int, purpose: str, epoch: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers by Box and Muller. ids: (B,) int64. Returns (B, *shape) float32, within ±6.7."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = keyed_bits(seed, purpose, epoch, ids, 2 * pairs).reshape(len(ids), pairs, 2)
    radius = torch.sqrt(-2.0 * torch.log((bits[..., 0] + 1).to(torch.float32) * 2.0**-32))
    angle = bits[..., 1].to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normals.reshape(len(ids), -1)[:, :count].reshape(len(ids), *shape)
