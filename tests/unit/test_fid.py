from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_values import GOLDEN
from uvit_dist.errors import DataError, NumericalError
from uvit_dist.fid import FeatureMoments, frechet_distance


def golden(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    with np.load(GOLDEN / f"frechet_{name}.npz") as file:
        return file["features1"], file["features2"], float(file["fid"])


def moments_of(features: np.ndarray | Tensor, *cuts: int) -> FeatureMoments:
    """Moments of features (N, D), taken in batches that end at the cuts."""
    moments = FeatureMoments(features.shape[1])
    for batch in torch.tensor_split(torch.as_tensor(features), list(cuts)):
        moments.update(batch)
    return moments


def features(n: int, dim: int, seed: int = 0, mean: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return mean + torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix


def distance(a: FeatureMoments, b: FeatureMoments) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def distance_by_eigenvalues(f1: np.ndarray, f2: np.ndarray) -> float:
    """Another exact form: tr (S1 S2)^½ as the sum of the roots of the eigenvalues of S1 S2."""
    s1, s2 = np.cov(f1.T), np.cov(f2.T)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0)).sum()
    return float(((f1.mean(0) - f2.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * roots)


def test_moments_are_those_of_numpy() -> None:
    f = features(301, 12)
    moments = moments_of(f, 100, 101, 101, 250)
    assert moments.n == 301
    np.testing.assert_allclose(moments.mean, f.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(f.numpy().T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cuts", [(1,), (250,), (1, 2, 3), (100, 200, 300), tuple(range(1, 401)), (0, 401)])
def test_any_cut_gives_the_same_moments(cuts: tuple[int, ...]) -> None:
    f = features(401, 16)
    whole = moments_of(f)
    streamed, merged = moments_of(f, *cuts), FeatureMoments(16)
    parts = [moments_of(part) for part in torch.tensor_split(f, list(cuts))]
    for part in parts:
        merged.merge(part)
    tree = FeatureMoments(16)
    for part in reversed(parts):
        part.merge(tree)
        tree = part
    scale = np.abs(whole.covariance).max()
    for moments in (streamed, merged, tree):
        assert moments.n == whole.n
        np.testing.assert_allclose(moments.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, whole.covariance, rtol=0, atol=1e-12 * scale)


def test_a_large_mean_costs_no_precision() -> None:
    f = features(500, 4, mean=0.0)
    shifted = f + 1e6
    exact, moments = np.cov((shifted - 1e6).numpy().T), moments_of(shifted, 7, 300)
    np.testing.assert_allclose(moments.covariance, exact, rtol=1e-8, atol=1e-8)
    sums = (shifted.T @ shifted / 500 - torch.outer(shifted.mean(0), shifted.mean(0))) * 500 / 499
    assert np.abs(sums.numpy() - exact).max() > 1e-6  # the control: plain sums lose it


def test_float32_features_are_summed_in_float64() -> None:
    f = features(1000, 8).float()
    np.testing.assert_allclose(moments_of(f, 500).covariance, np.cov(f.double().numpy().T), rtol=1e-11, atol=1e-11)


def test_state_goes_through_a_file_and_on() -> None:
    f, buffer = features(90, 6), io.BytesIO()
    half = moments_of(f[:40])
    np.savez(buffer, **half.state_dict())
    buffer.seek(0)
    resumed = FeatureMoments(6)
    resumed.load_state_dict(dict(np.load(buffer)))
    resumed.update(f[40:])
    half.update(f[40:])
    assert resumed.n == half.n == 90
    assert np.array_equal(resumed.mean, half.mean)
    assert np.array_equal(resumed.covariance, half.covariance)


def test_a_state_is_a_copy() -> None:
    moments = moments_of(features(20, 3))
    state, mean, covariance = moments.state_dict(), moments.mean, moments.covariance
    before = mean.copy(), covariance.copy(), state["scatter"].copy()
    moments.update(features(20, 3, seed=1))
    for kept, old in zip((mean, covariance, state["scatter"]), before, strict=True):
        assert np.array_equal(kept, old)


def test_moments_that_do_not_fit_are_refused() -> None:
    moments = FeatureMoments(4)
    with pytest.raises(DataError, match=r"\(5, 3\)"):
        moments.update(torch.zeros(5, 3))
    with pytest.raises(DataError, match="one feature network"):
        moments.merge(FeatureMoments(5))
    with pytest.raises(DataError, match="another feature network"):
        moments.load_state_dict(FeatureMoments(5).state_dict())
    with pytest.raises(DataError, match="at least 1"):
        _ = moments.mean
    moments.update(torch.zeros(1, 4))
    with pytest.raises(DataError, match="at least 2"):
        _ = moments.covariance


def test_frechet_full_rank_is_the_golden_one() -> None:
    f1, f2, expected = golden("full_rank")
    actual = distance(moments_of(f1, 123), moments_of(f2, 50, 51))
    assert actual == pytest.approx(expected, rel=1e-6)
    assert actual == pytest.approx(distance_by_eigenvalues(f1, f2), rel=1e-6)
    biased = frechet_distance(f1.mean(0), np.cov(f1.T, bias=True), f2.mean(0), np.cov(f2.T, bias=True))
    assert biased != pytest.approx(expected, rel=1e-5)  # the control


def test_frechet_rank_deficient_is_exact_and_near_the_golden_one() -> None:
    f1, f2, expected = golden("rank_deficient")
    actual = distance(moments_of(f1, 30), moments_of(f2, 7))
    assert actual == pytest.approx(distance_by_eigenvalues(f1, f2), rel=1e-6)
    assert actual == pytest.approx(expected, rel=1e-3)


def test_frechet_of_gaussians_with_one_basis_is_known() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    d1, d2 = rng.uniform(0, 3, 40), rng.uniform(0, 3, 40)
    d1[:25], d2[15:] = 0, 0  # ranks 15 and 15, which never meet
    mu1, mu2 = rng.standard_normal((2, 40))
    s1, s2 = (basis * d1) @ basis.T, (basis * d2) @ basis.T
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(d1) - np.sqrt(d2)) ** 2).sum()
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(mu1, s1, mu1, s1) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(expected, rel=1e-12)
    zero = np.zeros((40, 40))
    assert frechet_distance(mu1, zero, mu2, zero) == pytest.approx(((mu1 - mu2) ** 2).sum(), rel=1e-12)


def test_frechet_of_what_is_no_moments_is_refused() -> None:
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(DataError, match="same feature network"):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))
    with pytest.raises(NumericalError, match="NaN"):
        frechet_distance(mu, sigma, mu * np.nan, sigma)
