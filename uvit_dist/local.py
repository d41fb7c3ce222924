"""A job on this machine alone: one process for each rank, watched until all have ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from uvit_dist import lease, pins, storage
from uvit_dist.config import Config
from uvit_dist.config_cluster import job_directory
from uvit_dist.config_yaml import dump_config
from uvit_dist.errors import INTERRUPTED_EXIT_CODE
from uvit_dist.worker import LAUNCHER_VARIABLE, SHARED_JOBS, error_file

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
GRACE_S = 10.0
"""Seconds that the other ranks have to tell of their own error after one has ended with one."""


def run_local(config: Config, job: str) -> int:
    """Run every rank of a job on this machine and wait. Returns the job's exit code; prints why it failed."""
    storage.make_directory(config.run_dir)
    lease.require_free(job_directory(config.run_dir, job))
    shared = job in SHARED_JOBS
    with contextlib.nullcontext() if shared else storage.locked(config.run_dir):
        if job == "train":
            pins.switch(config.run_dir, on=False)
        name = f".launch-{job}-{socket.gethostname()}-{os.getpid()}.yaml" if shared else f".launch-{job}.yaml"
        path = storage.join(config.run_dir, name)
        storage.write_bytes(path, dump_config(config).encode())
        storage.make_directory(str(error_file(config.run_dir, 0).parent))
        for rank in range(config.world_size):
            error_file(config.run_dir, rank).unlink(missing_ok=True)
        return Processes(config, job, path).wait()


def first_failure(codes: list[int | None]) -> tuple[int, int] | None:
    """(rank, exit code) of the rank that failed first, of those that had failed when the codes were read, or none.

    codes: of every rank, in order; None: it runs. Between two looks several ranks may have failed. One that was killed
    is then the cause, and one that gave up, by an exit code or an abort, lost its peer.
    """
    failed = [(rank, code) for rank, code in enumerate(codes) if code is not None and code != 0]
    failed = [(rank, code) for rank, code in failed if code != INTERRUPTED_EXIT_CODE]
    return min(failed, key=lambda item: (item[1] >= 0 or item[1] == -signal.SIGABRT, item[0]), default=None)


class Processes:
    """The ranks of a local job. Ctrl-C and SIGTERM reach them, so that they save and stop; a second one ends them."""

    def __init__(self, config: Config, job: str, config_path: str) -> None:
        self.config, self.signals = config, 0
        self.processes: list[subprocess.Popen[bytes]] = []
        for number in SIGNALS:
            signal.signal(number, self._forward)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "uvit_dist.worker", "--config", config_path, "--job", job]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a signal now must reach all ranks or none
        for rank in range(config.world_size):
            self.processes.append(self._start(command, rank, port))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _start(self, command: list[str], rank: int, port: int) -> subprocess.Popen[bytes]:
        world_size = self.config.world_size
        environment = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }
        with open(Path(self.config.run_dir, "logs", f"rank-{rank:05d}.log"), "ab") as log:
            # A session of their own: the terminal's Ctrl-C reaches them once, through us.
            return subprocess.Popen(
                command,
                env=environment,
                stdout=log,
                stderr=None if rank == 0 else log,
                start_new_session=True,
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
            )

    def _forward(self, number: int, frame: object) -> None:
        self.signals += 1
        if self.signals == 1:
            print("stopping: the ranks save their state; once more to stop at once", file=sys.stderr)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def wait(self) -> int:
        """Wait for all ranks; if one fails, end the others. Returns the exit code of the job."""
        first: tuple[int, int] | None = None
        deadline = float("inf")
        while any(process.poll() is None for process in self.processes):
            if first is None:
                codes = [process.poll() for process in self.processes]
                first = first_failure(codes)
                if first is not None:
                    deadline = time.monotonic() + GRACE_S
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
            time.sleep(0.1)
        final = [process.returncode for process in self.processes]
        if all(code == 0 for code in final):
            return 0
        if all(code in (0, INTERRUPTED_EXIT_CODE) for code in final):
            return INTERRUPTED_EXIT_CODE
        first = first or first_failure(final)
        assert first is not None
        return self._explain(*first)

    def _explain(self, first: int, code: int) -> int:
        """Print why the job failed: users' mistakes first, each once. Returns the exit code to end with.

        first: the rank that failed first; code: what it ended with.
        """
        paths = [error_file(self.config.run_dir, rank) for rank in range(self.config.world_size)]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        mistakes = [record for record in records if record["mistake"]]
        if mistakes:
            for message in dict.fromkeys(record["message"] for record in mistakes):
                print(f"error: {message}", file=sys.stderr)
            return int(mistakes[0]["code"])
        if self.signals > 1:
            print("stopped at once; the last checkpoint is untouched", file=sys.stderr)
            return 128 + signal.SIGINT
        if self.signals:
            print("stopped; start the same command again to go on", file=sys.stderr)
            return INTERRUPTED_EXIT_CODE
        if code < 0:
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            print(f"error: rank {first} ended first, by {signal.Signals(-code).name}{hint}", file=sys.stderr)
        for record in sorted(records, key=lambda record: record["rank"] != first):
            print(f"error: rank {record['rank']}: {record['message']}", file=sys.stderr)
        print(
            f"logs: {Path(self.config.run_dir, 'logs')}; start the same command again to go on from the last "
            "whole checkpoint",
            file=sys.stderr,
        )
        return 1
