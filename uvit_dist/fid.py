"""Statistics of image features, in float64: streaming moments, Fréchet distance (FID), recall, neighbours."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist.errors import DataError, NumericalError

Matrix = NDArray[np.float64]
_BLOCK = 4096
"""Samples to a side of a block of distances: 128 MiB for the distances, whatever the number of samples."""


class FeatureMoments:
    """Mean and scatter Σ (f − mean)(f − mean)ᵀ of a stream of features; they merge (Chan et al. 1979).

    Sums are kept about the mean: no precision is lost where the mean is large against the spread.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Take in features (B, D), floating, from any device; B may be 0.

        Raises ``DataError`` for features of another shape.
        """
        dim = len(self._mean)
        if features.dim() != 2 or features.shape[1] != dim:
            raise DataError(f"features of shape {tuple(features.shape)}: expected (B, {dim}); extract them again")
        if len(features) == 0:
            return
        features = features.detach().to(self._mean)
        mean = features.mean(0)
        centred = features - mean
        self._combine(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """Take in what another one has seen; `other` is left as it is.

        Raises ``DataError`` for moments of another dimension.
        """
        if len(other._mean) != len(self._mean):
            raise DataError(
                f"moments of {len(other._mean)} features merged into {len(self._mean)}: "
                "all parts must come from one feature network; recompute the odd one"
            )
        self._combine(other.n, other._mean.to(self._mean), other._scatter.to(self._scatter))

    def _combine(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan et al. eq. 2.1: add a part of n samples with its mean (D,) and scatter (D, D), float64."""
        if n == 0:
            return
        total = self.n + n
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.n = total

    @property
    def mean(self) -> Matrix:
        """The mean of the features, (D,) float64."""
        self._require(1)
        return self._mean.cpu().numpy().copy()

    @property
    def covariance(self) -> Matrix:
        """The unbiased covariance, scatter / (n − 1), (D, D) float64."""
        self._require(2)
        return self._scatter.cpu().numpy() / (self.n - 1)

    def _require(self, samples: int) -> None:
        if self.n < samples:
            raise DataError(f"moments of {self.n} samples: at least {samples} needed; give more samples")

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """n (), mean (D,), scatter (D, D) as numpy arrays of their own, for an .npz file."""
        return {
            "n": np.array(self.n, dtype=np.int64),
            "mean": self._mean.cpu().numpy().copy(),
            "scatter": self._scatter.cpu().numpy().copy(),
        }

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Become the moments that state_dict() gave, on this one's device.

        Raises ``DataError`` where their shape is another.
        """
        mean, scatter = state["mean"], state["scatter"]
        dim = len(self._mean)
        if mean.shape != (dim,) or scatter.shape != (dim, dim):
            raise DataError(
                f"moments of shape {mean.shape} and {scatter.shape}: expected ({dim},) and ({dim}, {dim}); "
                "they come from another feature network, recompute them"
            )
        self.n = int(state["n"])
        self._mean = torch.tensor(mean, dtype=torch.float64, device=self._mean.device)
        self._scatter = torch.tensor(scatter, dtype=torch.float64, device=self._scatter.device)


def frechet_distance(mu1: Matrix, sigma1: Matrix, mu2: Matrix, sigma2: Matrix) -> float:
    """|mu1 − mu2|² + tr(sigma1 + sigma2 − 2 (sigma1 sigma2)^½), Dowson and Landau 1982.

    mu: (D,); sigma: (D, D), symmetric; float64. With sigma1 = A Aᵀ and sigma2 = B Bᵀ, tr (sigma1 sigma2)^½
    is the sum of the singular values of Aᵀ B: nothing is inverted and no root is taken of a rounding error,
    so that a singular covariance needs no offset on its diagonal.
    Raises ``DataError`` where shapes differ, ``NumericalError`` for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise DataError(
            f"means and covariances of shapes {shapes}: expected (D,), (D, D) twice with one D; "
            "both sides must come from the same feature network"
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise NumericalError("feature moments are not finite: no distance; look for NaN among the images")
    cross = _factor(sigma1).T @ _factor(sigma2)
    trace_root = scipy.linalg.svdvals(cross).sum() if cross.size else 0.0
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return max(float(distance), 0.0)


def _factor(sigma: Matrix) -> Matrix:
    """A (D, rank) with A Aᵀ = sigma (D, D), semi-definite; eigenvalues that are rounding are left out."""
    values, vectors = scipy.linalg.eigh(sigma)
    keep = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])


