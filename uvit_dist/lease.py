"""Who runs a job of a run: one launcher or SLURM job at a time, told by ``RUN_DIR/launch/NAME/lease.json``.

A launcher takes the lease before it submits, and then writes the job's id into it. A job confirms it when it starts,
whichever way it came to start. A lease is broken only where the scheduler says that its job is gone: not by age, for
a job may wait in the queue, or be requeued, for days.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from uvit_dist import slurm, storage
from uvit_dist.errors import OutputError, UnavailableError

SUBMISSION_S = 600.0
"""Seconds after which a launcher that has not written its job's id is taken for dead."""
STARTED_EARLY_S = 60.0
"""Seconds that a job which started before its launcher has written its id waits for that."""
ASKED_S = 30.0
"""Seconds for which a scheduler that does not answer is asked again."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lease:
    """job_id: none while a launcher submits; host and pid: of who wrote it; since: unix seconds."""

    job_id: str | None
    host: str
    pid: int
    since: float

    def describe(self) -> str:
        """Who it is, for a message."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        who = f"a launcher (process {self.pid} on {self.host})" if self.job_id is None else f"SLURM job {self.job_id}"
        return f"{who}, since {since}"


def read(directory: str | Path) -> Lease | None:
    """The lease of a job's directory, or none."""
    try:
        return Lease(**json.loads(Path(directory, "lease.json").read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s/lease.json cannot be read (%s): taken for none", directory, error)
        return None


def gone(job_id: str) -> bool:
    """Whether the scheduler says that a job has ended for good. Raises ``UnavailableError``."""
    return slurm.is_gone(job_id, ASKED_S)


def acquire(directory: str | Path, job_id: str | None = None) -> None:
    """Take the lease, before a submission (no job id yet).

    Raises ``OutputError`` that names the holder where there is one.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        found = read(directory)
        if found is not None:
            _require_dead(directory, found)
        _write(directory, job_id)


def require_free(directory: str | Path) -> None:
    """Raises ``OutputError`` that names the holder where there is one; takes nothing."""
    found = read(directory)
    if found is not None:
        _require_dead(directory, found)


def confirm(directory: str | Path, job_id: str, predecessor_gone: Callable[[str], bool] = gone) -> None:
    """Make the lease that of ``job_id``: by the launcher after the submission, and by the job when it starts.

    predecessor_gone: says of the job that holds it whether that has ended for good.
    Raises ``OutputError`` where another holds it: the job must not run.
    """
    deadline = time.time() + STARTED_EARLY_S
    while True:
        with _alone(directory):
            found = read(directory)
            if found is None or found.job_id == job_id or _is_me(found) or _launcher_is_dead(found):
                return _write(directory, job_id)
            if found.job_id is not None:
                if predecessor_gone(found.job_id):
                    log.info("%s: job %s takes the lease over from job %s, which is gone",
                             directory, job_id, found.job_id)  # fmt: skip
                    return _write(directory, job_id)
                raise OutputError(_held(directory, found))
        if time.time() > deadline:
            raise OutputError(_held(directory, found))
        time.sleep(0.5)


def release(directory: str | Path, job_id: str | None) -> None:
    """Give the lease up, if it is that of ``job_id``, or of this launcher (none)."""
    with _alone(directory):
        found = read(directory)
        if found is not None and found.job_id == job_id and (job_id is not None or _is_me(found)):
            Path(directory, "lease.json").unlink(missing_ok=True)


def _write(directory: str | Path, job_id: str | None) -> None:
    lease = Lease(job_id, socket.gethostname(), os.getpid(), time.time())
    storage.write_bytes(str(Path(directory, "lease.json")), json.dumps(asdict(lease)).encode())


def _is_me(lease: Lease) -> bool:
    return lease.job_id is None and (lease.host, lease.pid) == (socket.gethostname(), os.getpid())


def _launcher_is_dead(lease: Lease) -> bool:
    """Whether it is a launcher's that will never write its job's id. Its job, if any, has to confirm it anyway."""
    if lease.job_id is not None:
        return False
    if lease.host == socket.gethostname():
        with contextlib.suppress(PermissionError):
            try:
                os.kill(lease.pid, 0)
            except ProcessLookupError:
                return True
    return time.time() - lease.since > SUBMISSION_S


def _require_dead(directory: str | Path, found: Lease) -> None:
    if _launcher_is_dead(found):
        log.warning("%s: the lease of %s is broken: it is gone", directory, found.describe())
        return
    if found.job_id is None:
        raise OutputError(_held(directory, found))
    try:
        ended = gone(found.job_id)
    except UnavailableError as error:
        raise OutputError(f"{_held(directory, found)} (whether that is gone cannot be asked: {error})") from None
    if not ended:
        raise OutputError(_held(directory, found))
    log.warning("%s: the lease of %s is broken: the scheduler says that it is gone", directory, found.describe())


def _held(directory: str | Path, holder: Lease) -> str:
    cancel = "" if holder.job_id is None else f", cancel it (scancel {holder.job_id})"
    return f"{directory} is held by {holder.describe()}; wait for it{cancel}, or use another run_dir"


@contextlib.contextmanager
def _alone(directory: str | Path) -> Iterator[None]:
    """One process at a time reads and writes a lease. Raises ``OutputError`` where the directory cannot be locked."""
    try:
        with open(Path(directory, ".lease.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise OutputError(f"{directory}: cannot be locked ({error.strerror or error}); use another run_dir") from None
