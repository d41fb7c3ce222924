"""What a committed checkpoint starts: ``--then evaluate``. Jobs of their own, which cannot stop training."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvit_dist import attempts, orders, pins, slurm
from uvit_dist.config_cluster import ONE_NODE, Order, job_directory
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import UnavailableError

AGAIN_S, SELDOM_S, ASKED_S = 60.0, 3600.0, 60.0
"""Seconds to the next try to submit, at first and at most; between questions to the scheduler about silent jobs."""
_STEP = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


class FollowUps:
    """The follow-ups of a training job's checkpoints. All that it knows lies in files: a successor goes on with it."""

    def __init__(self, order: Order) -> None:
        self._order, self._done = order, set[int]()
        self._try_at = self._ask_at = time.monotonic()
        self._pause = AGAIN_S

    def see(self) -> None:
        """Submit what new checkpoints call for; let go of those that are done with. Never raises."""
        if not self._order.then:
            return
        try:
            ask = time.monotonic() >= self._ask_at
            if ask:
                self._ask_at = time.monotonic() + ASKED_S
            for step in committed(self._order.run_dir):
                if step not in self._done:
                    self._follow(step, ask)
        except Exception as error:  # noqa: BLE001 - an evaluation must not stop training
            self._try_at = time.monotonic() + self._pause
            log.warning("follow-ups: %s: %s; tried again in %g s", type(error).__name__, error, self._pause)
            self._pause = min(2 * self._pause, SELDOM_S)

    def _follow(self, step: int, ask: bool) -> None:
        ended = True
        for job in self._order.then:
            events = attempts.read(follow_up_directory(self._order.run_dir, job, step))
            if not any(event["event"] == "submitted" for event in events):
                ended = False
                if time.monotonic() >= self._try_at:
                    self._submit(job, step)
            elif attempts.finished(events) is None:
                ended = ended and ask and _all_gone(events)
        if ended:
            pins.release(self._order.run_dir, step)
            self._done.add(step)

    def _submit(self, job: str, step: int) -> None:
        directory = follow_up_directory(self._order.run_dir, job, step)
        checkpoint = f"{self._order.run_dir}/checkpoints/step-{step:08d}"
        config = load_config(self._order.config, [f"{job}.checkpoint={checkpoint}", *ONE_NODE])
        changes = {
            "job": job,
            "name": directory.name,
            "directory": str(directory),
            "config": str(directory / "config.yaml"),
            "nodes": 1,
            "spares": 0,
            "shrinks_to": (),
            "then": (),
            "checkpoint": checkpoint,
        }
        (job_id,) = orders.place([self._order.model_copy(update=changes)], config)
        self._pause = AGAIN_S
        log.info("checkpoint of step %d: %s is job %s", step, job, job_id)


def follow_up_directory(run_dir: str, job: str, step: int) -> Path:
    """The directory of the job that follows up the checkpoint of a step."""
    return job_directory(run_dir, f"{job}-step-{step:08d}")


def committed(run_dir: str | Path) -> list[int]:
    """The steps of a run's committed checkpoints, oldest first."""
    paths = Path(run_dir, "checkpoints").glob("step-*")
    return sorted(int(found[1]) for path in paths if (found := _STEP.fullmatch(path.name)))


def _all_gone(events: Sequence[Any]) -> bool:
    """Whether SLURM knows none of a follow-up's jobs any more: it was cancelled before it began, say."""
    try:
        return all(slurm.is_gone(job_id, 0.0) for job_id in {e["job_id"] for e in events if e.get("job_id")})
    except UnavailableError:
        return False
