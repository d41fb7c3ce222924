"""The supervisor's end of the ranks' heartbeats: what each rank last said, and words to all of them.

A rank connects, says ``hello`` with the round's token, then sends a line of JSON each second, which is answered: a rank
that gets no answers knows that it is alone. The lines:

    rank → supervisor   {"hello": token, "rank", "host", "pid"}   {"beat", "count", "phase", "step", "save_s"}
                        {"end": exit code, "message", "mistake", "blamed": ranks}   {"dumped": true}
    supervisor → rank   {"heard": beat, "fence_s"}   {"stop": true}   {"stacks": true}   {"die": true}
"""

from __future__ import annotations

import contextlib
import json
import resource
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

LONGEST_LINE, MOST_FILES = 1 << 16, 1 << 16
HELLO_S = 30.0
"""Seconds that a connection has to say who it is."""


@dataclass
class RankView:
    """What is known of a rank. Times are monotonic seconds; count grows with every progress that the rank reports.

    end: exit code, what it said, and whether that is a user's mistake; blamed: the ranks that it says are at fault;
    gone_at: its connection ended without a word.
    """

    rank: int
    host: str = ""
    pid: int = 0
    connected: bool = False
    heard_at: float = 0.0
    progressed_at: float = 0.0
    count: int = -1
    phase: str = ""
    step: int | None = None
    save_s: float | None = None
    end: tuple[int, str, bool] | None = None
    blamed: tuple[int, ...] = ()
    ended_at: float | None = None
    gone_at: float | None = None
    dumped: bool = False


@dataclass(eq=False)
class _Peer:
    """A connection. rank: once it has said hello."""

    socket: socket.socket
    since: float
    rank: int | None = None
    received: bytes = b""
    unsent: bytes = field(default=b"")


class BeatServer:
    """Listens for the ranks of one round after another, in a thread of its own."""

    def __init__(self, address: str, fence_s: float) -> None:
        self._fence_s = fence_s
        self._listener = socket.create_server((address, 0), backlog=1024)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._lock = threading.Lock()
        self._token, self._stopping, self._views = "", False, dict[int, RankView]()
        self._peers: set[_Peer] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="beats", daemon=True)
        self._thread.start()

    def expect(self, token: str, world_size: int) -> None:
        """Forget the last round and wait for the ranks of the next."""
        with self._lock:
            for peer in list(self._peers):
                self._drop(peer)
            self._token, self._stopping = token, False
            self._views = {rank: RankView(rank) for rank in range(world_size)}

    def views(self) -> list[RankView]:
        """What is known of each rank, in order: copies."""
        with self._lock:
            return [replace(self._views[rank]) for rank in sorted(self._views)]

    def ask_to_stop(self) -> None:
        """Tell every rank to save and stop, also those that connect later."""
        with self._lock:
            self._stopping = True
        self.tell_all(stop=True)

    def tell_all(self, **message: Any) -> None:
        """Send a message to every rank that is connected."""
        with self._lock:
            for peer in list(self._peers):
                if peer.rank is not None:
                    self._send(peer, message)

    def close(self) -> None:
        """Stop listening and end all connections."""
        self._closing = True
        self._thread.join(5)
        with self._lock:
            for peer in list(self._peers):
                self._drop(peer)
        self._listener.close()
        self._selector.close()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closing:
            ready = self._selector.select(0.2)
            with self._lock:
                for key, _ in ready:
                    if key.data is None:
                        self._accept()
                    elif key.data in self._peers:
                        self._receive(key.data)
                now = time.monotonic()
                for peer in [peer for peer in self._peers if peer.rank is None and now - peer.since > HELLO_S]:
                    self._drop(peer)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer = _Peer(connection, time.monotonic())
            self._peers.add(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _receive(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            return
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            if peer in self._peers:
                self._hear(peer, line)
        if len(peer.received) > LONGEST_LINE:
            self._drop(peer)

    def _hear(self, peer: _Peer, line: bytes) -> None:
        try:
            message = json.loads(line)
            self._note(peer, message)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._drop(peer)  # whoever that is, no rank of ours

    def _note(self, peer: _Peer, message: dict[str, Any]) -> None:
        now = time.monotonic()
        if peer.rank is None:
            if message["hello"] != self._token or int(message["rank"]) not in self._views:
                raise ValueError("a rank of another round")
            peer.rank = int(message["rank"])
            view = self._views[peer.rank]
            view.host, view.pid = str(message["host"]), int(message["pid"])
            view.connected, view.gone_at, view.heard_at = True, None, now
            view.progressed_at = view.progressed_at or now
            if self._stopping:
                self._send(peer, {"stop": True})
            return
        view = self._views[peer.rank]
        view.heard_at = now
        if "beat" in message:
            if int(message["count"]) != view.count:
                view.count, view.progressed_at = int(message["count"]), now
            view.phase, view.step = str(message["phase"]), message["step"]
            view.save_s = message.get("save_s", view.save_s)
            self._send(peer, {"heard": message["beat"], "fence_s": self._fence_s})
        if "dumped" in message:
            view.dumped = True
        if "end" in message:
            view.end = (int(message["end"]), str(message["message"]), bool(message["mistake"]))
            view.blamed = tuple(int(rank) for rank in message.get("blamed", ()) if int(rank) in self._views)
            view.ended_at = now

    def _send(self, peer: _Peer, message: dict[str, Any]) -> None:
        peer.unsent += json.dumps(message).encode() + b"\n"
        try:
            peer.unsent = peer.unsent[peer.socket.send(peer.unsent) :]
        except BlockingIOError:
            if len(peer.unsent) > LONGEST_LINE:  # it reads no more; words of long ago are worth nothing
                peer.unsent = b""
        except OSError:
            self._drop(peer)

    def _drop(self, peer: _Peer) -> None:
        self._peers.discard(peer)
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(peer.socket)
        with contextlib.suppress(OSError):
            peer.socket.close()
        view = self._views.get(peer.rank) if peer.rank is not None else None
        if view is not None and not any(other.rank == peer.rank for other in self._peers):
            view.connected = False
            if view.end is None:
                view.gone_at = time.monotonic()


def alive(views: Sequence[RankView]) -> Iterator[RankView]:
    """The ranks that have neither ended nor gone."""
    return (view for view in views if view.end is None and view.gone_at is None)


def serve(name: str, hosts: Sequence[str], fence_s: float) -> tuple[str, BeatServer]:
    """A server for the ranks' beats, and the name by which they reach it.

    name: of this host, one of hosts. It listens on the address of that name alone; on all where that is loopback, while
    other hosts have addresses in a network.
    """
    found = address(name)
    if found is None:  # SLURM's names of nodes need not be those of machines
        name, found = socket.gethostname(), address(socket.gethostname())
    own = found or ""
    if own.startswith("127.") and not all((address(host) or own).startswith("127.") for host in hosts):
        own = ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))  # a connection for each rank
    try:
        return name, BeatServer(own, fence_s)
    except OSError:
        return name, BeatServer("", fence_s)


def address(host: str) -> str | None:
    """What a host's name is resolved to, or none."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None
