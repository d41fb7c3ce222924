"""The evaluation job: noise and label of every image from (seed, image id); the same scores however the work is cut.

Any number of workers share an evaluation through the files under ``RUN_DIR/evaluation``, without a process group: they
may start and end at any time, on any machine that sees the run directory.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from tqdm import tqdm

from uvit_dist import score_log, stopping
from uvit_dist.config import Config
from uvit_dist.dist import Ranks
from uvit_dist.errors import ConfigError
from uvit_dist.evaluation import sweep
from uvit_dist.evaluation.networks import Networks, load_networks
from uvit_dist.evaluation.point import Point, all_done
from uvit_dist.metrics import log_scores

log = logging.getLogger(__name__)


def evaluate(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Sample, decode, extract features and score, with whoever else does the same. Every worker returns the scores.

    What was finished before, by whomever, is not done again. With ``evaluate.small_samples`` these are the scores of
    so many images, or of all, as that section says; with ``evaluate.sweep`` of all points, under "points".
    Raises ``UserError`` of the right kind, and ``KeyboardInterrupt`` where the job was asked to stop.
    """
    with stopping.gently():
        points = sweep.points(config)
        networks = load_networks(config, device_of(ranks))
        if len(points) > 1:
            found = _scored(points, networks, ranks.is_main)
            return {"points": found, **sweep.report(config, found)}
        small = config.evaluate.small_samples
        if small is not None:
            (few,) = _scored([with_samples(config, small)], networks, ranks.is_main)
            if not few["best_so_far"]:
                return few
        (scores,) = _scored([config], networks, ranks.is_main)
        return scores


def _scored(configs: list[Config], networks: Networks, visible: bool) -> list[dict[str, Any]]:
    """The scores under each of these configurations. visible: whether a bar shows how far all workers are."""
    with contextlib.ExitStack() as held:
        points = [Point(config, networks, _publish) for config in configs]
        for point in points:
            held.callback(point.close)
        total = sum(len(point.chunks) for point in points)
        bar = held.enter_context(tqdm(total=total, unit="chunk", disable=None if visible else True))

        def tell(done: int) -> None:
            bar.update(done - bar.n)

        return all_done(points, tell)


def _publish(record: dict[str, Any], config: Config) -> dict[str, Any]:
    """Add new scores to the history of the run and, where they are of one of its checkpoints, to its metrics.

    Returns the record, with ``best_so_far``: whether no other checkpoint has a lower distance on as many images of the
    same protocol.
    """
    ours, distance = score_log.alike(record), score_log.distance_of(record)
    rivals = [
        other
        for other in score_log.records(config.run_dir)
        if score_log.alike(other) == ours and other.get("checkpoint") != record["checkpoint"]
    ]
    lowest = min((d for d in map(score_log.distance_of, rivals) if d is not None), default=float("inf"))
    record = {**record, "best_so_far": distance is not None and distance <= lowest}
    score_log.append_line(score_log.path_of(config.run_dir), record)
    if record["of_run"]:
        log_scores(config.run_dir, record, config.model_dump(mode="json"))
    return record


def with_samples(config: Config, samples: int) -> Config:
    """The same evaluation of another number of images, in one go."""
    section = config.evaluate.model_copy(update={"samples": samples, "small_samples": None})
    return config.model_copy(update={"evaluate": section})


def device_of(ranks: Ranks) -> torch.device:
    """The GPU of this worker among those of its machine; without any, the CPU.

    Raises ``ConfigError`` where the machine has fewer.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        raise ConfigError(
            f"launch.processes_per_node: local rank {ranks.local_rank} has no GPU of its own, this machine has {count};"
            f" set launch.processes_per_node {count}, or add --local {count}"
        )
    device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)
    return device
