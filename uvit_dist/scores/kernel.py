"""Kernel distance (KID): the squared maximum mean discrepancy under a polynomial kernel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uvit_dist.errors import DataError

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
"""As the public implementations have them; a set that is smaller is one subset."""


def kernel_distance(
    real: NDArray[np.floating],
    generated: NDArray[np.floating],
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased MMD² under (x·y / D + 1)³, Bińkowski et al. 2018.

    real: (N, D), generated: (M, D), floating, may be memory-mapped: the samples of one subset are read at a time.
    Subsets are drawn without repetition, those of the generated samples first, as torch-fidelity draws them. May be
    slightly negative. Raises ``DataError`` where shapes do not fit.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise DataError(
            f"features of shapes {real.shape} and {generated.shape}: expected (N, D) and (M, D); extract both with the "
            "same network"
        )
    size = min(subset_size, len(real), len(generated))
    if size < 2:
        raise DataError(f"{len(real)} real and {len(generated)} generated samples: at least 2 needed; give more")
    draw = np.random.RandomState(seed)  # its stream is guaranteed never to change
    found = []
    for _ in range(subsets):
        sides = [side[np.sort(draw.choice(len(side), size, replace=False))] for side in (generated, real)]
        found.append(_mmd(*(torch.from_numpy(side.astype(np.float64)).to(device) for side in sides)))
    return float(np.mean(found)), float(np.std(found))


def _mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD² of two sets of equal size, (m, D) float64 each."""
    m = len(x)
    own = sum((kernel.sum() - kernel.diagonal().sum() for kernel in (_kernel(x, x), _kernel(y, y))), torch.zeros(()))
    return float(own / (m * (m - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / D + 1)³ for all pairs of x (m, D) and y (n, D); (m, n)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
