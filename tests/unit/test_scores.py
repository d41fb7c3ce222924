"""Scores of features against their definitions and against the public implementations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from uvit_dist.errors import DataError, NumericalError
from uvit_dist.fid import FeatureMoments, frechet_distance
from uvit_dist.scores import neighbours
from uvit_dist.scores.inception_score import inception_score
from uvit_dist.scores.kernel import kernel_distance
from uvit_dist.scores.neighbours import knn_classify, precision_and_recall

LARGE = pytest.param((5000, 2048), marks=pytest.mark.slow, id="5000x2048")


def features(n: int, dim: int, seed: int = 0, mean: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return mean + torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix


def like_inceptions(n: int, dim: int, seed: int) -> Tensor:
    """Real-like features: not negative, of differing spread, some related; those of other seeds a little apart."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.05, 0.6, dim, dtype=torch.float64)
    base = torch.randn(n, dim, generator=draw, dtype=torch.float64) + torch.randn(n, 1, generator=draw).double() * 0.5
    return (0.3 + 0.02 * seed + base * spread).clamp_min(0)


@pytest.fixture(scope="module", params=[(500, 192), LARGE])
def two_sets(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return like_inceptions(*request.param, seed=1), like_inceptions(*request.param, seed=2)


@pytest.mark.slow
def test_frechet_distance_is_the_public_ones(two_sets: tuple[Tensor, Tensor]) -> None:
    sides = []
    for side in two_sets:
        moments = FeatureMoments(side.shape[1])
        for part in side.split(250):
            moments.update(part.float())
        sides.append((moments.mean, moments.covariance))
    ours = frechet_distance(*sides[0], *sides[1])
    stats = [fid_features_to_statistics(side.float().double()) for side in two_sets]
    assert ours == pytest.approx(fid_statistics_to_metric(*stats, False)["frechet_inception_distance"], rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # sqrtm's argument disp
        mean_and_covariance = [value for side in stats for value in (side["mu"], side["sigma"])]
        assert ours == pytest.approx(calculate_frechet_distance(*mean_and_covariance), rel=1e-4)


def test_kernel_distance_is_torch_fidelitys(two_sets: tuple[Tensor, Tensor]) -> None:
    real, generated = two_sets
    size = min(1000, len(real) // 2)
    options = {"kid_subsets": 6, "kid_subset_size": size, "rng_seed": 2020, "verbose": False, "kid_kernel": "poly"}
    options |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    theirs = kid_features_to_metric(generated, real, **options)
    mean, deviation = kernel_distance(real.numpy(), generated.numpy(), subsets=6, subset_size=size)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    same, _ = kernel_distance(real[::2].numpy(), real[1::2].numpy(), subsets=6, subset_size=size)
    assert abs(same) < mean / 2


def test_precision_and_recall_are_torch_fidelitys(two_sets: tuple[Tensor, Tensor]) -> None:
    real, generated = two_sets[0], two_sets[1][: len(two_sets[1]) // 5 * 4]
    generated = generated * torch.linspace(0.5, 1.2, generated.shape[1], dtype=torch.float64)
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(generated, real, **options)
    precision, recall = precision_and_recall(real, generated, k=3)
    assert precision == pytest.approx(theirs["precision"], abs=1e-4)
    assert recall == pytest.approx(theirs["recall"], abs=1e-4)
    assert 0 < precision < 1
    assert precision != recall  # the control: they are two things


def test_inception_score_is_torch_fidelitys() -> None:
    logits = 3 * torch.randn(5000, 1008, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    mean, deviation = inception_score(logits.numpy(), part=500)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-4)


def test_inception_score_of_known_cases() -> None:
    sure = np.where(np.eye(10, dtype=bool)[np.arange(200) % 10], 0.0, -2000.0)
    assert inception_score(sure)[0] == pytest.approx(10)  # each image of one class, all classes used evenly
    assert inception_score(sure[:, :1].repeat(10, 1))[0] == pytest.approx(1)  # nothing is known of any
    mean, deviation = inception_score(np.concatenate([sure, sure[::10]]), part=200)  # the last part: one class alone
    assert (mean, deviation) == pytest.approx((5.5, 4.5))
    with pytest.raises(DataError, match="not empty"):
        inception_score(sure[:0])


def test_kernel_distance_of_what_does_not_fit_is_refused() -> None:
    few = np.zeros((5, 3))
    assert kernel_distance(few, few, subsets=2) == (0.0, 0.0)
    with pytest.raises(DataError, match="at least 2"):
        kernel_distance(few[:1], few)
    with pytest.raises(DataError, match="same network"):
        kernel_distance(few, np.zeros((5, 4)))


def recall_by_definition(real: Tensor, generated: Tensor, k: int) -> float:
    inside = 0
    for r in real:
        for i, g in enumerate(generated):
            others = (generated[torch.arange(len(generated)) != i] - g).norm(dim=1)
            if (r - g).norm() <= others.sort()[0][k - 1]:
                inside += 1
                break
    return inside / len(real)


@pytest.mark.parametrize("block", [4096, 10])
def test_precision_and_recall_follow_their_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    real, generated = features(35, 4), features(43, 4, seed=1)
    generated[:, 0] *= 0.3
    for k in (1, 3, 12):
        precision, recall = precision_and_recall(real, generated, k)
        assert recall == recall_by_definition(real, generated, k)
        assert precision == recall_by_definition(generated, real, k)
        assert recall != precision  # the control


def test_recall_sees_a_missing_mode() -> None:
    modes = torch.cat([features(100, 3, mean=0), features(100, 3, seed=2, mean=1000)])
    assert precision_and_recall(modes, modes) == (1, 1)
    assert precision_and_recall(modes, modes[:100]) == (1, 0.5)
    collapsed = modes[:1].expand(50, 3)
    assert precision_and_recall(modes, collapsed)[1] <= 1 / 200


@pytest.mark.parametrize("block", [4096, 7])
def test_knn_follows_its_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    train, queries = features(60, 3), features(25, 3, seed=1).float()
    labels = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(3))
    for k in (1, 2, 5, 11):
        predicted = knn_classify(train, labels, queries, k)
        for query, label in zip(queries.double(), predicted.tolist(), strict=True):
            near = labels[(train - query).norm(dim=1).argsort()[:k]].tolist()
            most = max(near.count(candidate) for candidate in near)
            assert label == next(candidate for candidate in near if near.count(candidate) == most)


def test_knn_ties_go_to_the_nearest() -> None:
    train = torch.tensor([[1.0], [2.0], [3.0], [4.0], [50.0]])
    labels = torch.tensor([9, 2, 2, 9, 1])
    query = torch.zeros(1, 1)
    assert knn_classify(train, labels, query, 5).tolist() == [9]
    assert knn_classify(train, labels, query, 3).tolist() == [2]
    assert knn_classify(train, labels, query, 1).tolist() == [9]


def test_neighbours_that_cannot_be_had_are_refused() -> None:
    f = features(5, 3)
    with pytest.raises(DataError, match="k=5"):
        precision_and_recall(f, f, k=5)
    with pytest.raises(DataError, match="k=6"):
        knn_classify(f, torch.zeros(5), f, k=6)
    with pytest.raises(DataError, match="labels"):
        knn_classify(f, torch.zeros(4), f)
    with pytest.raises(DataError, match="same network"):
        precision_and_recall(f, features(5, 4))
    with pytest.raises(NumericalError, match="NaN"):
        precision_and_recall(f * torch.nan, f, k=1)
