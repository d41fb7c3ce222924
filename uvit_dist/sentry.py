"""Watches over the supervisor from other hosts of its allocation, and requeues the job where its host is lost.

SLURM requeues a job whose node fails, unless it was submitted with ``--no-kill``, as those are that go on without a
node. If such a job loses the node of its batch process, it stays RUNNING with nothing in it, and its guard waits.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from uvit_dist import attempts, slurm
from uvit_dist.attempts import AttemptLog
from uvit_dist.config_cluster import Order, read_order
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import UnavailableError
from uvit_dist.succession import Succession
from uvit_dist.watchdog import host_name

SENTRIES = 3
"""Hosts that watch: spares first, for they have nothing else to do."""
STAGGER_S = 20.0
"""Seconds that each waits longer than the one before it: the first requeues, which ends the others."""
LOOK_S = 2.0
STOP_S = 5.0
log = logging.getLogger("uvit_dist.sentry")


def show_life(order: Order) -> None:
    """Called by the supervisor every few seconds: its sign of life."""
    with contextlib.suppress(OSError):  # a sign that is missing does no harm: the host is tried before anything follows
        _sign(order).touch()


def _sign(order: Order) -> Path:
    return Path(order.directory, "supervisor.alive")


class Sentries:
    """The supervisor's end: a step on each of some other hosts, so that the loss of one does not touch the others."""

    def __init__(self, order: Order) -> None:
        self._order, self._steps = order, dict[str, subprocess.Popen[bytes]]()

    def post(self, hosts: Sequence[str]) -> None:
        """Have the first of these hosts watch. Those that do already go on; those that ended begin anew."""
        chosen = [host for host in hosts if host != host_name()][:SENTRIES] if self._order.no_kill else []
        self._end([host for host in self._steps if host not in chosen])
        for place, host in enumerate(chosen):
            if host not in self._steps or self._steps[host].poll() is not None:
                command = self.command(host, place)
                self._steps[host] = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def command(self, host: str, place: int) -> list[str]:
        """``srun`` and what it starts. place: among the sentries, from 0."""
        options = ["--overlap", "--mem=0", "--cpus-per-task=1", f"--nodelist={host}", "--nodes=1", "--ntasks=1",
                   "--input=none", f"--output={self._order.directory}/sentry-{host}.log", "--open-mode=append",
                   "--job-name=sentry"]  # fmt: skip
        order = str(Path(self._order.directory, "order.json"))
        return ["srun", *options, self._order.python, "-m", "uvit_dist.sentry", order, host_name(), str(place)]

    def close(self) -> None:
        """End them all."""
        self._end(list(self._steps))

    def _end(self, hosts: Sequence[str]) -> None:
        steps = [self._steps.pop(host) for host in hosts]
        for step in steps:
            step.terminate()  # srun ends its task
        for step in steps:
            try:
                step.wait(STOP_S)
            except subprocess.TimeoutExpired:
                step.kill()
                step.wait()


def watch(order: Order, watched: str, silence_s: float) -> None:
    """Wait for the supervisor's signs to stay away, and its host to start no process; then requeue.

    watched: its host; silence_s: seconds without a sign before that host is tried.
    """
    job, own = attempts.this_job() or "", host_name()
    newest, since = None, time.monotonic()
    while True:
        time.sleep(LOOK_S)
        try:
            sign = _sign(order).stat().st_mtime_ns
        except OSError:
            sign = None
        if sign != newest:
            newest, since = sign, time.monotonic()
        if time.monotonic() - since < silence_s:
            continue
        try:
            if watched in slurm.lost_hosts(job, [watched, own], own):
                return _requeue(order, watched)
        except UnavailableError as error:
            log.warning("%s", error)
        since = time.monotonic()


def _requeue(order: Order, lost: str) -> None:
    """Note what befell the attempt, as its supervisor would have, and put the job back into the queue."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue ends this step, too, and more is to be done after it
    reason = f"lost {lost}, and the supervisor with it"
    record, events = AttemptLog(order.directory), attempts.read(order.directory)
    log.error("%s", reason)
    if attempts.open_attempt(events) is not None:
        steps = [event["step"] for event in events if event["event"] == "running"]
        record.add(
            "ended", exit_code=1, reason=reason, cause="node_lost", hosts=[lost],
            checkpoint=attempts.newest_checkpoint(order.run_dir), last_step=steps[-1] if steps else None,
        )  # fmt: skip
    succession = Succession(order, record)
    succession.requeue(reason)
    if attempts.handed_over(attempts.read(order.directory), succession.job):  # who goes on waits until this job is gone
        slurm.cancel(succession.job)


def main() -> None:
    """What the step runs on each of its hosts."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a warning that was sent to all steps
    order = read_order(sys.argv[1])
    patience_s = load_config(order.config).launch.silence_s + STAGGER_S * int(sys.argv[3])
    watch(order, sys.argv[2], patience_s)


if __name__ == "__main__":
    main()
