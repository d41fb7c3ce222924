"""Statistics of real images in the feature space of the scores, and how far two halves of them are apart.

python -m data_tools.fid_reference --config configs/digits_demo.yaml
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Collection
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_tools.images import load_images, source_fingerprint
from data_tools.shard_job import open_images, this_device
from data_tools.sources import open_source
from uvit_dist import storage, watchdog
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import explained_exit
from uvit_dist.fid import FeatureMoments, frechet_distance, knn_classify, nearest_neighbour_recall
from uvit_dist.pretrained import load_extractor

FEATURES_KEPT = 10_000
BATCH = 256


def make_reference(config: Config, bad: Collection[str] = (), scanned: bool = False) -> dict[str, Any]:
    """mu, sigma, features, labels, scores of one half against the other, provenance of the images of the data section.

    bad: keys of images to leave out; scanned: tars were scanned already, beside data.index.
    The halves are those of a seeded permutation: what one scores against the other is what to expect of a perfect
    model of that size. Recall and accuracy are those of the features kept; without labels there is no accuracy.
    """
    source = open_images(config) if scanned else open_source(config.data, config.precompute.exif_rotation)
    device = this_device()
    extract, _ = load_extractor(config.evaluate, device)
    order = np.argsort(np.random.Philox(key=config.seed).random_raw(len(source.keys)), kind="stable")
    left_out = [number for number, key in enumerate(source.keys) if number in source.unusable or key in bad]
    order = order[~np.isin(order, left_out)]
    halves, features, chosen = [], [], []
    for half in np.array_split(order, 2):
        moments: FeatureMoments | None = None
        images = load_images(source, ((int(number), False) for number in half), max(1, config.data.read_threads))
        kept: list[torch.Tensor] = []
        for first in tqdm(range(0, len(half), BATCH), unit="batch", disable=None):
            watchdog.progress(watchdog.WORKING)
            pixels = np.stack(list(islice(images, BATCH)))
            batch = extract(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)).cpu()
            moments = moments or FeatureMoments(batch.shape[1])
            moments.update(batch)
            if first < FEATURES_KEPT // 2:
                kept.append(batch)
        features.append(torch.cat(kept)[: FEATURES_KEPT // 2])
        chosen.append(torch.tensor(source.labels)[torch.from_numpy(half)][: FEATURES_KEPT // 2])
        assert moments is not None
        halves.append(moments)
    one, two = halves
    distance = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    one.merge(two)
    (real, fake), k = features, config.evaluate.neighbours
    scores = {"recall_halves": nearest_neighbour_recall(real, fake, k)}
    labels = {}
    if source.classes:
        scores["class_accuracy_halves"] = (knn_classify(real, chosen[0], fake, k) == chosen[1]).double().mean().item()
        labels["labels"] = torch.cat(chosen).numpy()
    provenance = {
        "features": config.evaluate.features,
        "image_size": config.data.image_size,
        "crop": config.data.crop,
        "neighbours": k,
        "source": f"{source.name} {source_fingerprint(source)}",
        "images": len(order),
    }
    return {
        "mu": one.mean,
        "sigma": one.covariance,
        "features": torch.cat(features).numpy(),
        **labels,
        "frechet_distance_halves": np.asarray(distance),
        **{name: np.asarray(score) for name, score in scores.items()},
        "provenance": np.asarray(json.dumps(provenance)),
    }


def write_reference(config: Config, bad: Collection[str] = (), scanned: bool = False) -> str:
    """Make and write evaluate.reference, as ``make_reference``; a line about it. Raises ``UserError``s."""
    reference = make_reference(config, bad, scanned)
    out = io.BytesIO()
    np.savez(out, **reference)
    storage.write_bytes(config.evaluate.reference, out.getvalue())
    made = json.loads(str(reference["provenance"]))
    return (
        f"{config.evaluate.reference}: {made['images']} images in {made['features']}, "
        f"halves {float(reference['frechet_distance_halves']):.4f} apart"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    with explained_exit():
        config = load_config(args.config, args.overrides)
        storage.configure(config.storage)
        print(write_reference(config))


if __name__ == "__main__":
    main()
