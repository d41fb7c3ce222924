"""Classifier-free guidance, for every solver, condition and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from uvit_dist.errors import ConfigError

NoisePredictor = Callable[[Tensor, Tensor], Tensor]
"""eps_model(x, t) -> noise_pred: x (B, C, H, W) floating; t () float64 in [0, 1]; noise_pred as x."""


def noise_predictor(
    net: Callable[..., Tensor],
    network_time: Callable[[Tensor], Tensor],
    cond: Mapping[str, Tensor] | None = None,
    null: Mapping[str, Tensor] | None = None,
    cfg_scale: float | None = None,
) -> NoisePredictor:
    """The noise predictor cond + s·(cond − uncond), Ho & Salimans 2022 eq. 6, from one call of the network.

    net(x, timesteps, **cond) -> (B, C, H, W), with timesteps (B,) float32 (float64 if x is).
    network_time: the schedule's.
    cond: the network's conditions by name, `y` (B,) integer or `context` (B, L, D) floating, or none.
    null: the null condition under the same names, of a shape that expands to cond's.
    cfg_scale: s; 0 or None asks for no guidance (others write w·cond + (1 − w)·uncond, with w = 1 + s).
    With guidance the network sees 2B samples, cond before uncond; else B.
    Raises ``ConfigError`` for a scale that is negative or not finite, or guidance without null conditions.
    """
    cond = dict(cond or {})
    if cfg_scale is not None and not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ConfigError(
            f"cfg_scale={cfg_scale}: the scale must be a finite number of at least 0; "
            "use 0 for no guidance (s here is w − 1 in the w·cond + (1 − w)·uncond convention)"
        )
    if not cfg_scale:
        return lambda x, t: net(x, _timesteps(network_time, x, t, len(x)), **cond).to(x.dtype)

    if not cond or null is None or set(null) != set(cond):
        raise ConfigError(
            f"cfg_scale={cfg_scale} with conditions {sorted(cond)} and null conditions {sorted(null or {})}: "
            "guidance needs a null condition for each condition; give them, or set cfg_scale to 0"
        )
    scale = cfg_scale
    both = {name: torch.cat([value, null[name].expand_as(value)]) for name, value in cond.items()}

    def guided(x: Tensor, t: Tensor) -> Tensor:
        pred = net(torch.cat([x, x]), _timesteps(network_time, x, t, 2 * len(x)), **both).to(x.dtype)
        cond_pred, uncond_pred = pred.chunk(2)
        return cond_pred + scale * (cond_pred - uncond_pred)

    return guided


def _timesteps(network_time: Callable[[Tensor], Tensor], x: Tensor, t: Tensor, batch: int) -> Tensor:
    """The network's timesteps (batch,) for one t, () or (1,), on the device of x and in fp32 at the least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return network_time(t).to(device=x.device, dtype=dtype).expand(batch)
