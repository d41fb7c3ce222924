"""Scores by nearest neighbours: improved precision and recall, and a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from uvit_dist.errors import DataError, NumericalError

_BLOCK = 4096
"""Samples to a side of a block of distances: 128 MiB for the distances, whatever the number of samples."""


def precision_and_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall, Kynkäänniemi et al. 2019: shares of one side in the manifold of the other.

    Precision is the share of generated samples in the real manifold, recall that of real samples in the generated one.
    A manifold is the union of balls, one around each of its samples, out to its k-th nearest other one.
    real: (N, D), generated: (M, D), floating. Both depend on N and M.
    Raises ``DataError`` where shapes do not fit, ``NumericalError`` for values that are not finite.
    """
    _check_features(real, generated)
    radii = [_nearest(side, side, k, exclude_self=True)[0][:, -1] for side in (real, generated)]
    real_covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    generated_covered = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    for i in range(0, len(real), _BLOCK):
        for j in range(0, len(generated), _BLOCK):
            rows, columns = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            distances = _squared_distances(real[rows], generated[columns])
            real_covered[rows] |= (distances <= radii[1][columns]).any(1)
            generated_covered[columns] |= (distances <= radii[0][rows, None]).any(0)
    return generated_covered.double().mean().item(), real_covered.double().mean().item()


def knn_classify(train_features: Tensor, train_labels: Tensor, features: Tensor, k: int = 5) -> Tensor:
    """The most frequent label of the k nearest training samples; of equally frequent ones, the nearest.

    train_features: (N, D), features: (M, D), floating; train_labels: (N,) integer. Returns (M,).
    Raises ``DataError`` where shapes do not fit, ``NumericalError`` for features that are not finite.
    """
    _check_features(train_features, features)
    if train_labels.shape != train_features.shape[:1]:
        raise DataError(
            f"labels of shape {tuple(train_labels.shape)} for {len(train_features)} samples: "
            "expected one for each; take both from the same index"
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
