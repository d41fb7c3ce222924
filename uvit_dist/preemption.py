"""A signal becomes a flag; the training loop tells all ranks at the step boundary, saves and stops."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """Raised by SIGINT, SIGTERM or SIGUSR2, or by the supervisor's word. Nothing else happens inside the signal.

    Made in the main thread, before anything slow: until then SIGUSR2 would end the process.
    """

    def __init__(self) -> None:
        self.raised = False
        for number in SIGNALS:
            signal.signal(number, self._raise)

    def raise_now(self) -> None:
        """Raise it, from any thread."""
        self.raised = True

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
