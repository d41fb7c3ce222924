"""The training objective: noise the data, predict the noise, forget some of the conditions."""

from __future__ import annotations

import torch
from torch import Tensor


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) shaped to broadcast over like (B, ...)."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def add_noise(x0: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """q(x_t | x_0), DDPM eq. 4: alpha_t·x0 + sigma_t·noise.

    x0, noise: (B, C, H, W) floating; alpha_t, sigma_t: (B,) floating, rounded to the dtype of x0. As x0.
    """
    return _per_sample(alpha_t.to(x0.dtype), x0) * x0 + _per_sample(sigma_t.to(x0.dtype), x0) * noise


def noise_loss(noise_pred: Tensor, noise: Tensor) -> Tensor:
    """L_simple of each sample, DDPM eq. 14: the mean of (noise − noise_pred)² over C, H, W, in fp32.

    noise_pred, noise: (B, C, H, W) floating. Returns (B,) float32.
    """
    return (noise_pred.float() - noise.float()).square().flatten(1).mean(1)


def drop_labels(y: Tensor, uniforms: Tensor, p: float, null_label: int | Tensor) -> Tensor:
    """Replace a condition by the null condition with probability p (Ho & Salimans 2022, algorithm 1).

    y: labels (B,) integer with null_label an integer, or contexts (B, L, D) floating with null_label (L, D).
    uniforms: (B,) in [0, 1); a condition is dropped where its uniform is below p. Shape and dtype of y.
    """
    return torch.where(_per_sample(uniforms < p, y), null_label, y)
