"""The exponential moving average of the weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from uvit_dist.compiled import library_or_none

IN_C_FROM = 2**20
"""Numbers of a tensor on a CPU from which on its average is computed by ema.c."""


def ema_decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay at an optimizer step, counted from 0: with warm-up min(decay, (1 + step) / (10 + step)).

    The published systems use 0.9999 from step 0, without warm-up.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def ema_update_(ema: list[Tensor], masters: list[Tensor], decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·masters, in place. Both: the same shapes in the same order, float32.

    fp32 alone: at decay 0.9999 an update is below the resolution of bf16, and the average would stand still. Large
    tensors on a CPU take ema.c, with the same result.
    """
    assert len(ema) == len(masters), f"{len(ema)} averages of {len(masters)} weights"
    assert all(tensor.dtype == torch.float32 for tensor in (*ema, *masters)), "EMA and masters are float32"
    weight, rest = 1 - decay, []
    for average, master in zip(ema, masters, strict=True):
        if weight < 0.5 and _is_plain(average, master) and (update := kernel()) is not None:
            update(average.data_ptr(), master.data_ptr(), weight, average.numel())
            increment_version(average)
        else:
            rest.append((average, master))
    if rest:
        torch._foreach_lerp_([average for average, _ in rest], [master for _, master in rest], weight)


def _is_plain(average: Tensor, master: Tensor) -> bool:
    """Whether ema.c can take them: large, of one shape, on a CPU and without strides."""
    on_cpu = average.device.type == master.device.type == "cpu"
    large = average.shape == master.shape and average.numel() >= IN_C_FROM
    return on_cpu and large and average.is_contiguous() and master.is_contiguous()


@cache
def kernel() -> Callable[[int, int, float, int], None] | None:
    """``ema_update`` of ema.c: the addresses of the averages and the masters, the weight of the latter, how many.

    None where it cannot be compiled. Once for each process. It runs on the threads of PyTorch, whose OpenMP it finds.
    """
    code = library_or_none(Path(__file__).with_name("ema.c"), "PyTorch computes the EMA", "-fopenmp")
    if code is None:
        return None
    code.ema_update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_int64]
    code.ema_update.restype = None
    return code.ema_update
