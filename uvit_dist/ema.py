"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay at an optimizer step, counted from 0: with warm-up min(decay, (1 + step) / (10 + step)).

    The published systems use 0.9999 from step 0, without warm-up.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def ema_update_(ema: list[Tensor], masters: list[Tensor], decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·masters, in place. Both: the same shapes in the same order, float32.

    fp32 alone: at decay 0.9999 an update is below the resolution of bf16, and the average would stand still.
    """
    assert len(ema) == len(masters), f"{len(ema)} averages of {len(masters)} weights"
    assert all(tensor.dtype == torch.float32 for tensor in (*ema, *masters)), "EMA and masters are float32"
    if ema:
        torch._foreach_lerp_(ema, masters, 1 - decay)
