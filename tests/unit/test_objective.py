from __future__ import annotations

import torch

from uvit_dist.diffusion.objective import add_noise, drop_labels, noise_loss
from uvit_dist.diffusion.schedule import DiscreteSchedule


def test_add_noise_scales_each_sample_by_its_own_time() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind()
    alpha_t, sigma_t = DiscreteSchedule().alpha_sigma(torch.tensor([1, 500, 1000]))
    xt = add_noise(x0, noise, alpha_t, sigma_t)
    assert xt.dtype == x0.dtype
    for i in range(3):
        torch.testing.assert_close(xt[i], alpha_t[i].float() * x0[i] + sigma_t[i].float() * noise[i])
    # The control: another sample's time gives another x_t.
    assert not torch.allclose(xt, add_noise(x0, noise, alpha_t.flip(0), sigma_t.flip(0)))


def test_noise_loss_is_the_mean_of_each_sample() -> None:
    noise = torch.zeros(2, 3, 4, 4)
    noise_pred = torch.stack([torch.full((3, 4, 4), 2.0), torch.arange(48.0).reshape(3, 4, 4)])
    torch.testing.assert_close(noise_loss(noise_pred, noise), torch.tensor([4.0, (47 * 95) / 6]))


def test_noise_loss_is_computed_in_fp32() -> None:
    noise = torch.zeros(1, 4, 32, 32, dtype=torch.bfloat16)
    noise_pred = torch.full_like(noise, 1 + 2**-7)
    loss = noise_loss(noise_pred, noise)
    assert loss.dtype == torch.float32
    assert loss.item() == (1 + 2**-7) ** 2
    assert (noise_pred - noise).square().mean().item() != loss.item()  # the control: bf16 cannot hold it


def test_labels_are_dropped_where_the_uniform_is_below_p() -> None:
    y, uniforms = torch.tensor([7, 8, 9, 10]), torch.tensor([0.0, 0.0999, 0.1, 0.9])
    dropped = drop_labels(y, uniforms, 0.1, 1000)
    assert dropped.dtype == y.dtype
    assert dropped.tolist() == [1000, 1000, 9, 10]
    assert y.tolist() == [7, 8, 9, 10]
    assert torch.equal(drop_labels(y, uniforms, 0.0, 1000), y)
    assert drop_labels(y, uniforms, 1.0, 1000).tolist() == [1000] * 4


def test_contexts_are_dropped_whole() -> None:
    context, null = torch.ones(3, 7, 5), torch.full((7, 5), -1.0)
    dropped = drop_labels(context, torch.tensor([0.5, 0.05, 0.5]), 0.1, null)
    assert torch.equal(dropped[1], null)
    assert torch.equal(dropped[[0, 2]], context[[0, 2]])
