"""Statistics of image features, in float64: moments of a stream, which merge, and the Fréchet distance (FID)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist.errors import DataError, NumericalError

Matrix = NDArray[np.float64]
_ROWS = 1024
"""Features widened to float64 at a time: 16 MiB of Inception's."""


class FeatureMoments:
    """Mean and scatter Σ (f − mean)(f − mean)ᵀ of a stream of features; they merge (Chan et al. 1979).

    Sums are kept about the mean: no precision is lost where the mean is large against the spread. Memory is that of one
    matrix (D, D) and a block of features, however many there are. The scatter is symmetric, and its upper triangle is
    what counts.
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
        for block in features.detach().split(_ROWS):
            block = block.to(self._mean)
            mean = block.mean(0)
            centred = block - mean
            self._shift(len(block), mean)
            self._scatter.addmm_(centred.T, centred)

    def merge(self, other: FeatureMoments) -> None:
        """Take in what another one has seen; `other` is left as it is.

        Raises ``DataError`` for moments of another dimension.
        """
        if len(other._mean) != len(self._mean):
            raise DataError(
                f"moments of {len(other._mean)} features merged into {len(self._mean)}: "
                "all parts must come from one feature network; recompute the odd one"
            )
        if other.n:
            self._shift(other.n, other._mean.to(self._mean))
            self._scatter.add_(other._scatter.to(self._scatter))

    def _shift(self, n: int, mean: Tensor) -> None:
        """Chan et al. eq. 2.1 but for the scatter of the part, which the caller adds: n samples, their mean (D,)."""
        total = self.n + n
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        if self.n:
            self._scatter.addr_(delta, delta, alpha=self.n * n / total)
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
        upper = np.triu(self._scatter.cpu().numpy())
        upper += np.triu(upper, 1).T
        upper /= self.n - 1
        return upper

    def _require(self, samples: int) -> None:
        if self.n < samples:
            raise DataError(f"moments of {self.n} samples: at least {samples} needed; give more samples")

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """n (), mean (D,), scatter (D (D + 1) / 2,), its upper triangle by rows, as arrays of their own for an .npz."""
        return {
            "n": np.array(self.n, dtype=np.int64),
            "mean": self._mean.cpu().numpy().copy(),
            "scatter": self._scatter.cpu().numpy()[_upper(len(self._mean))],
        }

    def load_state_dict(self, state: Mapping[str, NDArray[np.generic]]) -> None:
        """Become the moments that state_dict() gave, on this one's device.

        Raises ``DataError`` where their shape is another.
        """
        mean, scatter = state["mean"], state["scatter"]
        dim = len(self._mean)
        if mean.shape != (dim,) or scatter.shape != (dim * (dim + 1) // 2,):
            raise DataError(
                f"moments of shape {mean.shape} and {scatter.shape}: expected ({dim},) and the upper triangle"
                f" ({dim * (dim + 1) // 2},); they come from another feature network, recompute them"
            )
        self.n = int(state["n"])
        self._mean = torch.tensor(mean, dtype=torch.float64, device=self._mean.device)
        full = np.zeros((dim, dim))
        full[_upper(dim)] = scatter
        self._scatter = torch.from_numpy(full).to(self._scatter.device)


def _upper(dim: int) -> NDArray[np.bool_]:
    """Where the upper triangle of a matrix (dim, dim) is."""
    return np.tri(dim, dtype=bool).T


def frechet_distance(mu1: Matrix, sigma1: Matrix, mu2: Matrix, sigma2: Matrix) -> float:
    """|mu1 − mu2|² + tr(sigma1 + sigma2 − 2 (sigma1 sigma2)^½), Dowson and Landau 1982.

    mu: (D,); sigma: (D, D), symmetric; float64. With sigma1 = A Aᵀ, tr (sigma1 sigma2)^½ is the sum of the roots of the
    eigenvalues of Aᵀ sigma2 A. Nothing is inverted, and a singular covariance needs no offset on its diagonal: its
    factor has fewer columns, and no root is taken of a rounding error.
    Raises ``DataError`` where shapes differ, ``NumericalError`` for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    shapes = [a.shape for a in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise DataError(
            f"means and covariances of shapes {shapes}: expected (D,), (D, D) twice with one D; "
            "extract both with the same feature network"
        )
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise NumericalError("feature moments are not finite: no distance; look for NaN among the images")
    means = ((mu1 - mu2) ** 2).sum()
    return max(float(means + np.trace(sigma1) + np.trace(sigma2) - 2 * _trace_root(sigma1, sigma2)), 0.0)


def _trace_root(sigma1: Matrix, sigma2: Matrix) -> float:
    """tr (sigma1 sigma2)^½ of two covariances (D, D)."""
    factor1, factor2 = _cholesky(sigma1), _cholesky(sigma2)
    if factor1 is not None and factor2 is not None:  # LAPACK's sygst: Lᵀ sigma2 L, by half the products
        product, _ = scipy.linalg.lapack.dsygst(sigma2, factor1, itype=2, lower=1)
        values = scipy.linalg.eigvalsh(product, driver="evd", overwrite_a=True, check_finite=False)
        return float(np.sqrt(values.clip(0)).sum())
    # Singular values of Aᵀ B instead, whose errors are not magnified by a root.
    cross = (_low_rank(sigma1) if factor1 is None else factor1).T @ (_low_rank(sigma2) if factor2 is None else factor2)
    return float(scipy.linalg.svdvals(cross, overwrite_a=True, check_finite=False).sum()) if cross.size else 0.0


def _cholesky(sigma: Matrix) -> Matrix | None:
    """L (D, D), lower, with L Lᵀ = sigma; none where sigma is singular, but for rounding."""
    try:
        factor = scipy.linalg.cholesky(sigma, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    pivots = np.diag(factor) ** 2
    return factor if pivots.min() > pivots.max() * len(pivots) * np.finfo(np.float64).eps else None


def _low_rank(sigma: Matrix) -> Matrix:
    """A (D, rank) with A Aᵀ = sigma (D, D), semi-definite; eigenvalues that are rounding are left out."""
    values, vectors = scipy.linalg.eigh(sigma, check_finite=False)
    keep = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return vectors[:, keep] * np.sqrt(values[keep])
