"""Copies of checkpoints to their second home, made beside the training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path

from uvit_dist import second_home

log = logging.getLogger(__name__)


class Copier:
    """Copies checkpoints to their second home in a thread of its own. What goes wrong is logged, never raised.

    last_error: of the last copy that failed, until one succeeds. choose: from the names committed at home, newest
    first, those to keep; asked after each copy; none: all.
    """

    def __init__(self, home: str, choose: Callable[[list[str]], Collection[str]] | None = None) -> None:
        self.home = home
        self.last_error: Exception | None = None
        self._choose = choose
        self._waiting: Path | None = None
        self._under_way: Path | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="second-home", daemon=True)
        self._thread.start()

    @property
    def copying(self) -> str | None:
        """The name of the checkpoint that is being copied: not to be deleted."""
        with self._changed:
            return None if self._under_way is None else self._under_way.name

    def submit(self, directory: Path) -> None:
        """Have a committed checkpoint copied when the copy under way is done, in place of one that waits still."""
        with self._changed:
            assert not self._closed
            self._drop(f"{directory.name} is newer")
            self._waiting = directory
            self._changed.notify_all()

    def close(self, wait: bool = True, timeout_s: float | None = None) -> bool:
        """End the thread. Returns whether it has ended. wait: for what was submitted, for timeout_s at most.

        Without, what waits is dropped, and the copy under way ends with the process; the next run's replaces it.
        """
        with self._changed:
            if not wait:
                self._drop("the run ends")
            self._closed = True
            self._changed.notify_all()
        if wait:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _drop(self, why: str) -> None:
        if self._waiting is not None:
            log.info("%s: not copied to %s: %s", self._waiting, self.home, why)
            self._waiting = None

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                directory, self._waiting = self._waiting, None
                self._under_way = directory
            if directory is None:
                return
            self._copy(directory)
            with self._changed:
                self._under_way = None

    def _copy(self, directory: Path) -> None:
        try:
            second_home.copy_out(directory, self.home)
            if self._choose is not None:
                committed = second_home.names_at(self.home)
                second_home.retain(self.home, {*self._choose(committed), directory.name})
            self.last_error = None
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            if not directory.exists():
                log.warning("%s: deleted here while it was copied to %s; dropped (%s)", directory, self.home, error)
                return
            self.last_error = error
            log.error("%s: copying it to %s, or deleting older ones there, failed: %s", directory, self.home, error)
