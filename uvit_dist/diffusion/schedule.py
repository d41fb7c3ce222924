"""Noise schedules: x_t = alpha(t)·x0 + sigma(t)·noise, alpha² + sigma² = 1, data at t = 0, noise at t = 1.

lambda_ is log(alpha / sigma), half the log signal-to-noise ratio. Every function of t computes in the dtype
of t and on its device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule(ABC):
    """What solvers and the objective ask of a variance-preserving schedule."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha(t). t: any shape, floating, in [0, 1]; the same shape and dtype come back."""

    @abstractmethod
    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        """The t at which lambda_(t) = lambda_t. Any shape, floating; the same shape and dtype come back."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given as `timesteps` at time t. t: any shape, floating; the same comes back."""

    @abstractmethod
    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), (B,) each, at the times (B,) that training draws: n in 1…N or t in [0, 1)."""

    @abstractmethod
    def training_time(self, words: Tensor) -> Tensor:
        """The times that training draws from uniform 32-bit words: n in 1…N or t in [0, 1). (B,) int64 → (B,)."""

    @abstractmethod
    def training_timesteps(self, time: Tensor) -> Tensor:
        """What the network is given as `timesteps` at such times, (B,) → (B,)."""

    @abstractmethod
    def elapsed(self, time: Tensor) -> Tensor:
        """How far along the time axis such times lie, in [0, 1). (B,) → (B,) floating."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t), the scale of the data in x_t. Shape and dtype of t."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """sigma(t) = √(1 − alpha²), the scale of the noise in x_t. Shape and dtype of t."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def lambda_(self, t: Tensor) -> Tensor:
        """log alpha(t) − log sigma(t), half the log signal-to-noise ratio. Shape and dtype of t."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))


def _log_alpha_of_lambda(lambda_t: Tensor) -> Tensor:
    """log alpha of half the logSNR: −½ log(1 + exp(−2 lambda)). Any shape, floating; the same comes back."""
    return -0.5 * torch.logaddexp(torch.zeros_like(lambda_t), -2 * lambda_t)


class DiscreteSchedule(Schedule):
    """Stable Diffusion's 1000 variances, evenly spaced in their square roots (DDPM's chain, eq. 2 and 4).

    betas: (N,) float64. cum_alphas, cum_betas: (N + 1,) float64, the squares of alpha and sigma after n steps
    (index 0 is clean data). Step n is at t = n/N; between steps log alpha is linear, as DPM-Solver has it.
    """

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        log_alphas = torch.cat([self.betas.new_zeros(1), 0.5 * torch.log1p(-self.betas).cumsum(0)])
        self.cum_alphas = torch.exp(2 * log_alphas)
        self.cum_betas = -torch.expm1(2 * log_alphas)
        self._host = {
            "log_alpha": log_alphas,
            "alpha": self.cum_alphas.sqrt(),
            "sigma": self.cum_betas.sqrt(),
        }
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """N + 1 values, copied once to each device: a copy at every step would wait for the device."""
        key = (name, device, dtype)
        if key not in self._placed:
            with torch.inference_mode(False):
                self._placed[key] = self._host[name].to(device=device, dtype=dtype)
        return self._placed[key]

    def log_alpha(self, t: Tensor) -> Tensor:
        """Linear between the points (n/N, ½ log cum_alphas[n]). t: any shape, floating, in [0, 1]."""
        table = self._table("log_alpha", t.device, t.dtype)
        position = t * self.num_timesteps
        left = position.long().clamp(0, self.num_timesteps - 1)
        return table[left] + (position - left) * (table[left + 1] - table[left])

    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        """Invert the piecewise linear log alpha. lambda_t: any shape, floating."""
        table = self._table("log_alpha", lambda_t.device, lambda_t.dtype)
        log_alpha = _log_alpha_of_lambda(lambda_t).contiguous()
        left = torch.searchsorted(-table, -log_alpha, right=True).sub(1).clamp(0, self.num_timesteps - 1)
        return (left + (log_alpha - table[left]) / (table[left + 1] - table[left])) / self.num_timesteps

    def network_time(self, t: Tensor) -> Tensor:
        """t·N, so that the network sees in sampling the n = 1…N it was trained on. t: any shape, floating."""
        return t * self.num_timesteps

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """√cum_alphas[n] and √cum_betas[n], DDPM eq. 4. time: n in 1…N, (B,) integer; (B,) float64 each."""
        alphas = self._table("alpha", time.device, torch.float64)
        sigmas = self._table("sigma", time.device, torch.float64)
        return alphas[time], sigmas[time]

    def training_time(self, words: Tensor) -> Tensor:
        """n uniform in 1…N, bias below N/2^32. words: (B,) int64 in 0…2^32-1. Returns (B,) int64."""
        return 1 + ((words * self.num_timesteps) >> 32)

    def training_timesteps(self, time: Tensor) -> Tensor:
        """n itself. time: n in 1…N, (B,) int64; the same comes back."""
        return time

    def elapsed(self, time: Tensor) -> Tensor:
        """(n − 1)/N. time: n in 1…N, (B,) int64. Returns (B,) float32."""
        return (time - 1).float() / self.num_timesteps


@dataclass(frozen=True)
class VPSDESchedule(Schedule):
    """The SDE dx = −½ beta(t) x dt + √beta(t) dw with a linear beta(t) (Song et al. 2021, eq. 32)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def beta(self, t: Tensor) -> Tensor:
        """beta(t), the squared diffusion. Shape and dtype of t."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        """−½ ∫₀ᵗ beta, Song et al. 2021, eq. 33. t: any shape, floating, in [0, 1]."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def inverse_lambda(self, lambda_t: Tensor) -> Tensor:
        """The positive root in t, in the form that does not cancel near t = 0. Any shape, floating."""
        slope = self.beta_max - self.beta_min
        constant = -4 * _log_alpha_of_lambda(lambda_t)
        return constant / ((self.beta_min**2 + slope * constant).sqrt() + self.beta_min)

    def network_time(self, t: Tensor) -> Tensor:
        """t·999, in training and in sampling. t: any shape, floating."""
        return t * 999

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t). time: t in [0, 1], (B,) floating; (B,) each, in its dtype."""
        return self.alpha(time), self.sigma(time)

    def training_time(self, words: Tensor) -> Tensor:
        """t uniform in [0, 1), of 24 bits, with no cut-off at 0. words: (B,) int64. Returns (B,) float32."""
        return (words >> 8).float() * 2.0**-24

    def training_timesteps(self, time: Tensor) -> Tensor:
        """t·999. time: (B,) floating; the same comes back."""
        return self.network_time(time)

    def elapsed(self, time: Tensor) -> Tensor:
        """t. time: (B,) floating; the same comes back."""
        return time


SCHEDULES: dict[str, type[Schedule]] = {"discrete_sd": DiscreteSchedule, "vpsde": VPSDESchedule}
"""Schedules by their names in the configuration."""
