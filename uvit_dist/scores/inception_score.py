"""Inception Score: how sure a classifier is of each image, and how evenly its classes are used."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from uvit_dist.errors import DataError

PART = 5000
"""Images of a part, as in ADM's evaluator: 10 parts of the usual 50,000 images."""


def inception_score(logits: NDArray[np.floating], part: int = PART) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)), Salimans et al. 2016: mean and standard deviation over parts in the order given.

    logits: (N, classes), floating, may be memory-mapped: one part is read at a time; the last may be smaller and counts
    as much. The score of few images is low: p(y) is that of a part. Raises ``DataError`` for another shape.
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise DataError(f"logits of shape {logits.shape}: expected (N, classes), not empty; extract them again")
    scores = []
    for first in range(0, len(logits), part):
        log_p = torch.from_numpy(logits[first : first + part].astype(np.float64)).log_softmax(1)
        log_mean_p = log_p.logsumexp(0) - math.log(len(log_p))
        divergence = (log_p.exp() * (log_p - log_mean_p)).sum(1).mean()
        scores.append(divergence.exp().item())
    return float(np.mean(scores)), float(np.std(scores))
