"""A batch becomes a loss: what is drawn for a sample is a function of its identity, in every system."""

import pytest
import torch

from tests.tiny import DEMO, ROOT
from uvit_dist.config_yaml import load_config
from uvit_dist.data.batch import Batch
from uvit_dist.diffusion.schedule import DiscreteSchedule, VPSDESchedule
from uvit_dist.loss import LossByTime, Objective, Trace


def config_of(name, *overrides):
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def latents(count, epoch=0, contexts=None):
    moments = torch.randn(count, 8, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    return Batch(0, epoch, torch.arange(count), torch.arange(count) % 10, moments, contexts)


def pixels(count, epoch=0):
    data = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(0, epoch, torch.arange(count), torch.full((count,), -1), data)


def test_discrete_time_is_uniform_on_1_to_1000_and_the_network_sees_n():
    objective = Objective(load_config(DEMO))
    time = objective.example(latents(20_000)).time
    assert (time.min(), time.max()) == (1, 1000)
    assert abs(time.double().mean() - 500.5) < 8  # four standard errors
    assert torch.equal(objective.schedule.training_timesteps(time), time)


def test_continuous_time_is_uniform_without_cut_off_and_the_network_sees_999_t():
    objective = Objective(config_of("uvit_s_cifar10"))
    time = objective.example(pixels(20_000)).time
    assert time.dtype == torch.float32
    assert 0 <= time.min() < 1e-3
    assert 0.999 < time.max() < 1
    assert abs(time.double().mean() - 0.5) < 0.009
    assert torch.equal(objective.schedule.training_timesteps(time), time * 999)


def test_the_loss_is_that_of_the_noise_at_that_time():
    """The noise predictor that knows the answer has no loss; one that says nothing has about 1."""
    objective = Objective(config_of("uvit_s_cifar10"))
    example = objective.example(pixels(64))
    alpha, sigma = (v[:, None, None, None] for v in VPSDESchedule().alpha_sigma(example.time))
    seen = []

    def perfect(xt, timesteps, y, context):
        seen.append((timesteps, y, context))
        return (xt - alpha * example.x0) / sigma

    far = example.time > 0.05
    assert objective.losses(perfect, example)[far].max() < 1e-8
    assert torch.equal(seen[0][0], example.time * 999)
    assert seen[0][1:] == (None, None)
    assert abs(objective.losses(lambda xt, *_, **__: torch.zeros_like(xt), example).mean() - 1) < 0.05


def test_pixels_are_mirrored_for_half_of_the_readings_and_always_alike():
    objective, batch = Objective(config_of("uvit_s_cifar10")), pixels(400)
    plain = batch.data.float() / 127.5 - 1
    x0 = objective.example(batch).x0
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(x0, plain, strict=True)])
    assert all(torch.equal(x0[i], plain[i]) for i in range(400) if not mirrored[i])
    assert 150 < mirrored.sum() < 250
    assert torch.equal(objective.example(batch).x0, x0)
    assert not torch.equal(objective.example(pixels(400, epoch=1)).x0, x0)
    assert torch.equal(objective.example(batch, held_out=True).x0, plain)
    never = Objective(config_of("uvit_s_cifar10", "data.mirror=false"))
    assert torch.equal(never.example(batch).x0, plain)


def test_what_a_sample_gets_does_not_depend_on_its_batch():
    objective, batch = Objective(load_config(DEMO)), latents(12)
    whole, half = objective.example(batch), objective.example(batch.to(torch.device("cpu"), slice(6, 12)))
    for name in ("x0", "noise", "time", "labels"):
        assert torch.equal(getattr(whole, name)[6:], getattr(half, name)), name


def test_labels_are_dropped_at_the_published_rate():
    for name, share, null in (("uvit_h_imagenet256", 0.1, 1000), ("uvit_l_imagenet256", 0.15, 1000)):
        labels = Objective(config_of(name)).example(latents(20_000)).labels
        dropped = (labels == null).double().mean().item()
        assert abs(dropped - share) < 0.01, "four standard errors"
    kept = Objective(config_of("uvit_l_imagenet64")).example(pixels(100)).labels
    assert torch.equal(kept, pixels(100).labels), "ImageNet 64 has no null label"
    unconditional = Objective(config_of("uvit_s_cifar10")).example(pixels(4))
    assert unconditional.labels is None


def test_contexts_become_the_empty_one_at_the_published_rate():
    contexts, empty = torch.ones(10_000, 2, 3, dtype=torch.float16), torch.full((2, 3), 7.0)
    objective = Objective(config_of("uvit_s_mscoco"), empty)
    example = objective.example(latents(10_000, contexts=contexts))
    assert example.labels is None
    dropped = (example.contexts == 7).flatten(1).all(1)
    assert abs(dropped.double().mean() - 0.1) < 0.012
    assert torch.equal(example.contexts[~dropped], contexts.float()[~dropped])
    assert (objective.example(latents(100, contexts=contexts[:100]), held_out=True).contexts == 1).all()


def test_latents_are_scaled_by_the_published_factors():
    for name, factor in (("uvit_h_imagenet256", 0.18215), ("uvit_s_mscoco", 0.23010)):
        moments = torch.zeros(200, 8, 4, 4)
        moments[:, :4] = 3.0
        contexts = torch.zeros(200, 2, 3) if name == "uvit_s_mscoco" else None
        batch = Batch(0, 0, torch.arange(200), torch.zeros(200, dtype=torch.int64), moments, contexts)
        x0 = Objective(config_of(name), torch.zeros(2, 3)).example(batch).x0
        assert x0.mean().item() == pytest.approx(3 * factor, abs=0.01)
        assert x0.std().item() == pytest.approx(factor, rel=0.03)


def test_held_out_draws_never_change_and_are_not_those_of_training():
    objective = Objective(load_config(DEMO))
    first, later = (objective.example(latents(50, epoch), held_out=True) for epoch in (0, 9))
    for name in ("x0", "noise", "time", "labels"):
        assert torch.equal(getattr(first, name), getattr(later, name)), name
    assert torch.equal(first.labels, latents(50).labels), "no label is dropped"
    training = objective.example(latents(50))
    assert not torch.equal(training.time, first.time)
    assert not torch.equal(training.noise, first.noise)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), VPSDESchedule()])
def test_losses_fall_into_the_bin_of_their_time(schedule):
    words = torch.tensor([0, 2**31, 2**32 - 1, 2**30])
    elapsed = schedule.elapsed(schedule.training_time(words))
    assert elapsed.tolist() == pytest.approx([0, 0.5, 0.9995, 0.25], abs=1e-3)
    bins = LossByTime(4, torch.device("cpu"))
    bins.add(torch.tensor([1.0, 2.0, 3.0, 5.0]), elapsed)
    bins.add(torch.tensor([7.0]), elapsed[:1])
    assert bins.take(lambda sums: sums) == [4.0, 5.0, 2.0, 3.0]
    assert bins.take(lambda sums: sums) == [None] * 4, "each record is of the steps since the last one"


def test_the_trace_tells_two_samples_apart_in_every_column():
    objective = Objective(load_config(DEMO))
    trace, batch = Trace(), latents(30)
    trace.add(batch.ids, objective.example(batch))
    assert [row[0] for row in trace.rows] == list(range(30))
    assert len({row[3] for row in trace.rows}) == len({row[4] for row in trace.rows}) == 30
