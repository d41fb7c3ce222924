"""A signal becomes a flag; the training loop tells all ranks at the step boundary, saves and stops."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """Raised by SIGINT, SIGTERM or SIGUSR2. Nothing else happens inside the signal."""

    def __init__(self) -> None:
        self.raised = False
        for number in SIGNALS:
            signal.signal(number, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
