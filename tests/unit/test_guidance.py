from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uvit_dist.diffusion.guidance import noise_predictor
from uvit_dist.diffusion.schedule import DiscreteSchedule, VPSDESchedule
from uvit_dist.errors import ConfigError


class Network:
    """Depends on each of its inputs, sample by sample, and counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.timesteps: list[Tensor] = []

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        self.timesteps.append(timesteps)
        shift = 0.001 * timesteps
        if y is not None:
            shift = shift + y
        if context is not None:
            shift = shift + context.mean((1, 2))
        return torch.tanh(x + shift[:, None, None, None])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


T = torch.tensor(0.25, dtype=torch.float64)
SCHEDULE = DiscreteSchedule()
Y, NULL = torch.tensor([0, 1, 2]), torch.tensor(5)


def test_guidance_is_cond_plus_s_times_the_difference_from_one_call(x: Tensor) -> None:
    net = Network()
    guided = noise_predictor(net, SCHEDULE.network_time, {"y": Y}, {"y": NULL}, 0.4)(x, T)
    assert net.batches == [6]
    assert guided.dtype == x.dtype
    timesteps = torch.full((3,), 250.0)
    cond, uncond = net(x, timesteps, y=Y), net(x, timesteps, y=NULL.expand(3))
    torch.testing.assert_close(guided, cond + 0.4 * (cond - uncond))
    torch.testing.assert_close(guided, 1.4 * cond - 0.4 * uncond)
    # The controls: neither the other convention nor the exchanged halves would pass.
    assert not torch.allclose(guided, 0.4 * cond + 0.6 * uncond, atol=1e-3)
    assert not torch.allclose(guided, uncond + 0.4 * (uncond - cond), atol=1e-3)


def test_guidance_with_contexts(x: Tensor) -> None:
    net, context = Network(), torch.arange(3.0).reshape(3, 1, 1).expand(3, 7, 5)
    null = torch.full((7, 5), 4.0)
    guided = noise_predictor(net, SCHEDULE.network_time, {"context": context}, {"context": null}, 1.0)(x, T)
    assert net.batches == [6]
    timesteps = torch.full((3,), 250.0)
    cond, uncond = net(x, timesteps, context=context), net(x, timesteps, context=null.expand(3, 7, 5))
    torch.testing.assert_close(guided, 2 * cond - uncond)


@pytest.mark.parametrize("scale", [None, 0, 0.0])
def test_no_guidance_is_one_call_on_the_batch_itself(x: Tensor, scale: float | None) -> None:
    net = Network()
    pred = noise_predictor(net, SCHEDULE.network_time, {"y": Y}, {"y": NULL}, scale)(x, T)
    assert net.batches == [3]
    torch.testing.assert_close(pred, net(x, torch.full((3,), 250.0), y=Y))


def test_unconditional_network(x: Tensor) -> None:
    net = Network()
    noise_predictor(net, SCHEDULE.network_time)(x, T[None])
    assert net.batches == [3]


@pytest.mark.parametrize("scale", [None, 0.4])
def test_the_network_sees_the_time_of_its_schedule_in_fp32(x: Tensor, scale: float | None) -> None:
    for schedule, seen in ((DiscreteSchedule(), 250.0), (VPSDESchedule(), 249.75)):
        net = Network()
        noise_predictor(net, schedule.network_time, {"y": Y}, {"y": NULL}, scale)(x.bfloat16(), T)
        assert net.timesteps[0].dtype == torch.float32
        assert set(net.timesteps[0].tolist()) == {seen}


def test_a_network_in_low_precision_gives_the_dtype_of_the_state(x: Tensor) -> None:
    predictor = noise_predictor(
        lambda *args, **kw: Network()(*args, **kw).bfloat16(),
        SCHEDULE.network_time,
        {"y": Y},
        {"y": NULL},
        0.4,
    )
    assert predictor(x, T).dtype == torch.float32


@pytest.mark.parametrize(
    ("cond", "null", "scale"),
    [
        ({"y": Y}, None, 0.4),
        ({}, {}, 0.4),
        ({"y": Y}, {"context": NULL}, 0.4),
        ({"y": Y}, {"y": NULL}, -1.0),
        ({"y": Y}, {"y": NULL}, float("nan")),
    ],
)
def test_what_cannot_be_guided_is_refused(
    cond: dict[str, Tensor], null: dict[str, Tensor] | None, scale: float
) -> None:
    with pytest.raises(ConfigError, match="cfg_scale"):
        noise_predictor(Network(), SCHEDULE.network_time, cond, null, scale)
