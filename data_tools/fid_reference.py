"""Statistics of real images in the feature space of the scores, and how far two halves of them are apart.

python -m data_tools.fid_reference --config configs/digits_demo.yaml
"""

from __future__ import annotations

import argparse
import io
import json
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_tools.images import source_fingerprint
from data_tools.sources import open_source
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import explained_exit
from uvit_dist.fid import FeatureMoments, frechet_distance, knn_classify, nearest_neighbour_recall
from uvit_dist.models.features import EXTRACTORS

FEATURES_KEPT = 50_000
BATCH = 256


def make_reference(config: Config) -> dict[str, Any]:
    """mu, sigma, features, labels, scores of one half against the other, provenance of the images of data.source.

    The halves are those of a seeded permutation: what one scores against the other is what to expect of a perfect
    model of that size.
    """
    source = open_source(config.data)
    extract = EXTRACTORS[config.evaluate.features]
    order = np.argsort(np.random.Philox(key=config.seed).random_raw(len(source.keys)), kind="stable")
    halves, features = [], []
    for half in np.array_split(order, 2):
        moments: FeatureMoments | None = None
        for first in tqdm(range(0, len(half), BATCH), unit="batch", disable=None):
            pixels = np.stack([source.load(int(number)) for number in half[first : first + BATCH]])
            batch = extract(torch.from_numpy(pixels).permute(0, 3, 1, 2))
            moments = moments or FeatureMoments(batch.shape[1])
            moments.update(batch)
            features.append(batch)
        assert moments is not None
        halves.append(moments)
    one, two = halves
    distance = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    one.merge(two)
    everything = torch.cat(features)
    labels = torch.tensor(source.labels)[torch.from_numpy(order)]
    (real, fake), (real_labels, fake_labels) = everything.tensor_split(2), labels.tensor_split(2)
    k = config.evaluate.neighbours
    accuracy = (knn_classify(real, real_labels, fake, k) == fake_labels).double().mean().item()
    provenance = {
        "features": config.evaluate.features,
        "image_size": config.data.image_size,
        "crop": config.data.crop,
        "neighbours": k,
        "source": f"{source.name} {source_fingerprint(source)}",
        "images": len(source.keys),
    }
    return {
        "mu": one.mean,
        "sigma": one.covariance,
        "features": everything.numpy()[:FEATURES_KEPT],
        "labels": labels.numpy()[:FEATURES_KEPT],
        "frechet_distance_halves": np.asarray(distance),
        "recall_halves": np.asarray(nearest_neighbour_recall(real, fake, k)),
        "class_accuracy_halves": np.asarray(accuracy),
        "provenance": np.asarray(json.dumps(provenance)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    with explained_exit():
        config = load_config(args.config, args.overrides)
        reference = make_reference(config)
        out = io.BytesIO()
        np.savez(out, **reference)
        storage.write_bytes(config.evaluate.reference, out.getvalue())
    print(
        f"{config.evaluate.reference}: {len(reference['features'])} images in {config.evaluate.features}, "
        f"halves {float(reference['frechet_distance_halves']):.4f} apart"
    )


if __name__ == "__main__":
    main()
