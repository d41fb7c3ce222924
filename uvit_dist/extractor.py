"""The feature extractor that the configuration's evaluate section names."""

from __future__ import annotations

import torch

from uvit_dist import storage
from uvit_dist.config import EvaluateConfig
from uvit_dist.errors import ConfigError
from uvit_dist.models.features import EXTRACTORS, Extractor
from uvit_dist.models.inception import load_inception


def load_extractor(evaluate: EvaluateConfig, device: torch.device) -> Extractor:
    """Images (B, 3, H, W) uint8 on ``device`` → features (B, D) float64, of the feature space in the configuration.

    Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    if evaluate.features != "inception":
        return EXTRACTORS[evaluate.features]
    if evaluate.inception is None:
        raise ConfigError(
            "evaluate.inception: missing; evaluate.features inception needs the path of "
            "pt_inception-2015-12-05-6726825d.pth"
        )
    path = storage.local_weights(evaluate.inception, evaluate.inception_sha256, "evaluate.inception")
    return load_inception(path).to(device).features
