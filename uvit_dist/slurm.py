"""SLURM's commands, each bounded in time: the one place that calls them.

``scontrol`` may be missing on compute nodes and there may be no accounting, so what can be asked of ``squeue`` is, and
``sacct`` is never used. Where the controller does not answer, a question is asked again for a while.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from uvit_dist.errors import UnavailableError

COMMAND_S = 20.0
"""Seconds that one command may take."""
PATIENCE_S = 300.0
"""Seconds for which a controller that does not answer is asked again."""
PAUSE_S = 2.0
EXCLUDE_TRIES = 5
UNKNOWN = ("Invalid job id", "Invalid job array", "job not found", "pending execution", "disabled")
GONE = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"
)  # fmt: skip
"""States of jobs that will not run any more. One that is preempted and requeued is PENDING."""
USABLE = ("idle", "alloc", "mix", "comp", "resv", "plnd")
"""States of nodes that can be given to a job, now or later."""
PROBE_S = 8.0
"""Seconds that a host has to start a process."""
log = logging.getLogger("uvit_dist.supervisor")
_GROUP = re.compile(r"[^,\[\]]*(?:\[[^\]]*\][^,\[\]]*)*")


class _Failed(Exception):
    """A command that ended with a fault, or did not end in time."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.words = words


def available() -> bool:
    """Whether this machine can submit jobs and start steps."""
    return all(shutil.which(name) for name in ("sbatch", "srun", "squeue", "scancel"))


def _call(arguments: Sequence[str], timeout_s: float = COMMAND_S) -> str:
    """What a command prints. Raises ``_Failed``."""
    try:
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"{arguments[0]} did not end within {timeout_s:g} s") from None
    except OSError as error:
        raise _Failed(f"{arguments[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise _Failed(done.stderr.strip() or f"{arguments[0]} ended with {done.returncode}")
    return done.stdout


def _ask(arguments: Sequence[str], patience_s: float) -> str:
    """As ``_call``, again and again. Raises ``UnavailableError`` when the patience is at an end, ``_Failed`` where
    SLURM answers that it knows no such job, or will not."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return _call(arguments)
        except _Failed as error:
            if any(words in error.words for words in UNKNOWN):
                raise
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"SLURM does not answer: {error.words}; see that its controller runs, and try again"
                ) from None
        time.sleep(PAUSE_S)


def _fields(job_id: str, patience_s: float) -> dict[str, str] | None:
    """What ``scontrol show job`` says of a job, by name; none where SLURM does not know it."""
    try:
        text = _ask(["scontrol", "--oneliner", "show", "job", job_id], patience_s)
    except _Failed:
        return None
    lines = text.strip().splitlines()
    return dict(word.split("=", 1) for word in lines[0].split() if "=" in word) if lines else None


def job_state(job_id: str, patience_s: float = PATIENCE_S) -> str | None:
    """A job's state, as RUNNING, COMPLETING, CANCELLED; none where SLURM does not know it any more.

    patience_s: for which a controller that does not answer is asked again. Raises ``UnavailableError``.
    """
    if shutil.which("scontrol"):
        fields = _fields(job_id, patience_s)
        return None if fields is None else fields.get("JobState")
    try:
        states = _ask(["squeue", "--noheader", "--states=all", "--jobs", job_id, "--format=%T"], patience_s).split()
    except _Failed:
        return None
    return states[0] if states else None


def is_gone(job_id: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether a job will not run any more. Raises ``UnavailableError``."""
    state = job_state(job_id, patience_s)
    return state is None or state in GONE


def fate(job_id: str, patience_s: float = PATIENCE_S) -> Literal["runs", "requeued", "cancelled", "ended"]:
    """What SLURM is doing to the job of this process, also while its processes end. Raises ``UnavailableError``.

    "cancelled" may also be the time limit, while the processes end: SLURM shows no difference.
    """
    options = ["--noheader", "--states=all", "--jobs", job_id, "--Format=State:20,StartTime:24,RestartCnt:12"]
    try:
        state, start, restarts = [*_ask(["squeue", *options], patience_s).split(), "", "", ""][:3]
    except _Failed:
        return "ended"
    if restarts.isdigit() and int(restarts) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return "requeued"  # its time of starting may still be there
    if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT") or (state == "COMPLETING" and start == "N/A"):
        return "requeued"
    if state in ("CANCELLED", "COMPLETING"):
        return "cancelled"
    return "ended" if state in ("", *GONE) else "runs"


def end_time(job_id: str, patience_s: float = 0.0) -> float | None:
    """When a running job's time limit ends it, Unix seconds; none where there is no limit, or nobody says."""
    try:
        text = _ask(["squeue", "--noheader", "--jobs", job_id, "--format=%e"], patience_s).strip()
        return datetime.datetime.fromisoformat(text).timestamp()
    except (_Failed, UnavailableError, ValueError):
        return None


def hosts() -> list[str]:
    """The hosts of this allocation, in SLURM's order, from SLURM_JOB_NODELIST."""
    return expand(os.environ.get("SLURM_JOB_NODELIST", ""))


def expand(text: str) -> list[str]:
    """A host list written out: ``n[0-1,7],m`` is n0, n1, n7, m."""
    return [host for group in _GROUP.findall(text) if group for host in _expand_group(group)]


def _expand_group(group: str) -> list[str]:
    head, bracket, rest = group.partition("[")
    if not bracket:
        return [head]
    inside, _, tail = rest.partition("]")
    numbers = []
    for part in inside.split(","):
        first, dash, last = part.partition("-")
        numbers += [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)] if dash else [part]
    return [f"{head}{number}{end}" for number in numbers for end in _expand_group(tail)]


