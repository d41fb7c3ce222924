"""An evaluation's units, shared by as many workers as threads of a few processes can be."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from uvit_dist import work

ASKED = ("names_in", "create", "write_bytes", "read_bytes", "remove", "exists")
"""Functions of ``storage`` that ask a file system for something."""
THREADS = 64
"""Workers in a process. With many more, Python's interpreter lock takes all of the time: a listing gives it up at each
name, and every other thread asks for it 200 times a second."""


@contextmanager
def counted(module: Any, names: Sequence[str]) -> Iterator[Counter[str]]:
    """Counts calls of a module's functions."""
    calls, before, lock = Counter[str](), {name: getattr(module, name) for name in names}, threading.Lock()

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                calls[name] += 1
            return before[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(module, name, wrapped(name))
        yield calls
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def evaluation(workers: int, units: int, unit_s: float, folder: Path) -> dict[str, Any]:
    """The units of an evaluation, each of ``unit_s`` seconds, shared by so many workers that begin at once."""
    context = multiprocessing.get_context("spawn")
    shares = [min(THREADS, workers - first) for first in range(0, workers, THREADS)]
    begin = (context.Barrier(len(shares), timeout=600),)
    with ProcessPoolExecutor(len(shares), context, _begin_with, begin) as pool:
        answers = [pool.submit(_work, share, _names(units), unit_s, folder) for share in shares]
    done, times, requests = Counter[str](), list[float](), Counter[str]()
    for of_process, claims, calls in (answer.result() for answer in answers):
        done.update(of_process)
        times += claims
        requests.update(calls)
    return {
        "units": units,
        "decision_s": statistics.median(times),
        "requests": dict(requests),
        "requests_of_a_unit": requests.total() / units,
        "done_twice": sum(done.values()) - len(done),
        "right": set(done) == set(_names(units)) and not work.WorkDirectory(str(folder), _names(units)).missing(),
    }


def _names(units: int) -> list[str]:
    return [f"images-{number:06d}" for number in range(units)]


_begin: Any = None
"""Where all processes meet before their workers claim."""


def _begin_with(barrier: Any) -> None:
    global _begin
    _begin = barrier


Answer = tuple[Counter[str], list[float], Counter[str]]
"""Of a process: units done by name, CPU seconds of each claim, requests by kind."""


def _work(workers: int, names: list[str], unit_s: float, folder: Path) -> Answer:
    done, times, lock, here = Counter[str](), list[float](), threading.Lock(), threading.Barrier(workers)

    def one() -> None:
        shared = work.SharedWork(str(folder), names, lease_s=3600)
        if here.wait() == 0:
            _begin.wait()
        here.wait()
        while shared.missing():
            began = time.thread_time()
            unit = shared.claim()
            took = time.thread_time() - began
            if unit is None:
                return  # all are in other hands: in earnest it waits for them
            time.sleep(unit_s)
            shared.put(unit, {"features": np.zeros(4)})
            with lock:
                done[unit] += 1
                times.append(took)

    with counted(work.storage, ASKED) as calls, ThreadPoolExecutor(workers) as pool:
        for result in [pool.submit(one) for _ in range(workers)]:
            result.result()
    return done, times, calls
