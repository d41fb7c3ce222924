"""An HTTP proxy before an S3 server that breaks some of the answers, as networks and busy servers do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests.s3_rig import signed_get

ERRORS = {"503": "SlowDown", "500": "InternalError", "404": "NoSuchKey"}
RESETS = ("reset_before", "refuse")
BODY_KINDS = ("reset_mid", "stall", "short", "flip")
ALL_KINDS = (*ERRORS, *RESETS, "wrong_range", *BODY_KINDS)
"""Faults of one request each; the next try is drawn anew.

503, 500, 404: an error of S3's. reset_before: RST, no answer. refuse: that, and no new connections for refuse_s.
wrong_range: 200 and the whole object. reset_mid: RST within the body. stall: silence of stall_s within the body, then
the end. short: a well-formed answer of fewer bytes. flip: one byte changed.
"""
CHUNK = 1 << 18
_OBJECT = re.compile(r"/[^/?]+/[^?]+(\?((x-id|versionId|partNumber|response-[^=]+|X-Amz-[^=]+)=[^&]*&?)*)?$")


class Head(NamedTuple):
    raw: bytes
    words: list[str]
    fields: dict[str, str]
    path: str
    length: int

    @property
    def gets_object(self) -> bool:
        return self.words[0] == "GET" and _OBJECT.match(self.words[1]) is not None


async def _read_head(reader: StreamReader) -> Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").strip().split("\r\n")
    words, pairs = first.split(" "), (line.partition(":") for line in lines)
    fields = {name.lower(): value.strip() for name, _, value in pairs}
    return Head(raw, words, fields, words[1].partition("?")[0], int(fields.get("content-length", 0)))


def _reset(writer: StreamWriter) -> None:
    """Close with RST."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _error(status: str) -> bytes:
    body = f"<Error><Code>{ERRORS[status]}</Code></Error>"
    head = f"HTTP/1.1 {status} {ERRORS[status]}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


def _shortened(raw: bytes, length: int) -> bytes:
    raw = re.sub(rb"(?i)(\r\ncontent-length: *)\d+", rb"\g<1>%d" % length, raw)
    ends = rb"(?i)(\r\ncontent-range: *bytes *(\d+)-)\d+"
    return re.sub(ends, lambda found: found[1] + b"%d" % (int(found[2]) + length - 1), raw)


@dataclass
class FaultProxy:
    """Listens on loopback and passes requests on unchanged; faults hit GETs of objects only.

    rate: the share of these GETs that is hit; may be set at any time. only: which paths ("/bucket/key") are hit.
    counts: faults so far, by kind. requests: GETs of objects so far, faulty or not; bytes: of their bodies.
    """

    upstream_port: int
    seed: int = 0
    rate: float = 0.05
    kinds: Sequence[str] = ALL_KINDS
    stall_s: float = 20
    refuse_s: float = 0.3
    only: Callable[[str], bool] = lambda path: True
    counts: Counter[str] = field(default_factory=Counter, init=False)
    requests: int = field(default=0, init=False)
    bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - set(ALL_KINDS):
            raise ValueError(f"kinds {sorted(unknown)}: not among {ALL_KINDS}")
        self._random, self._down = random.Random(self.seed), False
        self._listener: asyncio.Server | None = None

    def __enter__(self) -> FaultProxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self._reserved = socket.socket()  # nobody else gets the port while the listener is closed
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.port = self._reserved.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        """End all connections and the thread."""
        if self._loop.is_closed():
            return
        self._call(self._end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved.close()

    @property
    def down(self) -> bool:
        """Whether the server is away: no connection is left, new ones are refused."""
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        self._call(self._end_all() if value else self._listen())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self) -> None:
        if not self._down and (self._listener is None or not self._listener.is_serving()):
            self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, start_serving=False)
            await self._listener.start_serving()

    async def _end_all(self) -> None:
        if self._listener is not None:
            self._listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    async def _copy(self, reader: StreamReader, writer: StreamWriter, count: int, *, is_data: bool) -> None:
        while count:
            data = await reader.read(min(count, CHUNK))
            if not data:
                raise EOFError
            count -= len(data)
            self.bytes += len(data) if is_data else 0
            writer.write(data)
            await writer.drain()

    async def _copy_body(self, reader: StreamReader, writer: StreamWriter, head: Head, *, is_data: bool) -> None:
        if "chunked" not in head.fields.get("transfer-encoding", "").lower():
            return await self._copy(reader, writer, head.length, is_data=is_data)
        size = 1
        while size:
            line = await reader.readuntil(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            writer.write(line)
            await self._copy(reader, writer, size + 2, is_data=False)

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            _reset(writer)

    def _draw(self, head: Head) -> str | None:
        """The fault of a request, if it is to have one."""
        self.requests += head.gets_object
        if not head.gets_object or not self.only(unquote(head.path)) or self._random.random() >= self.rate:
            return None
        fault = self._random.choice(self.kinds)
        return None if fault == "wrong_range" and "range" not in head.fields else fault

    async def _exchange(self, reader: StreamReader, writer: StreamWriter) -> bool:
        """One request and its answer. Returns whether the connection can take another."""
        head = await _read_head(reader)
        fault = self._draw(head)
        if fault in ERRORS:
            self.counts[fault] += 1
            writer.write(_error(fault))
            return True
        if fault in RESETS:
            self.counts[fault] += 1
            _reset(writer)
            if fault == "refuse" and self._listener is not None:
                self._listener.close()
                await asyncio.sleep(self.refuse_s)
                await self._listen()
            return False
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=4 * CHUNK)
        up_writer.write(signed_get(head.path, self.upstream_port) if fault == "wrong_range" else head.raw)
        sending = asyncio.create_task(self._copy_body(reader, up_writer, head, is_data=False))
        sending.add_done_callback(lambda task: None if task.cancelled() or not task.exception() else _reset(up_writer))
        try:
            goes_on = await self._answer(head, fault, up_reader, writer)
            await asyncio.wait({sending}, timeout=0.1)
            return goes_on and sending.done()
        finally:
            sending.cancel()
            up_writer.transport.abort()

    async def _answer(self, head: Head, fault: str | None, reader: StreamReader, writer: StreamWriter) -> bool:
        answer = await _read_head(reader)
        while answer.words[1].startswith("1"):
            writer.write(answer.raw)
            answer = await _read_head(reader)
        if fault and answer.words[1] in ("200", "206") and answer.length > 1:
            self.counts[fault] += 1
            if fault != "wrong_range":
                return await self._spoil(fault, answer, reader, writer)
        writer.write(answer.raw)
        if head.words[0] != "HEAD" and answer.words[1] != "304":
            await self._copy_body(reader, writer, answer, is_data=head.gets_object)
        return "close" not in (head.fields.get("connection"), answer.fields.get("connection"))

    async def _spoil(self, fault: str, answer: Head, reader: StreamReader, writer: StreamWriter) -> bool:
        part = self._random.randrange(1, answer.length)
        writer.write(_shortened(answer.raw, part) if fault == "short" else answer.raw)
        await self._copy(reader, writer, part, is_data=True)
        if fault == "flip":
            byte = await reader.readexactly(1)
            self.bytes += 1
            writer.write(bytes([byte[0] ^ self._random.randrange(1, 256)]))
            await self._copy(reader, writer, answer.length - part - 1, is_data=True)
        elif fault == "stall":
            await asyncio.sleep(self.stall_s)
        elif fault == "reset_mid":
            await asyncio.sleep(0.02)
            _reset(writer)
        return fault in ("short", "flip")
