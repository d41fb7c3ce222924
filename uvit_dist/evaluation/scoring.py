"""From the features of all images to scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from uvit_dist.config import Config
from uvit_dist.fid import frechet_distance, knn_classify, nearest_neighbour_recall
from uvit_dist.spool import Spool

FEATURES_KEPT = 10_000
"""Scores that need the features themselves use the images of lower id."""
FEATURES, LABELS = "features", "labels"
"""Arrays of the spool."""


def score(spool: Spool, reference: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Compare the images with the reference.

    Raises ``DataError`` where features are of another shape, ``NumericalError`` where they are not finite.
    """
    moments = spool.moments(FEATURES)
    scores: dict[str, Any] = {
        "feature_space": config.evaluate.features,
        "fid" if config.evaluate.features == "inception" else "frechet_distance": frechet_distance(
            moments.mean, moments.covariance, reference["mu"], reference["sigma"]
        ),
    }
    halves = ("frechet_distance", "recall", "class_accuracy")
    scores |= {f"{n}_real_halves": float(reference[f"{n}_halves"]) for n in halves if f"{n}_halves" in reference}
    if "features" in reference:  # the official files hold mu and sigma alone
        fake = torch.tensor(spool.features(FEATURES, FEATURES_KEPT))
        real, k = torch.from_numpy(reference["features"]), config.evaluate.neighbours
        scores["recall"] = nearest_neighbour_recall(real, fake, k)
        if config.model.num_classes > 0 and "labels" in reference:
            found = knn_classify(real, torch.from_numpy(reference["labels"]), fake, k)
            asked = torch.tensor(spool.features(LABELS, FEATURES_KEPT))
            scores["class_accuracy"] = (found == asked).double().mean().item()
    return scores
