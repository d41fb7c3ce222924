"""The divergence guard: what becomes of a step, judged by numbers that all ranks share. A part of every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from uvit_dist.config import GuardConfig


class Verdict(Enum):
    """On a step whose loss and gradient are known and whose update is not made yet."""

    APPLY = "apply"
    SKIP = "skip"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Guard:
    """The rules, and what the next verdict depends on: the same on all ranks, and after a kill and a resume.

    losses: of the last updates made, oldest first, ``rules.window`` at most; skipped: steps skipped in a row;
    rollbacks: made so far, in the whole life of the run.
    """

    rules: GuardConfig
    losses: tuple[float, ...] = ()
    skipped: int = 0
    rollbacks: int = 0

    @staticmethod
    def from_dict(rules: GuardConfig, record: Mapping[str, Any]) -> Guard:
        """Read what ``to_dict`` wrote, or nothing. Raises ``KeyError``, ``TypeError`` where it is something else."""
        if not record:
            return Guard(rules)
        losses = tuple(float(loss) for loss in record["losses"][-rules.window :])
        return Guard(rules, losses, int(record["skipped"]), int(record["rollbacks"]))

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON holds it: exactly."""
        return {"losses": list(self.losses), "skipped": self.skipped, "rollbacks": self.rollbacks}

    @property
    def limit(self) -> float:
        """The greatest loss that is no leap: mean + spike · standard deviation, infinite before the window is full."""
        count = len(self.losses)
        if self.rules.spike is None or count < self.rules.window:
            return math.inf
        mean = math.fsum(self.losses) / count
        return mean + self.rules.spike * math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.losses) / count)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on a step of this loss, a mean over the global batch, and norm of the averaged gradient."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return Verdict.APPLY if loss <= self.limit else Verdict.DIVERGED
        return Verdict.SKIP if self.skipped < self.rules.skip_nonfinite else Verdict.DIVERGED

    def admits(self, loss: float, grad_norm: float) -> bool:
        """Whether the update of such a step is to be made."""
        return self.judge(loss, grad_norm) is Verdict.APPLY

    def applied(self, loss: float) -> Guard:
        """The guard after an update."""
        return dataclasses.replace(self, losses=(*self.losses, loss)[-self.rules.window :], skipped=0)

    def passed_over(self) -> Guard:
        """The guard after a step was skipped."""
        return dataclasses.replace(self, skipped=self.skipped + 1)

    def gone_back(self, record: Mapping[str, Any]) -> Guard:
        """The guard after a rollback to a checkpoint of which ``record`` is the guard: rollbacks are not forgotten."""
        return dataclasses.replace(Guard.from_dict(self.rules, record), skipped=0, rollbacks=self.rollbacks + 1)
