"""Signals that ask a job to stop, heard at places where nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_asked = threading.Event()
_on_check: Callable[[], None] = lambda: None  # noqa: E731 - a default


def tell(on_check: Callable[[], None]) -> None:
    """Have something called at every ``check``: whoever comes by there is not stuck."""
    global _on_check
    _on_check = on_check


@contextlib.contextmanager
def gently() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM wait for the next ``check``; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if _asked.is_set():
            raise KeyboardInterrupt
        _asked.set()

    _asked.clear()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raises ``KeyboardInterrupt`` where the job was asked to stop."""
    _on_check()
    if _asked.is_set():
        raise KeyboardInterrupt
