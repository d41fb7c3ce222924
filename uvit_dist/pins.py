"""Checkpoints that a follow-up still needs, an evaluation say: they are kept until it has ended.

``RUN_DIR/launch/followed`` exists while checkpoints are followed up. What is not marked in it is pinned, so that a
checkpoint is so from its commit on, before anyone has seen it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path


def _folder(run_dir: str | Path) -> Path:
    return Path(run_dir, "launch", "followed")


def switch(run_dir: str | Path, on: bool) -> None:
    """Follow up the checkpoints of a run from now on, or no more: then none is pinned."""
    if on:
        _folder(run_dir).mkdir(parents=True, exist_ok=True)
    else:
        shutil.rmtree(_folder(run_dir), ignore_errors=True)


def release(run_dir: str | Path, step: int) -> None:
    """A checkpoint is not needed for its follow-ups any more."""
    if _folder(run_dir).is_dir():
        (_folder(run_dir) / f"step-{step:08d}").touch()


def pinned(run_dir: str | Path, steps: Iterable[int]) -> set[int]:
    """Those of the steps whose checkpoints are still needed."""
    if not _folder(run_dir).is_dir():
        return set()
    return {step for step in steps if not (_folder(run_dir) / f"step-{step:08d}").exists()}
