"""Probes in processes of their own: what they say, line by line, until they end or their time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uvit_dist.doctor.finding import Finding, problem, warning
from uvit_dist.errors import UnavailableError

LAST_WORDS = 3
"""Lines of a child's stderr that are told where it fails."""


class Child:
    """A process that writes JSON lines: {"begins": SUBJECT} before each probe, then findings, or facts by name."""

    def __init__(
        self, section: str, arguments: Sequence[str], stdin: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.section, self.findings, self.facts = section, list[Finding](), dict[str, Any]()
        self._at, self._errors, self._began = "start", "", time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uvit_dist.doctor.probes", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        _started.append(self)
        assert self._process.stdin is not None
        self._threads = [in_background(self._read_lines), in_background(self._read_errors)]
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(stdin)

    def wait(self, limit_s: float) -> list[Finding]:
        """What it found, and one finding more where it did not end well within the limit, seconds from its start."""
        try:
            code = self._process.wait(max(0.0, self._began + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            self._join()
            told = f"no answer within {limit_s:g} s"
            remedy = "try it alone to see where it hangs, or give it longer: --limit SECONDS"
            return [*self.findings, problem(self.section, self._at, told, remedy, UnavailableError.exit_code)]
        self._join()
        if code:
            why = " ".join(line.strip() for line in self._errors.strip().splitlines()[-LAST_WORDS:])
            told = f"the check itself failed ({_of(code)}): {why or 'no message'}"
            return [
                *self.findings,
                problem(self.section, self._at, told, "mend what this message names, and try again"),
            ]
        return self.findings

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(1.0)  # longer only where a process of its own holds the pipe

    def end(self) -> None:
        """End it and what it started, if it still runs."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # not longer: a hung driver may hold it

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if "begins" in record:
                        self._at = record["begins"]
                    elif "level" in record:
                        self.findings.append(Finding(**record))
                    else:
                        self.facts |= record

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._errors = (self._errors + line)[-4000:]


_started: list[Child] = []


def end_all() -> None:
    """End every child that still runs."""
    for child in _started:
        child.end()


def _of(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def in_background(work: Callable[[], object]) -> threading.Thread:
    """Start ``work()`` in a thread that keeps no process alive."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def limited(section: str, subject: str, work: Callable[[], list[Finding]], limit_s: float) -> list[Finding]:
    """What ``work()`` finds in this process, or a warning where it takes longer than the limit, seconds."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(work())
        except Exception as error:  # noqa: BLE001 - one check that fails must not hide the others
            told = f"the check itself failed ({type(error).__name__}: {error})"
            found.append(problem(section, subject, told, "mend what this message names, and try again"))

    thread = in_background(run)
    thread.join(limit_s)
    if thread.is_alive():
        return [
            warning(section, subject, f"no answer within {limit_s:g} s", "see whether a file system or server hangs")
        ]
    return found
