"""An S3 server behind an emulated link: a first byte that takes its time, a limit for each connection and one for all.

Serves HEAD and ranged GET of ``/BUCKET/KEY``, without credentials, from ROOT/KEY whatever the bucket. Of the GETs of
bucket "faulty", one in twenty is answered with 503, breaks off in the middle, or is short and says that it is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from urllib.parse import unquote, urlsplit

FIRST_BYTE_S, CONNECTION_BYTES_S, LINK_BYTES_S = 0.050, 80e6, 400e6
FAULTS, FAULT_SHARE = ("503", "reset", "short"), 0.05
CHUNK = 1 << 18
BURST_S = 0.01
"""How late a sender may be and still catch up: timers are not exact."""


class _Limit:
    """A rate that several threads share; bytes are promised in the order they are asked for."""

    def __init__(self, bytes_s: float) -> None:
        self._bytes_s, self._next, self._lock = bytes_s, 0.0, threading.Lock()

    def due(self, count: int) -> float:
        """When so many more bytes may have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() - BURST_S) + count / self._bytes_s
            return self._next


class _Link:
    """What all connections share: the limit, the faults, the counts."""

    def __init__(self, root: Path) -> None:
        self.root, self.limit, self.lock = root, _Limit(LINK_BYTES_S), threading.Lock()
        self._draw, self._kinds = random.Random(0), cycle(FAULTS)
        self.counts = dict.fromkeys(("gets", "heads", "bytes", *FAULTS), 0)

    def count(self, **amounts: int) -> None:
        """Add to some of the counts."""
        with self.lock:
            for name, amount in amounts.items():
                self.counts[name] += amount

    def fault(self, bucket: str) -> str:
        """What goes wrong with this GET, "" if nothing."""
        with self.lock:
            kind = next(self._kinds) if bucket == "faulty" and self._draw.random() < FAULT_SHARE else ""
        if kind:
            self.count(**{kind: 1})
        return kind


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    link: _Link

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        """Size of an object."""
        self.link.count(heads=1)
        self._answer(with_body=False)

    def do_GET(self) -> None:
        """An object, or a range of one; ``/counts``: what was served so far."""
        if self.path == "/counts":
            body = json.dumps(self.link.counts).encode()
            self._head(200, len(body))
            self.wfile.write(body)
            return
        self.link.count(gets=1)
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        time.sleep(FIRST_BYTE_S)
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        fault = self.link.fault(bucket) if with_body else ""
        path = self.link.root / key
        if fault == "503" or not path.is_file():
            self._head(503 if fault else 404, 0)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked else 0
        end = min(int(asked[2]) + 1 if asked and asked[2] else size, size)
        if begin >= end:
            self._head(416, 0)
            return
        stop = begin + (end - begin) // 2 if fault else end
        fields = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if asked else {}
        fields |= {"ETag": f'"{size:x}"', "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
        self._head(206 if asked else 200, (stop if fault == "short" else end) - begin, **fields)
        if with_body:
            self._send(path, begin, stop)
        if fault == "reset":
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _head(self, status: int, length: int, **fields: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Accept-Ranges": "bytes", **fields}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: Path, begin: int, end: int) -> None:
        own = _Limit(CONNECTION_BYTES_S)
        with open(path, "rb") as file, contextlib.suppress(ConnectionError):
            while begin < end:
                count = min(CHUNK, end - begin)
                time.sleep(max(0.0, max(own.due(count), self.link.limit.due(count)) - time.monotonic()))
                stop = begin + count
                while begin < stop:
                    begin += os.sendfile(self.connection.fileno(), file.fileno(), begin, stop - begin)
                self.link.count(bytes=count)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may leave when they like."""


@contextlib.contextmanager
def shaped_link(root: Path) -> Iterator[str]:
    """The URL of a server of its own process."""
    command = [sys.executable, "-m", "benchmarks.shaped_link", "--root", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def counts(url: str) -> dict[str, int]:
    """What the server of this URL has served so far."""
    with urllib.request.urlopen(f"{url}/counts") as answer:
        return json.load(answer)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of the objects")
    _Handler.link = _Link(parser.parse_args().root)
    server = _Server(("127.0.0.1", 0), _Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
