"""Samplers: DPM-Solver++, DPM-Solver and Euler–Maruyama, from noise x_T to data.

Each takes eps_model(x, t) -> noise_pred, with t a 0-d float64 tensor on the device of x. The grid and every
coefficient are computed in float64 on the host before the first call of the model; the loop waits for
nothing. The state keeps the dtype of x_T.

DPM-Solver (Lu et al. 2022a, arXiv 2206.00927) integrates the noise prediction, DPM-Solver++ (Lu et al.
2022b, arXiv 2211.01095) the data prediction. Both are one exponential integrator: with f the prediction, h
the step in lambda = log(alpha / sigma), and

    noise prediction:  c = alpha, w = sigma, u = +h        data prediction:  c = sigma, w = alpha, u = −h

a step of first order from s to t is x_t = (c_t / c_s)·x_s − w_t·(e^u − 1)·f_s, and the higher orders add
multiples of f − f_s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uvit_dist.diffusion.guidance import NoisePredictor
from uvit_dist.diffusion.schedule import Schedule, VPSDESchedule
from uvit_dist.errors import ConfigError

NoiseSource = Callable[[int, torch.Size], Tensor]
"""noise_fn(step_index, shape) -> standard normals of that shape, for each step that adds noise, from 0."""


def fast_orders(steps: int) -> list[int]:
    """Orders of the single steps that spend `steps` calls of the model (DPM-Solver-fast, Lu et al. 2022a).

    Raises ``ConfigError`` for too few steps.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: a sampler needs at least 1 step; set 50, as the published systems have")
    thirds, rest = divmod(steps, 3)
    return [3] * thirds + [rest] if rest else [3] * (thirds - 1) + [2, 1]


@torch.no_grad()
def dpm_solver_pp(
    eps_model: NoisePredictor,
    schedule: Schedule,
    x_T: Tensor,
    steps: int,
    t_start: float = 1.0,
    t_end: float = 1 / 1000,
) -> Tensor:
    """DPM-Solver++ in data prediction, single steps on a grid uniform in t; `steps` calls of the model.

    x_T: (B, C, H, W) floating; the same shape and dtype come back.
    """
    _check_span(t_start, t_end)
    orders = fast_orders(steps)
    times = torch.linspace(t_start, t_end, steps + 1, dtype=torch.float64)
    return _integrate(eps_model, _plan(schedule, times, orders, data_prediction=True), x_T)


@torch.no_grad()
def dpm_solver(
    eps_model: NoisePredictor,
    schedule: Schedule,
    x_T: Tensor,
    steps: int,
    t_start: float = 1.0,
    t_end: float = 1e-4,
) -> Tensor:
    """DPM-Solver-fast in noise prediction, single steps equally long in lambda; `steps` calls of the model.

    x_T: (B, C, H, W) floating; the same shape and dtype come back.
    """
    _check_span(t_start, t_end)
    orders = fast_orders(steps)
    first, last = schedule.lambda_(torch.tensor([t_start, t_end], dtype=torch.float64)).tolist()
    edges = np.linspace(first, last, len(orders) + 1)
    inner = [np.linspace(a, b, order + 1)[:-1] for a, b, order in zip(edges[:-1], edges[1:], orders, strict=True)]
    lambdas = torch.from_numpy(np.concatenate([*inner, edges[-1:]]))
    plan = _plan(schedule, schedule.inverse_lambda(lambdas), orders, data_prediction=False)
    return _integrate(eps_model, plan, x_T)


