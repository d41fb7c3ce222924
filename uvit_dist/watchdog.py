"""A rank's end of its heartbeats. Progress is noted by the training thread and told by another, once a second.

Without a supervisor (UVIT_DIST_SUPERVISOR=HOST:PORT:TOKEN) nothing happens, at the cost of an assignment for each
``progress``. With one, the connection also brings its words: stop, show all stacks, end at once. A rank that the
supervisor has not answered for its fencing time ends itself: another attempt may have begun. ``beats`` has the lines.

SIGUSR1 shows the stacks of all threads in the rank's log, also while the interpreter is stuck: ``faulthandler``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from uvit_dist import faults
from uvit_dist.errors import HANG_EXIT_CODE, ConfigError

VARIABLE = "UVIT_DIST_SUPERVISOR"
JOINING, PREPARING, FIRST_STEP, COPYING = "joining", "preparing", "first step", "copying"
"""Phases with a bound of their own, in ``verdicts``: those of the start, and one that is bounded by its requests."""
WORKING = "working"
"""The phase of jobs that do units of work; their step is the units that this rank has finished."""
BEAT_S = 1.0
CONNECT_S = 10.0
LAST_WORDS_S = 2.0
FENCE_S = 60.0
"""Fencing time until the supervisor has told its own."""

_count, _phase, _step = 0, "starting", None
_save_s: float | None = None
_client: _Client | None = None


def progress(phase: str, step: int | None = None) -> None:
    """Note that something was achieved. phase: what comes now, as "reading"; step: updates made."""
    global _count, _phase, _step
    _count, _phase, _step = _count + 1, phase, _step if step is None else step
    faults.point(f"progress:{phase.replace(' ', '_')}")


def saved_in(seconds: float) -> None:
    """Note how long a save took, from its beginning to its commit: the warning before a time limit follows it."""
    global _save_s
    _save_s = seconds


def register_stacks(descriptor: int) -> None:
    """Have SIGUSR1 write the stacks of all threads there: a file that stays open."""
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


def start(rank: int, log_descriptor: int, on_stop: Callable[[], None]) -> None:
    """Begin to send beats, if there is a supervisor. on_stop: called in the watchdog's thread when it says stop.

    log_descriptor: where stacks are shown. Raises ``ConfigError`` where the variable is not as it should be.
    """
    global _client
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    parts = text.rsplit(":", 2)
    if len(parts) != 3 or not parts[1].isdigit():
        raise ConfigError(f"{VARIABLE}={text}: not HOST:PORT:TOKEN; unset it, unless a supervisor starts the ranks")
    _client = _Client(rank, (parts[0], int(parts[1])), parts[2], log_descriptor, on_stop)


def end(code: int, message: str, mistake: bool = False, blamed: Sequence[int] = ()) -> None:
    """Tell the supervisor how this rank ends, and send no more beats. blamed: ranks whose hosts are at fault."""
    if _client is not None:
        _client.end({"end": code, "message": message, "mistake": mistake, "blamed": list(blamed)})


class _Client(threading.Thread):
    """Sends beats and hears the supervisor, until the process ends."""

    def __init__(
        self, rank: int, address: tuple[str, int], token: str, descriptor: int, on_stop: Callable[[], None]
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._hello = {"hello": token, "rank": rank, "host": host_name(), "pid": os.getpid()}
        self._address, self._descriptor, self._on_stop = address, descriptor, on_stop
        self._socket: socket.socket | None = None
        self._received, self._beat = b"", 0
        self._heard_at, self._fence_s = time.monotonic(), FENCE_S
        self._lock, self._ended = threading.Lock(), False
        self.start()

    def run(self) -> None:
        """Beat, listen, connect anew, or end the process where nobody answers."""
        while not self._ended:
            began = time.monotonic()
            try:
                with self._lock:
                    if self._ended:
                        return
                    if self._socket is None:
                        self._connect()
                    self._send_beat()
                while (left := began + BEAT_S - time.monotonic()) > 0 and not self._ended:
                    self._listen(left)
            except OSError:
                self._close()
                time.sleep(max(0.0, began + BEAT_S - time.monotonic()))
            if time.monotonic() - self._heard_at > self._fence_s and not self._ended:
                self._show_stacks(f"no supervisor has answered for {self._fence_s:g} s: this rank ends itself")
                os._exit(HANG_EXIT_CODE)

    def end(self, message: dict[str, Any]) -> None:
        """Say the last words; wait for nobody."""
        if not self._lock.acquire(timeout=2 * CONNECT_S):
            return
        self._ended = True
        with contextlib.suppress(OSError):
            if self._socket is None:
                self._connect()
            connection = self._socket
            assert connection is not None
            self._send_beat()
            self._send(message)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(LAST_WORDS_S)
            while connection.recv(1 << 16):  # until the supervisor has read it and hung up: the process ends now
                pass

    def _connect(self) -> None:
        self._socket = socket.create_connection(self._address, timeout=CONNECT_S)
        self._received = b""
        self._send(self._hello)

    def _close(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _send_beat(self) -> None:
        self._beat += 1
        self._send({"beat": self._beat, "count": _count, "phase": _phase, "step": _step, "save_s": _save_s})

    def _listen(self, timeout_s: float) -> None:
        """Hear what has come, for so long at most. Raises ``OSError`` where the connection is gone."""
        connection = self._socket
        assert connection is not None
        connection.settimeout(timeout_s)
        try:
            data = connection.recv(1 << 16)
        except TimeoutError:
            return
        finally:
            connection.settimeout(CONNECT_S)
        if not data:
            raise ConnectionResetError("the supervisor is gone")
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))

    def _hear(self, message: dict[str, Any]) -> None:
        if "heard" in message:
            self._heard_at, self._fence_s = time.monotonic(), float(message["fence_s"])
        if "stop" in message:
            self._on_stop()
        if "stacks" in message:
            self._show_stacks("the stacks of all threads, as the supervisor asked")
            with self._lock:
                self._send({"dumped": True})
        if "die" in message:
            os._exit(HANG_EXIT_CODE)

    def _show_stacks(self, why: str) -> None:
        """No logging here: what is stuck may hold its lock."""
        os.write(self._descriptor, f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._hello['rank']}: {why}\n".encode())
        faulthandler.dump_traceback(file=self._descriptor, all_threads=True)


def host_name() -> str:
    """This machine as SLURM calls it, or as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
