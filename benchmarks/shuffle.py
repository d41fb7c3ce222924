"""How far batches are from uniform draws: labels, and images met with their mirror images, at ImageNet's real size.

    .venv/bin/python -m benchmarks.shuffle --out benchmarks/results/shuffle.json

No image is read: ids alone go through the cut into shards and the plan of configs/uvit_h_imagenet512.yaml. Uniform:
every epoch one permutation of all samples; its expected values are exact, the deviation of an epoch's mean is that of
permutations drawn here. Exit code 1 where the mean over all epochs, with the shards as data_tools writes them, lies 3
standard errors off. Shards in the order of the classes' folders, as a plain conversion leaves them, go through the same
plan for comparison.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import ROOT, provenance
from data_tools.units import plan_units
from uvit_dist.config_yaml import load_config
from uvit_dist.data.plan import Plan

Ints = NDArray[np.int64]
IMAGES, CLASSES, SMALLEST, LARGEST = 1_281_167, 1000, 732, 1300
CONFIG = ROOT / "configs" / "uvit_h_imagenet512.yaml"
SEEDS, EPOCHS, PERMUTATIONS, MOST_SIGMA = range(1, 9), (0, 1), 100, 3.0
FIGURES = ("distinct_labels", "mirror_pairs")


def class_sizes() -> Ints:
    """Images of each class, (CLASSES,): most have LARGEST, about a tenth fewer, down to SMALLEST, as in ImageNet."""
    small, missing = 105, CLASSES * LARGEST - IMAGES
    ramp, largest = np.linspace(0, 1, small), LARGEST - SMALLEST
    powers = np.linspace(0.5, 8, 2000)
    best = min(powers, key=lambda power: abs(float((largest * ramp**power).sum()) - missing))
    deficits = np.round(largest * ramp**best).astype(np.int64)
    rest = missing - int(deficits.sum())
    deficits[small // 2 : small // 2 + abs(rest)] += np.sign(rest)
    sizes = np.full(CLASSES, LARGEST, dtype=np.int64)
    sizes[np.random.default_rng(0).permutation(CLASSES)[:small]] -= deficits
    assert (int(sizes.sum()), int(sizes.min()), int(sizes.max())) == (IMAGES, SMALLEST, LARGEST)
    return sizes


def batches_of(plan: Plan, epoch: int) -> Ints:
    """Ids of all batches of an epoch, (steps, batch): what ``Plan.sample_ids`` says, a block at a time."""
    starts = np.concatenate([[0], np.cumsum(plan.shard_counts)])
    lanes = np.empty((plan.lanes, plan.lane_length), dtype=np.int64)
    for lane in range(plan.lanes):
        for number, first in enumerate(range(0, plan.lane_length, plan.block_size)):
            span = plan.block(epoch, lane, number)
            ids = np.concatenate([starts[shard] + np.arange(begin, begin + n) for shard, begin, n in span.pieces])
            lanes[lane, first : first + len(ids)] = ids[span.order]
    steps = lanes.reshape(plan.lanes, plan.steps_per_epoch, plan.per_lane).transpose(1, 0, 2)
    return steps.reshape(plan.steps_per_epoch, plan.global_batch_size)


def figures(images: Ints, labels: Ints) -> NDArray[np.float64]:
    """Means over batches of FIGURES, (2,). images: (steps, batch), equal for an image and its mirror image; labels: of
    the images, (IMAGES,)."""
    step = np.arange(len(images))[:, None]
    seen = np.zeros(len(images) * CLASSES, dtype=bool)
    seen[(step * CLASSES + labels[images]).reshape(-1)] = True
    together = np.sort(images, axis=1)
    pairs = (together[:, 1:] == together[:, :-1]).sum()
    return np.array([seen.sum(), pairs]) / len(images)


def expected(sizes: Ints, batch: int) -> NDArray[np.float64]:
    """Of FIGURES when a batch is drawn from images and mirror images without replacement, (2,)."""
    total = 2 * IMAGES
    drawn = np.arange(batch)
    absent = [np.log1p(-2.0 * size / (total - drawn)).sum() for size in sizes.tolist()]
    return np.array([CLASSES - np.exp(absent).sum(), IMAGES * batch * (batch - 1) / (total * (total - 1))])


def deviation(labels: Ints, plan: Plan) -> NDArray[np.float64]:
    """Standard deviation of an epoch's means of FIGURES over uniform permutations, (2,)."""
    draw, used = np.random.default_rng(7), plan.steps_per_epoch * plan.global_batch_size
    means = []
    for _ in range(PERMUTATIONS):
        ids = draw.permutation(2 * IMAGES)[:used] % IMAGES
        means.append(figures(ids.reshape(plan.steps_per_epoch, -1), labels))
    return np.std(means, axis=0, ddof=1)


