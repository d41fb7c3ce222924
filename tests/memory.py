"""What tensors take on a CPU: those that are alive, and the most during some work, as the allocator sees it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def live_bytes() -> int:
    """Of the storages of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def peak_bytes(work: Callable[[Callable[[], None]], Any]) -> int:
    """The most that the allocator had handed out beyond what it had before, until the work calls what it is given."""
    found = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    found.start()
    work(found.stop)
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
