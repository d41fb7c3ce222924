"""What an evaluation costs beside its networks: dealing chunks to workers, keeping their features, scoring.

    python -m benchmarks.evaluation_overhead --out benchmarks/results/evaluation_overhead.json

FID-50K as the presets cut it: chunks of 100 images, 2,048 features each. Every worker is a process. The features are
random, of a covariance of full rank; the gate is that the moments of the spool are those of the features. Times are
those that the cores spent, user and system, so that what else the machine does hardly counts; a storage that answers
slowly does not show. Median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import provenance
from uvit_dist.evaluation.point import chunk_names
from uvit_dist.fid import frechet_distance
from uvit_dist.spool import spooled
from uvit_dist.work import SharedWork, WorkDirectory

IMAGES, CHUNK, FEATURES = 50_000, 100, 2048


def deal(directory: str, result: dict[str, Any], started: Any) -> None:
    """One worker: claim, store, until nothing is left. The results are there already: making them costs nothing."""
    work = SharedWork(directory, chunk_names(IMAGES, CHUNK), 60.0)
    started.wait()
    while (chunk := work.claim()) is not None:
        work.put(chunk, result)
    work.close()


def core_seconds(who: int) -> float:
    """Seconds of all cores so far, for this process or for those of its children that ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def dealing_ms(workers: int, root: str) -> float:
    """Milliseconds of a core for each chunk, of 50K images dealt to so many workers at once."""
    result = {"pool3": np.ones((CHUNK, FEATURES), np.float32), "labels": np.zeros(CHUNK, np.int64)}
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=root) as directory:
        started = context.Barrier(workers + 1)
        processes = [context.Process(target=deal, args=(directory, result, started)) for _ in range(workers)]
        for process in processes:
            process.start()
        before = core_seconds(resource.RUSAGE_CHILDREN)
        started.wait()
        for process in processes:
            process.join()
        seconds = core_seconds(resource.RUSAGE_CHILDREN) - before
        assert not WorkDirectory(directory, chunk_names(IMAGES, CHUNK)).missing()
    return seconds * 1e3 / (IMAGES // CHUNK)


def scoring_s(root: str) -> dict[str, float]:
    """Core seconds of the scorer: reading all chunks to the spool, their moments, the distance."""
    draw = np.random.default_rng(0)
    mix = draw.standard_normal((FEATURES, FEATURES), dtype=np.float32) / FEATURES**0.5
    with tempfile.TemporaryDirectory(dir=root) as directory:
        work = WorkDirectory(directory, chunk_names(IMAGES, CHUNK))
        total, squares = np.zeros(FEATURES), np.zeros((FEATURES, FEATURES))
        for chunk in work.units:
            features = np.abs(draw.standard_normal((CHUNK, FEATURES), dtype=np.float32) @ mix)
            total += features.sum(0, dtype=np.float64)
            squares += features.T.astype(np.float64) @ features.astype(np.float64)
            work.put(chunk, {"pool3": features})
        times = [core_seconds(resource.RUSAGE_SELF)]
        with spooled(work, ["pool3"], IMAGES) as spool:
            times.append(core_seconds(resource.RUSAGE_SELF))
            moments = spool.moments("pool3")
            times.append(core_seconds(resource.RUSAGE_SELF))
        mean, covariance = moments.mean, moments.covariance
        frechet_distance(mean, covariance, mean + 0.01, 1.01 * covariance)
        times.append(core_seconds(resource.RUSAGE_SELF))
    mean_of_sums = total / IMAGES
    expected = (squares - IMAGES * np.outer(mean_of_sums, mean_of_sums)) / (IMAGES - 1)
    assert np.allclose(mean, mean_of_sums, rtol=1e-10)
    assert np.allclose(covariance, expected, atol=1e-10)
    return dict(zip(("spool", "moments", "distance"), np.diff(times).tolist(), strict=True))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the files go (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rounds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for workers in (1, 8, 64):
            rounds.setdefault(f"dealing_core_ms_per_chunk_{workers}_workers", []).append(dealing_ms(workers, args.dir))
        for part, seconds in scoring_s(args.dir).items():
            rounds.setdefault(f"scoring_core_s_{part}", []).append(seconds)
    measured = {name: round(statistics.median(values), 3) for name, values in rounds.items()}
    report = {**provenance(), "measured": measured, "rounds": rounds, "cores": os.cpu_count(),
              "threads": torch.get_num_threads(), "images": IMAGES, "chunk": CHUNK, "features": FEATURES}  # fmt: skip
    print(json.dumps(report["measured"], indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