def measure() -> dict[str, Any]:
    """The result."""
    config = load_config(CONFIG)
    per_shard, batch = config.data.samples_per_shard, config.train.global_batch_size
    sizes = class_sizes()
    labels = np.repeat(np.arange(CLASSES), sizes)
    cuts = [len(range(first, min(first + per_shard, IMAGES))) for first in range(0, IMAGES, per_shard)]
    rows, sigma, exact = [], None, expected(sizes, batch)
    for seed in SEEDS:
        plan = Plan(tuple(cuts * 2), seed, batch, config.data.lanes, config.data.block_size)
        if sigma is None:
            sigma = deviation(labels, plan)
            check = np.sort(plan.sample_ids(3)), np.sort(batches_of(plan, 0)[3])
            assert np.array_equal(*check), "the blocks give what the plan says"
        units = plan_units(IMAGES, mirror=True, per_shard=per_shard, seed=seed)
        assert [len(unit.images) for unit in units] == cuts
        ordered = [[np.array(unit.shards[m].images, dtype=np.int64) for unit in units] for m in range(2)]
        permuted = np.concatenate(ordered[0] + ordered[1])
        del units, ordered
        for epoch in EPOCHS:
            ids = batches_of(plan, epoch)
            for shards_are, image_of in (("permuted", permuted), ("in folder order", np.arange(2 * IMAGES) % IMAGES)):
                found = figures(image_of[ids], labels)
                off = dict(zip(FIGURES, ((found - exact) / sigma).tolist(), strict=True))
                rows.append({"shards": shards_are, "seed": seed, "epoch": epoch, "sigma_off": off}
                            | dict(zip(FIGURES, found.tolist(), strict=True)))  # fmt: skip
    means = {
        shards_are: _mean([row for row in rows if row["shards"] == shards_are], exact, sigma)
        for shards_are in ("permuted", "in folder order")
    }
    return {
        "id": "shuffle",
        "passed": all(abs(off) <= MOST_SIGMA for off in means["permuted"]["sigma_off"].values()),
        "means": means,
        "most_sigma": MOST_SIGMA,
        "uniform": {name: {"expected": float(mean), "deviation_of_an_epoch": float(sd)}
                    for name, mean, sd in zip(FIGURES, exact, sigma, strict=True)},
        "rows": rows,
        "setting": {"images": IMAGES, "classes": CLASSES, "mirror": True, "samples_per_shard": per_shard,
                    "batch": batch, "lanes": config.data.lanes, "block": config.data.block_size,
                    "uniform_permutations": PERMUTATIONS},
        "command": "make bench-shuffle",
        **provenance(),
    }  # fmt: skip


def _mean(rows: list[dict[str, Any]], exact: NDArray[np.float64], sigma: NDArray[np.float64]) -> dict[str, Any]:
    found = np.array([[row[name] for name in FIGURES] for row in rows]).mean(axis=0)
    off = (found - exact) / sigma * np.sqrt(len(rows))
    worst = np.abs([[row["sigma_off"][name] for name in FIGURES] for row in rows]).max(axis=0)
    return {"epochs": len(rows)} | {
        key: dict(zip(FIGURES, values.tolist(), strict=True))
        for key, values in (("mean", found), ("sigma_off", off), ("largest_sigma_off_of_an_epoch", worst))
    }


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where the result is written, as JSON")
    arguments = parser.parse_args()
    result = measure()
    exact = {name: result["uniform"][name]["expected"] for name in FIGURES}
    print(f"{'mean over batches':32} {'distinct labels':>26} {'mirror pairs':>26}")
    print(f"{'uniform, expected':32} {exact['distinct_labels']:26.3f} {exact['mirror_pairs']:26.4f}")
    for shards_are, of in result["means"].items():
        cells = [f"{of['mean'][name]:.4f} ({of['sigma_off'][name]:+.1f} sigma)" for name in FIGURES]
        print(f"{shards_are:32} {cells[0]:>26} {cells[1]:>26}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
