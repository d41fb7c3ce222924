"""Units of work: shared among workers by leases; results are files, whole or not there, merged in order."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from uvit_dist import stopping, storage
from uvit_dist.errors import MissingInputError, UserError

log = logging.getLogger(__name__)
Result = dict[str, NDArray[Any]]
T = TypeVar("T")
POLL_S = 2.0
"""Most seconds between looks at what is in other hands; the first of them, where they become rarer."""
WATCHED = 32
"""Units in other hands that a worker with nothing to do looks after at once. If every idle worker read every lease, the
file system would see the product of their numbers."""

MISSES = 4
"""Claims that may fail before another look at which units are free: a thousand workers that begin with one list of 200
free units would else ask for almost every one of them."""


class WorkDirectory:
    """Results of named units, in order, under one directory. A result is there whole or not at all.

    beside: what else makes a unit done: endings of files of its name.
    """

    def __init__(self, directory: str, units: Sequence[str], beside: Sequence[str] = ()) -> None:
        self.directory, self.units, self._endings = directory, units, (".npz", *beside)

    def path(self, unit: str, ending: str = ".npz") -> str:
        """Of a file of a unit."""
        return storage.join(self.directory, unit + ending)

    def missing(self, names: Collection[str] | None = None) -> list[str]:
        """The units that are still to do, in order. names: of the files here, listed just now, if they were."""
        names = storage.names_in(self.directory) if names is None else names
        return [unit for unit in self.units if any(unit + ending not in names for ending in self._endings)]

    def put(self, unit: str, result: Result) -> None:
        """Store a unit's arrays."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:  # as numpy.savez, but the bytes hold no time
            for name, array in result.items():
                data = io.BytesIO()
                np.lib.format.write_array(data, np.asarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue())
        storage.write_bytes(self.path(unit), out.getvalue())

    def results(self) -> Iterator[Result]:
        """All results, in order of the units."""
        for unit in self.units:
            with np.load(io.BytesIO(storage.read_bytes(self.path(unit))), allow_pickle=False) as archive:
                yield dict(archive)


class SharedWork(WorkDirectory):
    """Units that any number of workers do, on any machines, started and killed at any time; and what is made of all.

    Beside the results lie the leases of those under way. What a unit makes must not depend on who does it, or when.
    """

    def __init__(self, directory: str, units: Sequence[str], lease_s: float, beside: Sequence[str] = ()) -> None:
        super().__init__(directory, units, beside)
        self._leases, self._lease_s, self._waited_s = Leases(directory, lease_s), lease_s, 0.0

    def claim(self) -> str | None:
        """A unit to do, now this worker's; none where all are done or in other hands."""
        done = set[str]()
        while True:
            names = storage.names_in(self.directory)
            todo = [unit for unit in self.missing(names) if unit not in done]  # a network's listings may lag
            unit = next(self._leases.claims(todo, names), None)
            if unit is None:
                return None
            if not all(storage.exists(self.path(unit, ending)) for ending in self._endings):
                self._waited_s = 0.0
                return unit
            self._leases.release(unit)  # done between the listing and the claim: so may others be
            done.add(unit)

    def put(self, unit: str, result: Result) -> None:
        """Store a claimed unit's arrays, and with that its lease ends."""
        super().put(unit, result)
        self._leases.release(unit)

    def wait(self) -> None:
        """Some seconds, before another look at what is in other hands: the longer it takes, the more."""
        self._waited_s = min(max(POLL_S, 1.5 * self._waited_s), self._lease_s / 4)
        until = time.monotonic() + self._waited_s
        while (left := until - time.monotonic()) > 0:
            stopping.check()
            time.sleep(min(left, POLL_S))

    def once(self, name: str, found: Callable[[], T | None], make: Callable[[], T]) -> T:
        """What one worker makes for all. found: what was made, if it is there; make: it, durably.

        If the worker that makes it dies, another does. Raises what these do, and ``KeyboardInterrupt`` as
        ``stopping.check``.
        """
        self._waited_s = 0.0
        while (value := found()) is None:
            stopping.check()
            if not self._leases.claim(name, storage.names_in(self.directory)):
                self.wait()
                continue
            try:
                value = found()  # made between our look and our claim
                return make() if value is None else value
            finally:
                self._leases.release(name)
        return value

    def close(self) -> None:
        """Give back what this worker holds."""
        self._leases.close()


# -- leases ------------------------------------------------------------------------------------------------------------


