"""Sides that take turns in one process, the ratios of each round, and the record of a comparison."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import provenance

WARM_UPS = 2
"""Rounds that are not counted."""
AT_LEAST = 7
"""Counted rounds, whatever was asked, where a round takes seconds: their medians then scatter less."""
Side = Callable[[], float]
"""Does its part of a round and says how much it did in a second."""
Limits = Mapping[str, tuple[float, float]]
"""Of each ratio, pass and stretch."""


def rounds(sides: Mapping[str, Side], count: int) -> dict[str, list[float]]:
    """What the sides did in a second in each round, in turns, after WARM_UPS rounds."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM_UPS + count):
        for name, side in sides.items():
            done = side()
            if number >= WARM_UPS:
                found[name].append(done)
    return found


class Apart:
    """A side in a process of its own, as its users have it: what others allocate and free is not in its way.

    make: gives the side, in that process, called with args. A round raises ``EOFError`` where it failed there.
    """

    def __init__(self, make: Callable[..., Side], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, *args), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> float:
        """Its part of a round."""
        self._end.send(None)
        return float(self._end.recv())

    def close(self) -> None:
        """End the process."""
        self._end.close()
        self._process.join()


def _serve(end: Connection, make: Callable[..., Side], *args: Any) -> None:
    side = make(*args)
    with contextlib.suppress(EOFError):
        while True:
            end.recv()
            end.send(side())


def timed(work: Callable[[], int]) -> float:
    """What ``work`` counts, in a second."""
    begin = time.perf_counter()
    return work() / (time.perf_counter() - begin)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def result(
    name: str,
    limits: Limits,
    against: Mapping[str, list[float]],
    gates: Mapping[str, bool],
    found: Mapping[str, Any],
    setting: Mapping[str, Any],
    command: str,
    at_most: Collection[str] = (),
    **extra: Any,
) -> dict[str, Any]:
    """The record of a comparison. against: the ratio of each round; what limits does not name is in "further".

    at_most: the ratios whose limits are from above.
    """
    medians = {key: statistics.median(values) for key, values in against.items()}
    where = provenance()
    libraries = ("numpy", "webdataset", "obstore", "s3fs", "xxhash")
    where["versions"] |= {library: version(library) for library in libraries}
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "id": name,
        "measured": {key: medians[key] for key in limits},
        "pass": {key: limit for key, (limit, _) in limits.items()},
        "stretch": {key: limit for key, (_, limit) in limits.items()},
        "passed": all(gates.values())
        and all(medians[key] <= limit if key in at_most else medians[key] >= limit
                for key, (limit, _) in limits.items()),
        "gate_passed": all(gates.values()),
        "gates": gates,
        "further": {key: value for key, value in medians.items() if key not in limits},
        "spread": {key: [min(values), max(values)] for key, values in against.items()},
        "rounds": found,
        "setting": setting,
        **extra,
        "machine": {"processor": processor[1] if processor else "unknown", "cores": os.cpu_count(),
                    "load_of_the_last_minute": os.getloadavg()[0]},
        "command": command,
        **where,
    }  # fmt: skip


def show(record: Mapping[str, Any]) -> None:
    """Print a table."""
    print(f"{record['id']:22} {'pass':>8} {'stretch':>8} {'measured':>9}   smallest and largest of a round")
    for key, values in {**record["measured"], **record["further"]}.items():
        limits = [f"{record[kind][key]:g}" if key in record[kind] else "" for kind in ("pass", "stretch")]
        low, high = record["spread"][key]
        print(f"{key:22} {limits[0]:>8} {limits[1]:>8} {values:9.3f}   {low:.3f} {high:.3f}")
    for gate, held in record["gates"].items():
        print(f"gate: {gate}: {'held' if held else 'BROKEN'}")
    print("passed" if record["passed"] else "NOT PASSED", flush=True)


def keep(record: Mapping[str, Any], folder: Path) -> None:
    """Write a record as ID.json, in place of the last one, and a line of it to runs.jsonl, which holds every run."""
    (folder / f"{record['id']}.json").write_text(json.dumps(record, indent=1) + "\n")
    line = {key: record[key] for key in ("id", "date", "commit", "measured", "passed", "gate_passed")}
    with open(folder / "runs.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
