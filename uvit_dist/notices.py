"""What SLURM tells a batch process: warnings, cancellations, and the time limit."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

from uvit_dist import slurm
from uvit_dist.attempts import this_job
from uvit_dist.errors import UnavailableError

ASK_S = 10.0
"""Seconds between questions for the time limit, which may be moved; more often once a stop was asked for."""
LAST_S = 10.0
"""Seconds before the limit at which ranks that have not saved are ended, so that the requeue is still ours."""
ENDED_S = 120.0
"""Seconds after a SIGTERM at which they are, if this process still lives."""
log = logging.getLogger("uvit_dist.supervisor")


class Notices:
    """Handlers of SIGUSR2 and SIGTERM that note the time, in place of submitit's, which would requeue by themselves.

    reason: why the ranks are to save and stop, once they are. cancelled: a user has ended the job for good.
    """

    def __init__(self) -> None:
        self._warned_at: float | None = None
        self._ended_at: float | None = None
        self.reason: str | None = None
        self.cancelled = False
        self._job, self._lead_s = this_job() or "", 0.0
        self._limit: float | None = None
        self._ask_at, self._ended_seen = float("inf"), False
        signal.signal(signal.SIGUSR2, self._warn)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGCONT, self._ignore)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self._warned_at = self._warned_at or time.monotonic()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ended_at = self._ended_at or time.monotonic()

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        """SLURM sends it with each of the others."""

    def know_the_limit(self, lead_s: float) -> None:
        """Heed the time limit, whether SLURM warns of it or not. lead_s: seconds before it that the ranks need."""
        self._lead_s, self._ask_at = lead_s, 0.0

    def look(self) -> tuple[bool, bool]:
        """Whether the ranks are to save and stop, and whether there is no time left for that."""
        now = time.monotonic()
        if now >= self._ask_at:
            self._limit = slurm.end_time(self._job) or self._limit
            self._ask_at = now + (ASK_S if self.reason is None else LAST_S / 3)
        left = float("inf") if self._limit is None else self._limit - time.time()
        before = self.reason
        if self._ended_at is not None and not self._ended_seen:
            self._ended_seen = True
            self.cancelled = self._is_cancelled(left)
            self.reason = "cancelled" if self.cancelled else self.reason or "SIGTERM"
        elif self.reason is None and self._warned_at is not None:
            self.reason = "SLURM's warning: preemption, the time limit, or a user's signal"
        elif self.reason is None and left < self._lead_s:
            self.reason = "the time limit is near"
        if self.reason != before:
            self._ask_at = 0.0
            log.info("%s: the ranks save and stop", self.reason)
        over = self._ended_at is not None and now - self._ended_at > ENDED_S
        return self.reason is not None, left < LAST_S or over

    def _is_cancelled(self, left_s: float) -> bool:
        """Whether a SIGTERM was a cancellation: as SLURM says, or, if it does not answer, where nothing foretold it."""
        if left_s < LAST_S:
            return False
        try:
            return slurm.fate(self._job, 5.0) == "cancelled"
        except UnavailableError:
            return self._warned_at is None
