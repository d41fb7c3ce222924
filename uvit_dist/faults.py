"""Faults on demand at named points, so that tests reach every moment of a save.

UVIT_FAULT="sigkill@rank1,save:after_manifest", or several, apart by ";". ACTION@rankN,POINT or ACTION@all,POINT, with
#K for the K-th time that the point is reached (by default the first). Actions: sigkill; sigterm; nospace, the error of
a full disk. Without the variable nothing happens.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections import Counter
from functools import cache

from uvit_dist.errors import ConfigError

VARIABLE = "UVIT_FAULT"
_FAULT = re.compile(r"(sigkill|sigterm|nospace)@(?:rank(\d+)|all),([a-z_]+:[a-z_]+)(?:#(\d+))?")
_reached: Counter[str] = Counter()


@cache
def _faults(text: str) -> tuple[tuple[str, int | None, str, int], ...]:
    """(action, rank or all, point, which time) of each fault."""
    found = []
    for part in filter(None, text.split(";")):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"{VARIABLE}={part}: not ACTION@rankN,POINT, as sigkill@rank1,save:voted; correct or unset it"
            )
        action, rank, point, time = match.groups()
        found.append((action, None if rank is None else int(rank), point, int(time or 1)))
    return tuple(found)


def point(name: str) -> None:
    """A point that a fault may be asked for. Raises ``OSError`` where that is a full disk, ``ConfigError``."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    _reached[name] += 1
    for action, rank, where, time in _faults(text):
        if where == name and time == _reached[name] and rank in (None, int(os.environ.get("RANK", "0"))):
            if action == "nospace":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            os.kill(os.getpid(), signal.SIGKILL if action == "sigkill" else signal.SIGTERM)