@torch.no_grad()
def euler_maruyama(
    eps_model: NoisePredictor,
    schedule: VPSDESchedule,
    x_T: Tensor,
    steps: int,
    noise_fn: NoiseSource | None,
    ode: bool = False,
) -> Tensor:
    """Euler–Maruyama on the reverse SDE or the probability-flow ODE (Song et al. 2021, eq. 6 and 13).

    x_T: (B, C, H, W) floating; the same shape and dtype come back. The grid is 0 and `steps` times uniform
    in [1e-3, 1]; the last step, down to 0, adds no noise, so that noise_fn is asked for steps 0…steps − 2
    (never for the ODE, where it may be None). The score is −noise_pred / sigma(t).
    Raises ``ConfigError`` for too few steps.
    """
    if steps < 2:
        raise ConfigError(
            f"steps={steps}: Euler–Maruyama needs at least 2 steps; set 1000, as the published systems have"
        )
    assert ode or noise_fn is not None, "the SDE needs a source of noise"
    grid = torch.from_numpy(np.append(0.0, np.linspace(1e-3, 1, steps)))
    t, step = grid[1:].flip(0), grid.diff().flip(0)
    beta, sigma = schedule.beta(t), schedule.sigma(t)
    x_factors = (1 + 0.5 * beta * step).tolist()
    eps_factors = ((0.5 if ode else 1.0) * beta / sigma * step).tolist()
    noise_factors = (beta * step).sqrt().tolist()

    x, times = x_T, t.to(x_T.device)
    for i in range(steps):
        eps = eps_model(x, times[i]).to(x.dtype)
        x = x_factors[i] * x - eps_factors[i] * eps
        if noise_fn is not None and not ode and i < steps - 1:
            x = x + noise_factors[i] * noise_fn(i, x.shape).to(x)
    return x


@dataclass(frozen=True)
class _Stage:
    """A call of the model and the point reached: x = a·x_s − b·f_s − c·(f − f_s); the step starts at s."""

    time: float
    starts_step: bool
    x_factor: float  # a
    first_factor: float  # b
    change_factor: float  # c
    data_from: tuple[float, float] | None  # (alpha, sigma) at `time`, where f is the data prediction


def _plan(schedule: Schedule, times: Tensor, orders: list[int], data_prediction: bool) -> list[_Stage]:
    """The stages on a grid of the starts, inner points and ends of the steps.

    times: (sum(orders) + 1,) float64, decreasing. Orders 2 and 3 are algorithms 1 and 2 of Lu et al. 2022a,
    with r1 and r2 read from the grid.
    """
    t, alpha, sigma, lam = (
        v.numpy() for v in (times, schedule.alpha(times), schedule.sigma(times), schedule.lambda_(times))
    )
    carry, weight, sign = (sigma, alpha, -1.0) if data_prediction else (alpha, sigma, 1.0)
    stages: list[_Stage] = []
    start = 0
    for order in orders:
        for stage in range(order):
            here, end = start + stage, start + stage + 1
            u = sign * (lam[end] - lam[start])
            r = (lam[here] - lam[start]) / (lam[end] - lam[start])  # how far along f was taken
            if stage == 0:
                change = 0.0
            elif order == 2:
                change = np.expm1(u) / (2 * r)
            else:
                change = (np.expm1(u) / u - 1) / r
            stages.append(
                _Stage(
                    time=float(t[here]),
                    starts_step=stage == 0,
                    x_factor=float(carry[end] / carry[start]),
                    first_factor=float(weight[end] * np.expm1(u)),
                    change_factor=float(weight[end] * change),
                    data_from=(float(alpha[here]), float(sigma[here])) if data_prediction else None,
                )
            )
        start += order
    return stages


def _integrate(eps_model: NoisePredictor, plan: list[_Stage], x_T: Tensor) -> Tensor:
    """Follow the plan from x_T (B, C, H, W); the same shape and dtype come back."""
    times = torch.tensor([stage.time for stage in plan], dtype=torch.float64, device=x_T.device)
    x = x_start = first = x_T
    for stage, t in zip(plan, times.unbind(), strict=True):
        f = eps_model(x, t).to(x.dtype)
        if stage.data_from is not None:
            alpha_t, sigma_t = stage.data_from
            f = (x - sigma_t * f) / alpha_t
        if stage.starts_step:
            x_start, first = x, f
        x = stage.x_factor * x_start - stage.first_factor * first
        if not stage.starts_step:
            x = x - stage.change_factor * (f - first)
    return x


def _check_span(t_start: float, t_end: float) -> None:
    if not 0 < t_end < t_start <= 1:
        raise ConfigError(f"t_start={t_start}, t_end={t_end}: must be 0 < t_end < t_start <= 1; give others, or none")
