"""Randomness from identity: Philox itself, independence of the cut of the batch, and the statistics."""

import math

import pytest
import torch
from scipy import stats

from uvit_dist.diffusion.keyed_random import keyed_bits, keyed_integers, keyed_normal, keyed_uniform, philox

# Known answers of Philox4x32-10, from the generator's authors (Random123, kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_a_sample_gets_the_same_numbers_in_any_batch():
    ids = torch.tensor([3, 70_000_000_000, 0, 12])
    whole = keyed_normal(1, "noise", 2, ids, (4, 3, 5))
    assert torch.equal(whole.flip(0), keyed_normal(1, "noise", 2, ids.flip(0), (4, 3, 5)))
    assert torch.equal(whole[1:2], keyed_normal(1, "noise", 2, ids[1:2], (4, 3, 5)))


@pytest.mark.parametrize("other", [dict(seed=2), dict(purpose="latent"), dict(epoch=1), dict(ids=torch.tensor([8]))])
def test_every_part_of_the_identity_matters(other):
    base = dict(seed=1, purpose="noise", epoch=0, ids=torch.tensor([7]))
    one = keyed_bits(**base, count=64)
    assert (one == keyed_bits(**{**base, **other}, count=64)).sum() == 0


def test_ids_beyond_32_bits_do_not_collide():
    bits = keyed_bits(1, "noise", 0, torch.tensor([5, 5 + 2**32]), 8)
    assert not torch.equal(bits[0], bits[1])


def test_normals_are_standard_normal_and_independent():
    x = keyed_normal(7, "noise", 0, torch.arange(1000), (1000,)).double()
    assert abs(x.mean()) < 4 / math.sqrt(x.numel())
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / x.numel())
    assert stats.kstest(x.flatten()[::7].numpy(), "norm").pvalue > 1e-3
    neighbours = (x[:, 1:] * x[:, :-1]).mean()
    across = (x[1:] * x[:-1]).mean()
    assert max(abs(neighbours), abs(across)) < 4 / math.sqrt(x.numel())
    assert x.abs().max() > 4.5


def test_uniforms_and_integers_cover_their_range_evenly():
    u = keyed_uniform(7, "dropout", 0, torch.arange(200_000))[:, 0]
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    n = keyed_integers(7, "timesteps", 0, torch.arange(200_000), 1, 1001)
    assert (n.min(), n.max()) == (1, 1000)
    assert stats.chisquare(torch.bincount(n, minlength=1001)[1:].numpy()).pvalue > 1e-3