def _this_process() -> dict[str, Any]:
    """What identifies this process among all machines, and lets others on its machine see whether it lives."""
    out: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    with contextlib.suppress(OSError):  # Linux
        out["machine"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        out["started"] = _start_time(os.getpid())
    return out


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks: a number that is given again has another. Raises ``OSError``."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def _died(holder: dict[str, Any], us: dict[str, Any]) -> bool:
    """Whether a process is of this machine and not there any more."""
    if "machine" not in us or holder.get("machine") != us["machine"]:
        return False
    try:
        return _start_time(int(holder["pid"])) != holder["started"]
    except OSError:
        return True


def _lease(unit: str, generation: int) -> str:
    return f"{unit}.lease-{generation}"


def newest_leases(names: Iterable[str]) -> dict[str, int]:
    """Unit → newest generation, of the leases among the names of files."""
    found: dict[str, int] = {}
    for name in names:
        unit, dot, generation = name.rpartition(".lease-")
        if dot and generation.isdigit():
            found[unit] = max(found.get(unit, 0), int(generation))
    return found


def holders(directory: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Unit → what its holder last told: ``host``, ``pid``, ``token`` (of the process), ``beat``, ``progress``."""
    out = {}
    for unit, generation in newest_leases(names).items():
        with contextlib.suppress(MissingInputError, ValueError):
            out[unit] = json.loads(storage.read_bytes(storage.join(directory, _lease(unit, generation))))
    return out


class Leases:
    """Which worker does which unit, told by files beside the output, without a server, and without comparing clocks.

    A lease is a file ``UNIT.lease-GENERATION`` that one of many creates; its holder rewrites it as a sign of life.
    Who has seen the newest one unchanged for ``lease_s`` seconds, or knows its holder to be dead, creates the next.
    A holder that was only slow then does what another does too: units must come out equal whoever does them.
    """

    def __init__(self, directory: str, lease_s: float) -> None:
        storage.make_directory(directory)
        self.directory, self.us = directory, _this_process()
        self._lease_s, self._beats = lease_s, 0
        self._held: dict[str, tuple[int, dict[str, Any]]] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._random = random.Random(self.us["token"])
        self._watching, self._watched_before, self._watch_until = list[str](), set[str](), 0.0
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="leases", daemon=True)
        self._thread.start()

    def claim(self, unit: str, names: Iterable[str]) -> bool:
        """Take a unit that nobody holds, or whose holder is silent or dead. names: the files here, listed just now."""
        return self._claim(unit, newest_leases(names).get(unit))

    def claims(self, todo: Sequence[str], names: Iterable[str]) -> Iterator[str]:
        """Of the units ``todo`` those that can be taken, each taken as it is asked for.

        First what nobody holds, in any order: workers that began at the same place would meet at each unit. Then what
        is in other hands, a few units at a time, each looked at for as long as it takes to find its holder silent.
        """
        held = newest_leases(names)
        free = [unit for unit in todo if unit not in held]
        self._random.shuffle(free)
        missed = 0
        while free:
            if self._claim(unit := free.pop(), None):
                yield unit
            elif (missed := missed + 1) % MISSES == 0:  # many claim at once: what have they left?
                taken = newest_leases(storage.names_in(self.directory))
                free = [unit for unit in free if unit not in taken]
        for unit in self._watched([unit for unit in todo if unit in held]):
            if self._claim(unit, held[unit]):
                yield unit

    def _watched(self, others: list[str]) -> list[str]:
        """The units in other hands that are looked at now; others when these have had their time."""
        others.sort(key=lambda unit: xxhash.xxh3_64_intdigest(f"{self.us['token']} {unit}".encode()))  # each its own
        now = time.monotonic()
        if now > self._watch_until:
            self._watching, self._watch_until = [], now + 1.5 * self._lease_s
        here = set(others)
        self._watching = [unit for unit in self._watching if unit in here]
        fresh = [unit for unit in others if unit not in self._watched_before]
        if not fresh and not self._watching:
            self._watched_before, fresh = set(), others
        more = fresh[: WATCHED - len(self._watching)]
        self._watching += more
        self._watched_before.update(more)
        return self._watching

    def _claim(self, unit: str, generation: int | None) -> bool:
        if unit in self._held or (generation is not None and not self._is_silent(unit, generation)):
            return False
        generation = 0 if generation is None else generation + 1
        if not storage.create(self._path(unit, generation), self._content({})):
            return False
        with self._lock:
            self._held[unit] = generation, {}
        return True

    def note(self, unit: str, **progress: Any) -> None:
        """Tell how far a held unit is, from the next sign of life on."""
        with self._lock:
            if unit in self._held:
                self._held[unit] = self._held[unit][0], progress

    def release(self, unit: str) -> None:
        """Give a unit back: done, or for others to do. Older leases of it go too."""
        with self._writing, self._lock:
            generation, _ = self._held.pop(unit, (-1, {}))
        for number in range(generation, -1, -1):
            storage.remove(self._path(unit, number))

    def close(self) -> None:
        """Give back all that is held."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(UserError):
            for unit in list(self._held):
                self.release(unit)
            names = storage.sizes_in(self.directory)  # an interrupt may have come between a lease and its note
            for unit, told in holders(self.directory, names).items():
                if told.get("token") == self.us["token"]:
                    storage.remove(self._path(unit, newest_leases(names)[unit]))

    def _path(self, unit: str, generation: int) -> str:
        return storage.join(self.directory, _lease(unit, generation))

    def _content(self, progress: dict[str, Any]) -> bytes:
        return json.dumps({**self.us, "beat": self._beats, "progress": progress}).encode()

    def _is_silent(self, unit: str, generation: int) -> bool:
        path = self._path(unit, generation)
        try:
            content = storage.read_bytes(path)
        except MissingInputError:
            return False  # given back just now: the next listing tells
        with contextlib.suppress(ValueError):
            if _died(json.loads(content), self.us):
                return True
        before, since = self._seen.setdefault(path, (content, time.monotonic()))
        if before != content:
            self._seen[path] = content, time.monotonic()
            return False
        return time.monotonic() - since > self._lease_s

    def show_life(self) -> None:
        """Tell of all held units that their holder lives; a thread does it four times in ``lease_s``."""
        self._beats += 1
        for unit in list(self._held):
            with self._writing:
                with self._lock:
                    if unit not in self._held:
                        continue
                    generation, progress = self._held[unit]
                try:
                    storage.write_bytes(self._path(unit, generation), self._content(progress))
                except UserError as error:
                    log.warning("no sign of life for %s (%s): another worker may do it too", unit, error)

    def _live(self) -> None:
        while not self._end.wait(self._lease_s / 4):
            self.show_life()
