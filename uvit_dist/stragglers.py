"""Slow ranks: the time of each rank's forward passes, where no rank waits for another, against the others' times.

All ranks hear all times every ``stragglers.every`` steps, by one collective of a number from each: so it works under
any launcher, and the ranks need no supervisor to hear it. It comes right after the collective that each step has, when
the ranks have just met and the device is idle.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from uvit_dist.config_health import StragglersConfig

Mark = float | torch.cuda.Event
STEPS = 1000
"""Of which a median is taken at most."""


class ForwardClock:
    """Seconds of this rank's forward passes in each step, on the device: CUDA events, else the host's clock.

    Events are read after the step's one synchronisation has passed them, so that none is added.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._running = device.type == "cuda", False
        self._work, self._waits = list[tuple[Mark, Mark]](), list[tuple[Mark, Mark]]()
        self._steps: deque[float] = deque(maxlen=STEPS)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass is inside."""
        began, self._running = self._now(), True
        yield
        self._running = False
        self._work.append((began, self._now()))

    def leave_out(self, owner: Any, name: str) -> None:
        """Do not count the time in ``owner.name``, a method in which a forward pass waits for other ranks."""
        method: Callable[..., Any] = getattr(owner, name)

        def waited_for(*args: Any, **kwargs: Any) -> Any:
            began = self._now() if self._running else 0.0
            result = method(*args, **kwargs)
            if self._running:
                self._waits.append((began, self._now()))
            return result

        setattr(owner, name, waited_for)

    def step_over(self) -> None:
        """All passes of a step have ended on the device."""
        self._steps.append(sum(map(self._seconds, self._work)) - sum(map(self._seconds, self._waits)))
        self._work.clear()
        self._waits.clear()

    def take(self) -> float:
        """The median step since the last call, seconds: what happens once, as a compilation, does not count."""
        median = statistics.median(self._steps) if self._steps else 0.0
        self._steps.clear()
        return median

    def _now(self) -> Mark:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span: tuple[Mark, Mark]) -> float:
        began, ended = span
        if isinstance(began, torch.cuda.Event):
            assert isinstance(ended, torch.cuda.Event)
            return began.elapsed_time(ended) / 1e3
        assert not isinstance(ended, torch.cuda.Event)
        return ended - began


def ratios(times: Sequence[float]) -> list[float]:
    """Each rank's time over the median of the others': of two ranks, too, a slow one stands out."""
    others = [statistics.median([*times[:rank], *times[rank + 1 :]] or [own]) for rank, own in enumerate(times)]
    return [own / max(other, 1e-9) for own, other in zip(times, others, strict=True)]


class Stragglers:
    """Which ranks are slow, from one comparison to the next."""

    def __init__(self, rules: StragglersConfig, hosts: Sequence[str]) -> None:
        self.rules, self.hosts = rules, hosts
        self._in_a_row = [0] * len(hosts)

    def hear(self, times: Sequence[float]) -> dict[int, str]:
        """Rank → what is told of it, of those that are now named. times: of every rank, seconds a step."""
        named = {}
        for rank, ratio in enumerate(ratios(times)):
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if ratio >= self.rules.ratio else 0
            if self._in_a_row[rank] == self.rules.gathers:
                named[rank] = (
                    f"rank {rank} on {self.hosts[rank]} is slow: the forward passes of a step take {times[rank]:.3g} s,"
                    f" {ratio:.2f} times the median of the other ranks, {self.rules.gathers} times in a row"
                )
        return named
