"""The scores of a run's checkpoints: one line of JSON for each evaluation, which many jobs may append at once."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from uvit_dist import storage

DISTANCES = ("fid", "adm_fid", "frechet_distance")
"""Scores by which checkpoints are ranked, the lower the better: the first that a record has."""


def path_of(run_dir: str | Path) -> Path:
    """The file of the records of a run."""
    return Path(run_dir, "evaluation", "scores.jsonl")


def append_line(path: str | Path, record: dict[str, Any]) -> None:
    """Append a record to a file of JSON lines by one write, which no other one can tear."""
    storage.make_directory(str(Path(path).parent))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, in order; none without a file. A line cut by a kill is passed over."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    out = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            out.append(record)
    return out


def records(run_dir: str | Path) -> list[dict[str, Any]]:
    """All records of a run, the oldest first; lines that are not whole are passed over."""
    return read_lines(path_of(run_dir))


def distance_of(record: dict[str, Any]) -> float | None:
    """The score by which checkpoints are ranked; none where a record has none."""
    return next((float(record[name]) for name in DISTANCES if record.get(name) is not None), None)


def alike(record: dict[str, Any]) -> tuple[str, int]:
    """What two records must agree in to be compared: the protocol without the weights, and the number of images."""
    return str(record.get("protocol")), int(record.get("samples", 0))


def distances(run_dir: str | Path) -> dict[int, float]:
    """Step → distance of the checkpoints of a run, of those that can be compared: the protocol and number of images by
    which most were scored, the latest of several."""
    groups: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for record in records(run_dir):
        distance = distance_of(record)
        if distance is not None and record.get("of_run") and record.get("weights") == "ema":
            group = groups.pop(alike(record), {})
            groups[alike(record)] = group | {int(record["step"]): distance}  # the latest comes last
    return max(reversed(list(groups.values())), key=len, default={})
