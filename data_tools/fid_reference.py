"""Statistics of real images in the feature space of the scores, and how far two halves of them are apart.

    python -m data_tools.fid_reference --config configs/digits_demo.yaml
    python -m uvit_dist.launch --config configs/uvit_h_imagenet256.yaml --job reference     (on many workers)

The images are cut into units, which any number of workers share by leases, as precompute and evaluation do. A unit's
moments are a function of its images: so the statistics have the same bits however the work is spread, or interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Collection
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_tools.images import ImageSource, load_images, source_fingerprint
from data_tools.shard_job import open_images, this_device
from data_tools.sources import open_source
from uvit_dist import stopping, storage, watchdog
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import DataError, explained_exit
from uvit_dist.fid import FeatureMoments, frechet_distance
from uvit_dist.models.features import Extractor
from uvit_dist.pretrained import load_extractor
from uvit_dist.scores.kinds import (
    COMPARED,
    FRECHET,
    OF_INCEPTION,
    OF_PIXELS,
    REFERENCE_KEYS,
    needed,
)
from uvit_dist.scores.neighbours import knn_classify, precision_and_recall
from uvit_dist.work import Result, SharedWork

UNIT = 4096
"""Images of a unit of work."""
HALVES = 2


class ReferenceJob:
    """One worker's view of the making of a reference. ``close`` gives back what it holds.

    The halves are those of a seeded permutation: what one scores against the other is what to expect of a perfect
    model of that size.
    """

    def __init__(self, config: Config, bad: Collection[str] = (), scanned: bool = False) -> None:
        """bad: keys of images to leave out; scanned: tars were scanned already, beside data.index."""
        self.config, evaluate = config, config.evaluate
        self._source: ImageSource = (
            open_images(config) if scanned else open_source(config.data, config.precompute.exif_rotation)
        )
        self._device = this_device()
        self._extract: Extractor
        self._extract, identity = load_extractor(evaluate, self._device)
        self.kinds = [kind for kind in needed(evaluate.features, evaluate.asked) if kind in REFERENCE_KEYS]
        order = np.argsort(np.random.Philox(key=config.seed).random_raw(len(self._source.keys)), kind="stable")
        left_out = [n for n, key in enumerate(self._source.keys) if n in self._source.unusable or key in bad]
        self._halves = np.array_split(order[~np.isin(order, left_out)], HALVES)
        self.provenance = {
            "features": evaluate.features,
            "kinds": self.kinds,
            "extractor": identity.partition(" ")[0],
            "image_size": config.data.image_size,
            "crop": config.data.crop,
            "neighbours": evaluate.neighbours,
            "compared": evaluate.compared,
            "batch": evaluate.sub_batch_size,
            "seed": config.seed,
            "source": f"{self._source.name} {source_fingerprint(self._source)}",
            "images": sum(map(len, self._halves)),
        }
        if min(map(len, self._halves)) < 2:
            raise DataError(f"{self._source.name}: {self.provenance['images']} images; a reference needs more")
        digest = hashlib.sha256(json.dumps([self.provenance, sorted(bad)]).encode()).hexdigest()[:12]
        self._spans = {
            f"half-{half}-{number:06d}": (half, first, min(first + UNIT, len(images)))
            for half, images in enumerate(self._halves)
            for number, first in enumerate(range(0, len(images), UNIT))
        }
        self._work = SharedWork(f"{config.run_dir}/reference/{digest}", list(self._spans), evaluate.lease_s)

    def close(self) -> None:
        """Give back what this worker holds."""
        self._work.close()

    def run(self) -> dict[str, Any]:
        """Do units until all are done; one worker makes the reference and writes it. Returns its provenance.

        Raises ``KeyboardInterrupt`` where the job was asked to stop, and what reading and scoring raise.
        """
        done = 0
        with tqdm(total=len(self._spans), unit="unit", disable=None) as progress:
            while self._made() is None and self._work.missing():
                stopping.check()
                while (unit := self._work.claim()) is not None:
                    self._work.put(unit, self._result(unit))
                    done += 1
                    watchdog.progress(watchdog.WORKING, done)
                    progress.update(len(self._spans) - len(self._work.missing()) - progress.n)
                if self._work.missing():
                    self._work.wait()
        return self._work.once("reference", self._made, self._write)

    def _made(self) -> dict[str, Any] | None:
        """The provenance of the reference, if it is there and is this one."""
        path = self.config.evaluate.reference
        if not storage.exists(path):
            return None
        try:
            with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as archive:
                found: dict[str, Any] = json.loads(str(archive["provenance"]))
        except (ValueError, KeyError, EOFError, OSError):
            return None
        return found if {**found, "halves": None} == {**self.provenance, "halves": None} else None

    def _result(self, unit: str) -> Result:
        """Moments of each kind; features and labels of those images that samples will be compared with."""
        half, first, last = self._spans[unit]
        numbers = self._halves[half][first:last]
        features = {kind: torch.cat(parts) for kind, parts in self._features(numbers).items()}
        kept = max(0, min(last, self.config.evaluate.compared // HALVES) - first)
        out: Result = {"labels": np.asarray(self._source.labels)[numbers][:kept]}
        for kind, values in features.items():
            moments = FeatureMoments(values.shape[1])
            moments.update(values)
            out |= {f"{kind}_{key}": np.asarray(value) for key, value in moments.state_dict().items()}
            out[f"{kind}_features"] = values[:kept].numpy()
        return out

    def _features(self, numbers: NDArray[Any]) -> dict[str, list[Tensor]]:
        """Of images, in batches of one size, the last one padded: a network's bits depend on its batch."""
        size = self.config.evaluate.sub_batch_size
        images = load_images(
            self._source, ((int(number), False) for number in numbers), max(1, self.config.data.read_threads)
        )
        out: dict[str, list[Tensor]] = {kind: [] for kind in self.kinds}
        while batch := list(islice(images, size)):
            stopping.check()
            pixels = np.stack([*batch, *[batch[-1]] * (size - len(batch))])
            found = self._extract(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device))
            for kind, parts in out.items():
                parts.append(found[kind][: len(batch)].cpu())
        return out

    def _write(self) -> dict[str, Any]:
        """Merge in order of the units, and write the whole."""
        moments: list[dict[str, FeatureMoments]] = [{} for _ in range(HALVES)]
        kept: list[dict[str, list[NDArray[Any]]]] = [{} for _ in range(HALVES)]
        for (half, _, _), result in zip(self._spans.values(), self._work.results(), strict=True):
            for kind in self.kinds:
                part = FeatureMoments(len(result[f"{kind}_mean"]))
                part.load_state_dict({key: result[f"{kind}_{key}"] for key in ("n", "mean", "scatter")})
                moments[half].setdefault(kind, FeatureMoments(len(result[f"{kind}_mean"]))).merge(part)
                kept[half].setdefault(kind, []).append(result[f"{kind}_features"])
            kept[half].setdefault("labels", []).append(result["labels"])
        features = [{name: np.concatenate(parts) for name, parts in half.items()} for half in kept]
        scores = self._scores_of_halves(moments, features)
        arrays: dict[str, Any] = {f"{name}_halves": np.asarray(value) for name, value in scores.items()}
        for kind in self.kinds:
            mean_key, covariance_key, features_key = REFERENCE_KEYS[kind]
            moments[0][kind].merge(moments[1][kind])
            arrays |= {mean_key: moments[0][kind].mean, covariance_key: moments[0][kind].covariance}
            if features_key is not None:
                arrays[features_key] = np.concatenate([half[kind] for half in features])
        if self._source.classes:
            arrays["labels"] = np.concatenate([half["labels"] for half in features])
        made = {**self.provenance, "halves": scores}
        out = io.BytesIO()
        np.savez(out, **arrays, provenance=np.asarray(json.dumps(made)))
        storage.write_bytes(self.config.evaluate.reference, out.getvalue())
        for unit in self._spans:
            storage.remove(self._work.path(unit))
        return made

    def _scores_of_halves(
        self, moments: list[dict[str, FeatureMoments]], features: list[dict[str, NDArray[Any]]]
    ) -> dict[str, float]:
        """What one half scores against the other, of the scores asked for; those by comparison of the samples kept."""
        evaluate = self.config.evaluate
        table, k = OF_INCEPTION if evaluate.features == "inception" else OF_PIXELS, evaluate.neighbours
        out = {}
        for name in evaluate.asked:
            if name in FRECHET:
                one, two = (half[table[name]] for half in moments)
                out[name] = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
        compared = [name for name in evaluate.asked if name in COMPARED]
        if compared:
            real, other = (torch.from_numpy(half[table[compared[0]]]).to(self._device) for half in features)
            both = dict(zip(("precision", "recall"), precision_and_recall(real, other, k), strict=True))
            out |= {name: value for name, value in both.items() if name in compared}
            if "class_accuracy" in compared and self._source.classes:
                labels = [torch.from_numpy(half["labels"]) for half in features]
                found = knn_classify(real, labels[0].to(self._device), other, k).cpu()
                out["class_accuracy"] = (found == labels[1]).double().mean().item()
        return out


def write_reference(config: Config, bad: Collection[str] = (), scanned: bool = False) -> str:
    """Make evaluate.reference, with whoever else does the same; a line about it. As ``ReferenceJob``.

    Raises ``UserError`` of the right kind, and ``KeyboardInterrupt`` where the job was asked to stop.
    """
    job = ReferenceJob(config, bad, scanned)
    try:
        with stopping.gently():
            made = job.run()
    finally:
        job.close()
    halves = ", ".join(f"{name} {value:.4f}" for name, value in made["halves"].items())
    what = f"{made['images']} images in {made['features']}"
    return f"{config.evaluate.reference}: {what}; one half against the other: {halves or 'not compared'}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.fid_reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    with explained_exit():
        config = load_config(args.config, args.overrides)
        storage.configure(config.storage)
        print(write_reference(config))


if __name__ == "__main__":
    main()
