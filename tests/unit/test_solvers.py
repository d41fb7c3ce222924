from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_values import GOLDEN
from uvit_dist.diffusion.schedule import DiscreteSchedule, Schedule, VPSDESchedule
from uvit_dist.diffusion.solvers import dpm_solver, dpm_solver_pp, euler_maruyama, fast_orders
from uvit_dist.errors import ConfigError

DISCRETE, VPSDE = DiscreteSchedule(), VPSDESchedule()


class ToyModel:
    """The toy noise model of tests/golden/README.md; remembers the times it was called at."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        return 0.7 * torch.tanh(x) + 0.3 * torch.sin(3 * x + 2 * t) + 0.1 * t


class ToyModel2(ToyModel):
    """The toy noise model M2 behind the network's time τ = t·999."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        tau = VPSDE.network_time(t)
        self.times.append(tau)
        return 0.7 * torch.tanh(x) + 0.3 * torch.sin(3 * x + 2 * tau / 999)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def relative(actual: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.numpy() - expected).max() / np.abs(expected).max())


def check_times(model: ToyModel, expected: np.ndarray) -> None:
    assert all(t.dtype == torch.float64 and t.dim() == 0 for t in model.times)
    np.testing.assert_allclose(torch.stack(model.times).numpy(), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_dpm_solver_pp_is_the_golden_one(steps: int) -> None:
    file, model = golden(f"dpm_solver_pp_discrete_{steps}"), ToyModel()
    x = dpm_solver_pp(model, DISCRETE, torch.from_numpy(file["x_T"]), steps)
    assert x.dtype == torch.float64
    assert relative(x, file["output"]) <= 1e-6
    check_times(model, file["model_times"])


@pytest.mark.parametrize("steps", [8, 20, 50])
def test_dpm_solver_is_the_golden_one(steps: int) -> None:
    file, model = golden(f"dpm_solver_vpsde_{steps}"), ToyModel()
    x = dpm_solver(model, VPSDE, torch.from_numpy(file["x_T"]), steps)
    assert relative(x, file["output"]) <= 1e-6
    check_times(model, file["model_times"])


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_euler_maruyama_is_the_golden_one(kind: str) -> None:
    file, model = golden(f"euler_maruyama_{kind}_20"), ToyModel2()
    noises, asked = torch.from_numpy(file["noises"]), []

    def noise_fn(step_index: int, shape: torch.Size) -> Tensor:
        asked.append(step_index)
        assert shape == noises.shape[1:]
        return noises[step_index]

    x = euler_maruyama(model, VPSDE, torch.from_numpy(file["x_T"]), 20, noise_fn, ode=kind == "ode")
    assert relative(x, file["output"]) <= 1e-9
    check_times(model, file["model_times"])
    assert asked == (list(range(19)) if kind == "sde" else [])


def test_golden_values_tell_the_solvers_apart() -> None:
    """Controls: another solver, schedule, end or time of the network leaves the tolerance far behind."""
    file = golden("dpm_solver_pp_discrete_50")
    x_T, output = torch.from_numpy(file["x_T"]), file["output"]
    assert relative(dpm_solver(ToyModel(), DISCRETE, x_T, 50, t_end=1e-3), output) > 1e-5
    assert relative(dpm_solver_pp(ToyModel(), VPSDE, x_T, 50), output) > 1e-3
    assert relative(dpm_solver_pp(ToyModel(), DISCRETE, x_T, 50, t_end=2e-3), output) > 1e-5
    file = golden("euler_maruyama_ode_20")
    late = euler_maruyama(
        lambda x, t: ToyModel2()(x, t * 1000 / 999), VPSDE, torch.from_numpy(file["x_T"]), 20, None, ode=True
    )
    assert relative(late, file["output"]) > 1e-6


def gaussian_model(schedule: Schedule, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact noise predictor of data N(0, std²): sigma·x / (alpha²·std² + sigma²)."""

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma * x / (alpha**2 * std**2 + sigma**2)

    return eps_model


def gaussian_flow(schedule: Schedule, std: float, t_end: float) -> float:
    """What the probability flow from t = 1 to t_end multiplies x by, for data N(0, std²)."""
    t = torch.tensor([1.0, t_end], dtype=torch.float64)
    start, end = (schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2).sqrt().tolist()
    return end / start


@pytest.mark.parametrize("solver", [dpm_solver_pp, dpm_solver])
@pytest.mark.parametrize("schedule", [DISCRETE, VPSDE], ids=["discrete", "vpsde"])
def test_solvers_converge_to_the_flow_of_gaussian_data(solver: Callable[..., Tensor], schedule: Schedule) -> None:
    x_T, exact = torch.ones(1, 1, 1, 1, dtype=torch.float64), gaussian_flow(schedule, 0.5, 1e-3)
    eps_model = gaussian_model(schedule, 0.5)
    errors = [abs(solver(eps_model, schedule, x_T, n, t_end=1e-3).item() / exact - 1) for n in (16, 64, 256)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < min(3e-3, errors[0] / 30)


def test_third_order_converges_at_third_order() -> None:
    """3n + 1 calls of the model; thrice the steps divide the error by about 27."""
    x_T, exact = torch.ones(1, 1, 1, 1, dtype=torch.float64), gaussian_flow(VPSDE, 0.5, 1e-2)
    eps_model = gaussian_model(VPSDE, 0.5)
    errors = [abs(dpm_solver(eps_model, VPSDE, x_T, n, t_end=1e-2).item() - exact) for n in (47, 143)]
    assert 15 < errors[0] / errors[1] < 60


def test_euler_maruyama_reaches_the_spread_of_gaussian_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(4, 1, 50, 50, dtype=torch.float64, generator=generator)
    x = euler_maruyama(
        gaussian_model(VPSDE, 0.5),
        VPSDE,
        x_T,
        300,
        lambda _, shape: torch.randn(shape, dtype=torch.float64, generator=generator),
    )
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    ode = euler_maruyama(gaussian_model(VPSDE, 0.5), VPSDE, x_T, 1000, None, ode=True)
    torch.testing.assert_close(ode, gaussian_flow(VPSDE, 0.5, 1e-9) * x_T, rtol=5e-3, atol=0)


def test_fast_plan() -> None:
    assert fast_orders(1) == [1]
    assert fast_orders(2) == [2]
    assert fast_orders(3) == [2, 1]
    assert fast_orders(50) == [3] * 16 + [2]
    assert fast_orders(49) == [3] * 16 + [1]
    assert all(sum(fast_orders(n)) == n for n in range(1, 100))


@pytest.mark.parametrize("solver", [dpm_solver_pp, dpm_solver])
def test_state_keeps_its_dtype_and_the_model_is_called_steps_times(solver: Callable[..., Tensor]) -> None:
    for dtype in (torch.float32, torch.float64):
        for steps in (1, 2, 3, 10):
            model = ToyModel()
            x_T = torch.randn(2, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
            x = solver(lambda x, t, model=model: model(x, t).to(torch.bfloat16), VPSDE, x_T, steps)
            assert x.dtype == dtype
            assert len(model.times) == steps
            assert torch.isfinite(x).all()


def test_samples_in_float32_are_near_those_in_float64() -> None:
    file = golden("dpm_solver_pp_discrete_50")
    x = dpm_solver_pp(lambda x, t: ToyModel()(x, t.to(x)), DISCRETE, torch.from_numpy(file["x_T"]).float(), 50)
    assert x.dtype == torch.float32
    assert relative(x, file["output"]) < 1e-5


@pytest.mark.parametrize("solver", [dpm_solver_pp, dpm_solver])
def test_dpm_solvers_wait_for_nothing(solver: Callable[..., Tensor]) -> None:
    """On the meta device there are no values: any look at one from the host raises."""
    x = solver(ToyModel(), DISCRETE, torch.empty(2, 3, 4, 4, device="meta"), 10)
    assert x.shape == (2, 3, 4, 4)


@pytest.mark.parametrize("ode", [True, False])
def test_euler_maruyama_waits_for_nothing(ode: bool) -> None:
    x_T = torch.empty(2, 3, 4, 4, device="meta")
    x = euler_maruyama(ToyModel(), VPSDE, x_T, 5, lambda _, shape: torch.empty(shape, device="meta"), ode)
    assert x.shape == x_T.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_waited_for_at_most_once() -> None:
    """The one copy of the times, before the first call of the model, is all that may wait."""
    x_T = torch.randn(2, 4, 8, 8, device="cuda")

    def run(sample: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]) -> None:
        def model(x: Tensor, t: Tensor) -> Tensor:
            torch.cuda.set_sync_debug_mode("error")  # from the first call on
            return torch.tanh(x) * t.to(x.dtype)

        try:
            sample(model)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run(lambda model: dpm_solver_pp(model, DISCRETE, x_T, 10))
    run(lambda model: dpm_solver(model, VPSDE, x_T, 10))
    run(lambda model: euler_maruyama(model, VPSDE, x_T, 10, lambda _, s: torch.randn(s, device="cuda")))


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps_are_refused(steps: int) -> None:
    x_T = torch.zeros(1, 1, 2, 2)
    for solver in (dpm_solver_pp, dpm_solver):
        with pytest.raises(ConfigError, match=f"steps={steps}"):
            solver(ToyModel(), DISCRETE, x_T, steps)
    with pytest.raises(ConfigError, match="at least 2"):
        euler_maruyama(ToyModel(), VPSDE, x_T, 1, None, ode=True)


@pytest.mark.parametrize(("t_start", "t_end"), [(1.0, 0.0), (0.5, 0.5), (1.5, 0.1)])
def test_spans_outside_the_schedule_are_refused(t_start: float, t_end: float) -> None:
    for solver in (dpm_solver_pp, dpm_solver):
        with pytest.raises(ConfigError, match="t_end"):
            solver(ToyModel(), DISCRETE, torch.zeros(1, 1, 2, 2), 5, t_start, t_end)
