from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden_values import GOLDEN
from uvit_dist.diffusion.schedule import DiscreteSchedule, Schedule, VPSDESchedule

SCHEDULES = [DiscreteSchedule(), VPSDESchedule()]
both = pytest.mark.parametrize("schedule", SCHEDULES, ids=["discrete", "vpsde"])


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "schedules.npz") as file:
        return dict(file)


def test_discrete_schedule_is_the_golden_one(golden: dict[str, np.ndarray]) -> None:
    schedule = DiscreteSchedule()
    np.testing.assert_allclose(schedule.betas, golden["sd_betas"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(schedule.cum_alphas, golden["sd_cum_alphas"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(schedule.cum_betas, golden["sd_cum_betas"], rtol=1e-12, atol=0)


def test_training_coefficients_are_those_of_step_n(golden: dict[str, np.ndarray]) -> None:
    n = torch.tensor([1, 2, 500, 999, 1000])
    alpha_t, sigma_t = DiscreteSchedule().alpha_sigma(n)
    np.testing.assert_allclose(alpha_t, golden["sd_cum_alphas"][n] ** 0.5, rtol=1e-12)
    np.testing.assert_allclose(sigma_t, golden["sd_cum_betas"][n] ** 0.5, rtol=1e-12)
    # The control: counted from 0, as others do, the first sigma would be that of clean data.
    assert not np.allclose(sigma_t, golden["sd_cum_betas"][n - 1] ** 0.5, rtol=1e-3)


def test_discrete_schedule_between_the_steps_passes_through_them(golden: dict[str, np.ndarray]) -> None:
    t = torch.arange(1001, dtype=torch.float64) / 1000
    schedule = DiscreteSchedule()
    np.testing.assert_allclose(schedule.alpha(t) ** 2, golden["sd_cum_alphas"], rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, golden["sd_cum_betas"], rtol=1e-11)
    middle = schedule.log_alpha((t[:-1] + t[1:]) / 2)
    np.testing.assert_allclose(middle, (schedule.log_alpha(t[:-1]) + schedule.log_alpha(t[1:])) / 2, rtol=1e-11)


def test_vpsde_is_the_golden_one(golden: dict[str, np.ndarray]) -> None:
    schedule, t = VPSDESchedule(), torch.from_numpy(golden["vpsde_t"])
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    np.testing.assert_allclose(alpha_t**2, golden["vpsde_cum_alpha"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(sigma_t**2, golden["vpsde_cum_beta"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedule.beta(t), golden["vpsde_beta"], rtol=1e-12, atol=0)


@both
def test_signal_and_noise_keep_the_variance_and_the_ratio_falls(schedule: Schedule) -> None:
    t = torch.linspace(1e-4, 1, 5000, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.lambda_(t), torch.log(schedule.alpha(t) / schedule.sigma(t)), rtol=0, atol=1e-9)
    assert (schedule.lambda_(t).diff() < 0).all()


@both
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_inverse_lambda_inverts(schedule: Schedule, dtype: torch.dtype, atol: float) -> None:
    t = torch.linspace(1e-3, 1, 3000, dtype=dtype).reshape(3, -1)
    back = schedule.inverse_lambda(schedule.lambda_(t))
    assert back.dtype == dtype
    torch.testing.assert_close(back, t, rtol=0, atol=atol)
    torch.testing.assert_close(schedule.inverse_lambda(schedule.lambda_(t[1, 5])), t[1, 5], rtol=0, atol=atol)


@both
def test_clean_data_at_time_zero(schedule: Schedule) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert schedule.alpha(zero) == 1
    assert schedule.sigma(zero) == 0
    assert schedule.lambda_(zero) == torch.inf
    assert schedule.inverse_lambda(schedule.lambda_(zero)) == 0


def test_network_times() -> None:
    t = torch.tensor([1e-3, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(DiscreteSchedule().network_time(t), torch.tensor([1.0, 500, 1000]).double())
    torch.testing.assert_close(VPSDESchedule().network_time(t), torch.tensor([0.999, 499.5, 999]).double())


@both
def test_nothing_waits_for_the_device(schedule: Schedule) -> None:
    """On the meta device there are no values: any look at one from the host raises."""
    t = torch.empty(4, dtype=torch.float64, device="meta")
    for function in (
        schedule.alpha,
        schedule.sigma,
        schedule.lambda_,
        schedule.inverse_lambda,
        schedule.network_time,
    ):
        assert function(t).shape == (4,)
    time = t.long() if isinstance(schedule, DiscreteSchedule) else t
    assert all(part.device.type == "meta" for part in schedule.alpha_sigma(time))


def test_tables_made_while_sampling_serve_training() -> None:
    schedule, n = DiscreteSchedule(), torch.tensor([3])
    with torch.inference_mode():
        schedule.alpha_sigma(n)
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (weight * schedule.alpha_sigma(n)[0]).sum().backward()
    assert weight.grad is not None