def versions() -> dict[str, str]:
    """Command → what it says of its version, of SLURM's commands that are on this machine and start."""
    found = {}
    for name in ("sbatch", "scontrol", "srun"):
        with contextlib.suppress(_Failed):
            found[name] = _call([name, "--version"]).strip()
    return found


def partitions() -> list[str]:
    """The cluster's partitions. Raises ``UnavailableError`` where nobody says."""
    try:
        return sorted({line.strip() for line in _call(["sinfo", "--noheader", "--format=%R"]).splitlines()})
    except _Failed as error:
        raise UnavailableError(f"SLURM does not tell its partitions: {error.words}; see what sinfo says") from None


def accounts() -> list[str]:
    """The accounts that this user may use. Raises ``UnavailableError`` where nobody says: there is no accounting."""
    user = getpass.getuser()
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account"]
    try:
        return sorted({line.strip() for line in _call(command).splitlines()})
    except _Failed as error:
        raise UnavailableError(
            f"SLURM does not tell the accounts of {user}: {error.words}; see what sacctmgr says"
        ) from None


def require_scontrol() -> None:
    """Raises ``UnavailableError`` where this machine has no ``scontrol``."""
    if not shutil.which("scontrol"):
        raise UnavailableError(
            "scontrol is not on this machine, so that a job cannot be requeued from it; install it on the compute nodes"
        )


def requeue(job_id: str) -> None:
    """Put a running job back into the queue, which ends its processes. Raises ``UnavailableError`` where it cannot."""
    try:
        _ask(["scontrol", "requeue", job_id], PATIENCE_S)
    except _Failed as error:
        if "pending execution" in error.words:  # asked twice, since the first answer was lost
            return
        raise UnavailableError(
            f"job {job_id}: SLURM does not requeue it ({error.words}); start the run again with uvit_dist.launch"
        ) from None


def spared(names: Sequence[str], nodes: int) -> list[str]:
    """Those hosts, if this job's partition has enough others; else none. nodes: that the job needs."""
    if not names:
        return []
    try:
        sound = usable_nodes(os.environ.get("SLURM_JOB_PARTITION"))
    except UnavailableError:
        return []
    return list(names) if len(sound - set(names)) >= nodes else []


def node_address(name: str) -> str | None:
    """Where SLURM reaches a node: a name or an address; none where it does not tell."""
    try:
        told = _call(["scontrol", "--oneliner", "show", "node", name])
    except _Failed:
        return None
    return dict(part.split("=", 1) for part in told.split() if "=" in part).get("NodeAddr")


def usable_nodes(partition: str | None) -> set[str]:
    """The nodes of a partition (none: of all) that a job could be given, now or later. Raises ``UnavailableError``."""
    of = [] if partition is None else [f"--partition={partition}"]
    try:
        lines = _call(["sinfo", "--noheader", "--Node", "--format=%N %t", *of]).splitlines()
    except _Failed as error:
        raise UnavailableError(f"SLURM does not tell its nodes: {error.words}; see what sinfo says") from None
    return {words[0] for words in map(str.split, lines) if words[1:] and words[1].rstrip("$@+") in USABLE}


def exclude(job_id: str, names: Sequence[str]) -> None:
    """Have a job that was just requeued leave out hosts; where SLURM will not, nothing is done."""
    if not names:
        return
    for _ in range(EXCLUDE_TRIES):  # SLURM's SIGTERM to all processes of the requeued job may end one
        with contextlib.suppress(_Failed):
            _call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(names)}"])
            return


def cancel(job_id: str, patience_s: float = 30.0) -> None:
    """Cancel a job, if it is still there. Raises ``UnavailableError``."""
    try:
        _ask(["scancel", job_id], patience_s)
    except _Failed:
        return


def steps(job_id: str, name: str) -> list[str]:
    """The ids (JOB.STEP) of a job's steps of that name that SLURM still lists. Raises ``UnavailableError``."""
    try:
        lines = _ask(["squeue", "--noheader", "--steps", "--jobs", job_id, "--format=%i %j"], 0.0).splitlines()
    except _Failed:
        return []
    return [words[0] for words in (line.split() for line in lines) if len(words) == 2 and words[1] == name]


def signal_step(step: str, name: str) -> None:
    """Have a signal (USR1, CONT, KILL) sent to all processes of a step. Does not wait: it takes long on a lost host."""
    command = ["scancel", f"--signal={name}", step]
    threading.Thread(target=_try, args=(command,), name="scancel", daemon=True).start()


def _try(command: Sequence[str]) -> None:
    with contextlib.suppress(_Failed):
        _call(command)


def probe(host: str) -> bool:
    """Whether a host of this allocation starts a process within seconds."""
    options = ["--overlap", "--no-kill", "--immediate=5", "--mem=0", "--input=none", "--cpus-per-task=1"]
    command = ["srun", *options, f"--nodelist={host}", "--nodes=1", "--ntasks=1", "--job-name=probe", "true"]
    try:
        _call(["timeout", "-k1", f"{PROBE_S - 2:g}", *command], PROBE_S)
    except _Failed as error:
        log.info("no process starts on %s: %s", host, error.words.splitlines()[0])
        return False
    return True


def lost_hosts(job_id: str, names: Sequence[str], own: str) -> list[str]:
    """Those hosts of this allocation that do not start a process, asked twice, while the controller answers.

    own: the host of this process; where even that starts none, the question tells nothing, and none is called lost.
    Raises ``UnavailableError`` where the controller does not answer.
    """
    lost = _silent_hosts(names)
    if lost:
        job_state(job_id)
        lost = _silent_hosts(lost)
    return [] if own in lost else lost


def _silent_hosts(names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor(max(1, min(32, len(names)))) as pool:
        return [name for name, answers in zip(names, pool.map(probe, names), strict=True) if not answers]
