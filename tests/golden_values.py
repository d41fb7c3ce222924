"""Weights and inputs of the golden files, drawn by name as tests/golden/README.md says."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def fill(key: str, shape: tuple[int, ...], salt: str = "") -> torch.Tensor:
    draw = np.random.RandomState(zlib.crc32((salt + key).encode())).standard_normal(int(np.prod(shape)))
    value = (0.05 * draw).astype(np.float32).reshape(shape)
    parts = key.split(".")
    if len(shape) == 1 and parts[-1] == "weight" and "norm" in parts[-2]:
        value = 1 + value
    return torch.from_numpy(value)


def golden_state_dict(shapes: dict[str, tuple[int, ...]], salt: str = "") -> dict[str, torch.Tensor]:
    return {key: fill(key, tuple(shape), salt) for key, shape in shapes.items()}
