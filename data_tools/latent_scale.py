"""Measure autoencoder.scale_factor: 1/std of the latents drawn from an index of moments.

    python -m data_tools.latent_scale --index data/imagenet256/index.json

One latent is drawn for each sample; the std is that of all their elements about their mean ("High-Resolution Image
Synthesis with Latent Diffusion Models", G). Published: 0.18215 for ImageNet-like data, 0.23010 for COCO.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from uvit_dist.data.latents import sample_latents
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import ShardIndex, read_index
from uvit_dist.diffusion.keyed_random import keyed_normal
from uvit_dist.errors import ConfigError, DataError, explained_exit
from uvit_dist.fid import FeatureMoments

BATCH = 256
PURPOSE = "latent scale"


def measure(index: ShardIndex, samples: int | None, seed: int) -> dict[str, Any]:
    """std, scale_factor (its inverse), mean and number of samples, all in float64. samples: a seeded choice; none: all.

    Raises ``ConfigError``, ``DataError`` where the index holds no moments, or is damaged.
    """
    made, total = index.provenance, index.provenance.samples
    if made.kind != "moments":
        raise DataError(
            f"--index {index.path}: holds {made.kind}; only latents have a scale factor: give one of moments"
        )
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more; give another")
    if samples is not None and not 0 < samples <= total:
        raise ConfigError(f"--samples {samples}: {index.path} holds {total}; give 1…{total}, or leave it out for all")
    chosen = np.argsort(np.random.Philox(key=seed).random_raw(total), kind="stable")[:samples]
    chosen.sort()
    moments, reader = FeatureMoments(1), SampleReader(index, seed)
    shape = (made.shape[0] // 2, *made.shape[1:])
    with tqdm(total=len(chosen), unit="sample", disable=None) as progress:
        for begin in range(0, len(chosen), BATCH):
            ids = chosen[begin : begin + BATCH]
            noise = keyed_normal(seed, PURPOSE, 0, torch.from_numpy(ids), shape)
            moments.update(sample_latents(reader.read_ids(ids).data, noise, 1.0).reshape(-1, 1).double())
            progress.update(len(ids))
    std = float(np.sqrt(moments.covariance[0, 0]))
    if not 0.0 < std < np.inf:
        raise DataError(f"--index {index.path}: the std of its latents is {std}; make the shards again")
    return {"std": std, "scale_factor": 1.0 / std, "mean": float(moments.mean[0]), "samples": len(chosen)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.latent_scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--index", required=True, help="path or URL of the index")
    parser.add_argument("--samples", type=int, help="number of samples, chosen at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and of the noise (default: 0)")
    args = parser.parse_args()
    with explained_exit():
        print(json.dumps(measure(read_index(args.index, "--index"), args.samples, args.seed)))


if __name__ == "__main__":
    main()
