"""The processes of a rehearsal cluster, found in /proc: its daemons and the jobs on its nodes, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def environment_of(pid: int) -> dict[str, str]:
    """A process's environment as it began; empty where it is gone or another user's."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)


def job_processes(conf: Path, node: str | None = None, containing: str = "") -> list[int]:
    """Processes of jobs of the cluster with that configuration, without slurmstepd's.

    node: on that node alone; containing: those whose command line holds the text.
    """
    found = []
    for pid in _all():
        environment = environment_of(pid)
        if environment.get("SLURM_CONF") != str(conf) or "SLURM_JOB_ID" not in environment:
            continue
        on = environment.get("SLURMD_NODENAME")
        if on is not None and node in (None, on) and containing in command_of(pid):
            found.append(pid)
    return sorted(found)


def is_rank(pid: int, rank: int) -> bool:
    """Whether a process is that task of a step that ``srun`` started."""
    environment = environment_of(pid)
    return environment.get("SLURM_PROCID") == str(rank) and environment.get("SLURM_STEP_ID", "").isdigit()


def node_of(pid: int) -> str:
    """The node that a job's process runs on."""
    return environment_of(pid).get("SLURMD_NODENAME", "")


def daemon_processes(logs: set[str]) -> Iterator[int]:
    """slurmd and slurmstepd processes that hold one of those log files open."""
    for pid in _all():
        if command_of(pid).startswith(("slurmstepd", "slurmd ")) and not logs.isdisjoint(_open_files(pid)):
            yield pid


def _open_files(pid: int) -> Iterator[str]:
    """Paths that a process has open; one that it closes meanwhile does not hide the others."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{descriptor}")


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]
