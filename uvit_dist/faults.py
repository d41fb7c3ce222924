"""Faults on demand at named points, so that tests reach every moment of a save, and of a run.

UVIT_FAULT="sigkill@rank1,save:after_manifest", or several, apart by ";". ACTION@rankN,POINT or ACTION@all,POINT, with
#K for the K-th time that the point is reached (by default the first), #* for every time, and /A for the A-th attempt
of a supervised job alone. Actions: sigkill; sigterm; sigstop; nospace, the error of a full disk; raise, an error of
the program; hang, for ever; sleepS, for S seconds; flip, of a bit, where the point has one to flip. Points: save:…;
progress:PHASE (``watchdog.progress``); step:forward, of a micro-batch; to flip, step:weights, gradient:silent and
gradient:loud (``attribution``, ``replay``).
Without the variable nothing happens.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from functools import cache

from uvit_dist.errors import ConfigError

VARIABLE = "UVIT_FAULT"
ATTEMPT_VARIABLE = "UVIT_DIST_ATTEMPT"
"""Which attempt of its job this is, from its supervisor."""
SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}
_FAULT = re.compile(
    r"(sigkill|sigterm|sigstop|nospace|raise|hang|flip|sleep[\d.]+)@(?:rank(\d+)|all),([a-z_]+:[a-z_]+)"
    r"(?:#(\d+|\*))?(?:/(\d+))?"
)
_reached: Counter[str] = Counter()


@cache
def _faults(text: str) -> tuple[tuple[str, int | None, str, int | None, int | None], ...]:
    """(action, rank or all, point, which time or every, attempt or any) of each fault."""
    found = []
    for part in filter(None, text.split(";")):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"{VARIABLE}={part}: not ACTION@rankN,POINT, as sigkill@rank1,save:voted; correct or unset it"
            )
        action, rank, point, nth, attempt = match.groups()
        times = None if nth == "*" else int(nth or 1)
        found.append((action, _number(rank), point, times, _number(attempt)))
    return tuple(found)


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def point(name: str) -> bool:
    """A point that a fault may be asked for. Returns whether a bit is to be flipped here.

    Raises ``OSError`` where that is a full disk, ``RuntimeError`` where it is an error of the program, ``ConfigError``.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    _reached[name] += 1
    rank, attempt = int(os.environ.get("RANK", "0")), _number(os.environ.get(ATTEMPT_VARIABLE))
    flip = False
    for action, on, where, nth, during in _faults(text):
        if where == name and nth in (None, _reached[name]) and on in (None, rank) and during in (None, attempt):
            flip = flip or action == "flip"
            _do(action, name)
    return flip


def _do(action: str, name: str) -> None:
    if action == "flip":
        return
    if action == "nospace":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    if action == "raise":
        raise RuntimeError(f"{VARIABLE}: asked for at {name}")
    if action == "hang":
        while True:
            time.sleep(60)
    if action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep")))
    else:
        os.kill(os.getpid(), SIGNALS[action])
