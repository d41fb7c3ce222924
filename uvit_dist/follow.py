"""Watch a SLURM job of a run from anywhere: its logs, then its exit code.

    python -m uvit_dist.follow runs/digits_demo
    python -m uvit_dist.follow runs/digits_demo evaluate-step-00000500

Ctrl-C leaves the job alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvit_dist import attempts, lease, slurm, submit
from uvit_dist.config_cluster import Order, job_directory, read_order
from uvit_dist.errors import MissingInputError, UnavailableError, explained_exit

LOOKED_S, ASKED_S = 1.0, 15.0
"""Seconds between two looks at the files; between two questions to the scheduler."""
LEFT_EXIT_CODE = 130


class _Tail:
    """Prints what is added to files."""

    def __init__(self) -> None:
        self._places: dict[Path, int] = {}

    def show(self, path: Path) -> None:
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self._places.get(path, 0))
            text = file.read()
        self._places[path] = self._places.get(path, 0) + len(text)
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def follow(orders: Sequence[Order]) -> int:
    """Print what the supervisors of jobs and their ranks 0 say until each is finished, through requeues and successors.

    Returns their exit code; of several jobs the first that is not 0.
    """
    tail, told = _Tail(), ""
    asked = time.monotonic()
    try:
        while True:
            lives = [attempts.read(order.directory) for order in orders]
            ends = [attempts.finished(events) for events in lives]
            ended = all(end is not None for end in ends)
            if ended:
                time.sleep(LOOKED_S)  # for its last words
            for order, events in zip(orders, lives, strict=True):
                for job_id in _job_ids(events):
                    tail.show(submit.batch_log(order, job_id))
            if ended:
                return next((int(end["exit_code"]) for end in ends if end is not None and end["exit_code"]), 0)
            if time.monotonic() - asked > ASKED_S:
                asked = time.monotonic()
                states = [_state(events) for events, end in zip(lives, ends, strict=True) if end is None]
                if all(state is None for state in states):
                    names = ", ".join(str(submit.submitit_folder(order)) for order in orders)
                    print(
                        f"error: SLURM knows the job no more, and it did not say how it ended: {names}", file=sys.stderr
                    )
                    return 1
                line = "; ".join(sorted({state for state in states if state and not state.endswith("RUNNING")}))
                if line and line != told:
                    print(line, file=sys.stderr)
                told = line
            time.sleep(LOOKED_S)
    except KeyboardInterrupt:
        held = [lease.read(order.directory) for order in orders]
        live = [holder.job_id for holder in held if holder is not None and holder.job_id is not None]
        print(
            f"\njob {', '.join(live)} goes on without this; look again with python -m uvit_dist.follow "
            f"{orders[0].run_dir} {orders[0].name}, end it with scancel {' '.join(live)}",
            file=sys.stderr,
        )
        return LEFT_EXIT_CODE


def _job_ids(events: Sequence[Any]) -> list[str]:
    """The jobs of the newest life of an order, guards among them, in order."""
    ids: dict[str, None] = {}
    for event in events:
        if event["event"] == "submitted" and not event.get("guard_of"):
            ids = {}
        if event.get("job_id") is not None:
            ids[str(event["job_id"])] = None
    return list(ids)


def _state(events: Sequence[Any]) -> str | None:
    """What the scheduler says of a job's first process that is not gone, guards that wait left out; none: all gone."""
    waiting = None
    try:
        for job_id in _job_ids(events):
            if not slurm.is_gone(job_id, 0.0):
                state = slurm.job_state(job_id, 0.0)
                if state != "PENDING":
                    return f"job {job_id} is {state}"
                waiting = waiting or f"job {job_id} is PENDING"
    except UnavailableError as error:
        return str(error)
    return waiting


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.follow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="the run's directory")
    parser.add_argument("name", nargs="?", default="train", help="the job in it (default: train)")
    args = parser.parse_args()
    with explained_exit():
        path = job_directory(args.run_dir, args.name) / "order.json"
        if not path.exists():
            raise MissingInputError(f"{path}: no such job; those of the run are in {path.parents[1]}")
        code = follow([read_order(path)])
    sys.exit(code)


if __name__ == "__main__":
    main()