def nearest_neighbour_recall(real: Tensor, generated: Tensor, k: int = 5) -> float:
    """Improved recall, Kynkäänniemi et al. 2019: the share of real samples in the generated manifold.

    That manifold is the union of balls, one around each generated sample, out to its k-th nearest other
    generated sample. real: (N, D), generated: (M, D), floating. Exchanged, it is improved precision.
    """
    _check_features(real, generated)
    radii = _nearest(generated, generated, k, exclude_self=True)[0][:, -1]
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i in range(0, len(real), _BLOCK):
        for j in range(0, len(generated), _BLOCK):
            distances = _squared_distances(real[i : i + _BLOCK], generated[j : j + _BLOCK])
            covered[i : i + _BLOCK] |= (distances <= radii[j : j + _BLOCK]).any(1)
    return covered.double().mean().item()


def knn_classify(train_features: Tensor, train_labels: Tensor, features: Tensor, k: int = 5) -> Tensor:
    """The most frequent label of the k nearest training samples; of equally frequent ones, the nearest.

    train_features: (N, D), features: (M, D), floating; train_labels: (N,) integer. Returns (M,).
    Raises ``DataError`` where shapes do not fit.
    """
    _check_features(train_features, features)
    if train_labels.shape != train_features.shape[:1]:
        raise DataError(
            f"labels of shape {tuple(train_labels.shape)} for {len(train_features)} samples: "
            "expected one for each; read both from the same index"
        )
    neighbours = train_labels[_nearest(features, train_features, k)[1]]
    votes = (neighbours[:, :, None] == neighbours[:, None, :]).sum(2)
    winner = votes.argmax(1, keepdim=True)  # the first of the largest: the nearest
    return neighbours.gather(1, winner).squeeze(1)


def _nearest(queries: Tensor, points: Tensor, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """Squared distances and indices (Q, k) of the k nearest points (P, D) to each query (Q, D), in order.

    exclude_self: queries and points are the same set, and none is its own neighbour.
    """
    available = len(points) - exclude_self
    if not 1 <= k <= available:
        raise DataError(f"k={k}: must be in 1…{available}, the neighbours there are; give more samples or a smaller k")
    distances, indices = [], []
    for i in range(0, len(queries), _BLOCK):
        block = queries[i : i + _BLOCK]
        best = torch.full((len(block), 0), torch.inf, dtype=torch.float64, device=block.device)
        best_index = torch.zeros((len(block), 0), dtype=torch.int64, device=block.device)
        for j in range(0, len(points), _BLOCK):
            distance = _squared_distances(block, points[j : j + _BLOCK])
            if exclude_self and i == j:
                distance.fill_diagonal_(torch.inf)
            near, near_index = distance.topk(min(k, distance.shape[1]), largest=False)
            best, order = torch.cat([best, near], 1).sort(dim=1, stable=True)
            best_index = torch.cat([best_index, near_index + j], 1).gather(1, order)[:, :k]
            best = best[:, :k]
        distances.append(best)
        indices.append(best_index)
    return torch.cat(distances), torch.cat(indices)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i − b_j|² in float64. a: (N, D), b: (M, D); (N, M)."""
    centre = b[:1].double()
    a, b = a.double() - centre, b.double() - centre
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squares.clamp_min_(0)


def _check_features(first: Tensor, second: Tensor) -> None:
    """Both (N, D) with one D, not empty and finite."""
    for features in (first, second):
        if features.dim() != 2 or features.shape[1] != first.shape[-1] or len(features) == 0:
            raise DataError(
                f"features of shapes {tuple(first.shape)} and {tuple(second.shape)}: "
                "expected (N, D) and (M, D), neither empty; extract both with the same network"
            )
        if not torch.isfinite(features).all():
            raise NumericalError("features are not finite: no neighbours; look for NaN among the images")
