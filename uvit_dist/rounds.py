"""One step of ranks under ``srun``: started, watched through their heartbeats, ended. What follows is the supervisor's.

Whatever happens, when ``run`` returns no rank of the step lives, or each host that may hold one is named as lost.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from uvit_dist import beats, faults, slurm, watchdog
from uvit_dist.beats import BeatServer, RankView, alive
from uvit_dist.config_cluster import Order
from uvit_dist.errors import HANG_EXIT_CODE, UnavailableError
from uvit_dist.verdicts import FAILURES, STARTING, Limits, Verdict, judge, verdict_of_end

LOOK_S = 0.2
STACKS_S = 2.0
"""Seconds that ranks have to show their stacks before they are sent a signal, and again before they are ended."""
END_S = 60.0
"""Seconds that an ended step may stay listed before its hosts are taken for lost."""
DIE_S, KILL_S = 3.0, 2.0
"""Seconds until srun is killed; between orders to kill the step."""
FIRST_PORT, PORTS = 20_000, 12_000
"""Ports of the ranks' rendezvous: below those that systems give away by themselves."""
log = logging.getLogger("uvit_dist.supervisor")


@dataclass(frozen=True)
class Outcome:
    """How a step ended. hosts: those blamed; last_step: updates made, by the last beats; heard_at: host → when a rank
    of it that has not told its end was last heard, monotonic seconds."""

    verdict: Verdict
    hosts: list[str]
    last_step: int | None
    save_s: float | None
    heard_at: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Round:
    """One attempt. stopping: asked again and again whether the ranks are to save and stop, and whether to end now;
    on_running: called with the step when the first progress is made."""

    order: Order
    job: str
    hosts: Sequence[str]
    attempt: int
    server: BeatServer
    address: str
    limits: Limits
    stopping: Callable[[], tuple[bool, bool]]
    on_running: Callable[[int | None], None]
    independent: bool = False
    _told: bool = field(default=False, init=False)
    _was_told_to_end: bool = field(default=False, init=False)
    _ran: bool = field(default=False, init=False)

    @property
    def world_size(self) -> int:
        """Ranks of the step."""
        return len(self.hosts) * self.order.processes_per_node

    def run(self) -> Outcome:
        """Start the step and see it to its end."""
        job_id, name = os.environ["SLURM_JOB_ID"], f"ranks-{self.attempt}"
        token = secrets.token_hex(16)
        self.server.expect(token, self.world_size)
        began = time.monotonic()
        srun = subprocess.Popen(
            self.command(name), env=self._environment(token), stdin=subprocess.DEVNULL, start_new_session=True
        )
        verdict = self._watch(srun, began)
        if verdict is not None and verdict.exit_code == HANG_EXIT_CODE:
            log.error("%s", verdict.reason)
            self._show_stacks(job_id, name)
        views = self.server.views()  # before the end of the step makes dead ranks of live ones
        code = srun.poll()
        safe, lost = self._end(srun, job_id, name)
        if code is not None and not all(view.end or view.gone_at for view in views):
            views = self.server.views()
        stopping = self._told or self._was_told_to_end
        verdict = verdict_of_end(views, srun.returncode or 0, verdict, stopping, self.independent)
        if not safe and verdict.cause in FAILURES:
            where = f"no process starts on {', '.join(lost)}" if lost else "SLURM cannot end the step"
            verdict = Verdict("node_lost", f"{verdict.reason}; {where}", 1)
        blamed = lost or list(dict.fromkeys(views[rank].host for rank in verdict.ranks if views[rank].host))
        steps = [view.step for view in views if view.step is not None]
        saves = [view.save_s for view in views if view.save_s is not None]
        heard = sorted((view.heard_at, view.host) for view in self.server.views() if view.heard_at and not view.end)
        last = {host: heard_at for heard_at, host in heard}
        return Outcome(verdict, blamed, max(steps, default=None), max(saves, default=None), last)

    def command(self, name: str) -> list[str]:
        """``srun`` and its options for this round, and what each task runs. name: of the step."""
        per_node = self.order.processes_per_node
        options = [
            "--overlap",  # after a node's loss its step stays listed, and holds what it had
            f"--job-name={name}",
            f"--nodelist={','.join(self.hosts)}",
            f"--nodes={len(self.hosts)}",
            f"--ntasks={self.world_size}",
            f"--ntasks-per-node={per_node}",
            "--distribution=block",
            f"--kill-on-bad-exit={0 if self.independent else 1}",
            "--wait=0",
            "--mem=0",
            "--input=none",
        ]
        worker = ["-m", "uvit_dist.worker", "--config", self.order.config, "--job", self.job]
        named = [] if self.order.name == "train" else ["--name", self.order.name]
        return ["srun", *options, *self.order.srun_options(), *self.order.rank_command(), *worker, *named]

    def _environment(self, token: str) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(self.order.profile.cpus_per_task),
            **os.environ,
            "MASTER_ADDR": self._master(),
            "MASTER_PORT": str(self._free_port()),
            watchdog.VARIABLE: f"{self.address}:{self.server.port}:{token}",
            faults.ATTEMPT_VARIABLE: str(self.attempt),
        }

    def _master(self) -> str:
        """The name or address of rank 0's host: mostly this one, whose name is known to be good. The batch host may be
        left out, and SLURM's name of another need not be that of a machine."""
        host = self.hosts[0]
        if host == watchdog.host_name():
            return self.address
        return host if beats.address(host) is not None else slurm.node_address(host) or host

    def _free_port(self) -> int:
        """A port that differs from round to round, and from run to run: what is left of an older round must not be met,
        nor another job of this node, whose ranks may not listen yet."""
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        told = f"{self.order.directory} {os.environ['SLURM_JOB_ID']} {restart} {self.attempt} {self.job}"
        number = zlib.crc32(told.encode())
        for offset in range(PORTS):
            port = FIRST_PORT + (number + offset) % PORTS
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return port
        raise UnavailableError(f"no port is free between {FIRST_PORT} and {FIRST_PORT + PORTS}; free some")

    def _watch(self, srun: subprocess.Popen[bytes], began: float) -> Verdict | None:
        """Wait for srun to end, or for a reason to end it, which is returned."""
        while srun.poll() is None:
            time.sleep(LOOK_S)
            views = self.server.views()
            self._note_running(views)
            stop, end = self.stopping()
            if stop and not self._told:
                self._told = True
                self.server.ask_to_stop()
            if end:
                self._was_told_to_end = True
                return None
            verdict = judge(views, time.monotonic(), began, self.limits, self.independent)
            if verdict is not None:
                return verdict
        # its output may be ahead of the ranks' last words
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and any(view.heard_at for view in alive(self.server.views())):
            time.sleep(0.05)
        self._note_running(self.server.views())
        return None

    def _note_running(self, views: Sequence[RankView]) -> None:
        if not self._ran and (running := [view for view in views if view.phase not in STARTING]):
            self._ran = True
            self.on_running(running[0].step)

    def _show_stacks(self, job_id: str, name: str) -> None:
        """Have every rank write the stacks of its threads to its log: by its watchdog, or by a signal where that is
        stuck as well, or stopped."""
        self.server.tell_all(stacks=True)
        if self._wait_for_stacks():
            return
        try:
            steps = slurm.steps(job_id, name)
        except UnavailableError:
            return
        for step in steps:
            slurm.signal_step(step, "USR1")
            slurm.signal_step(step, "CONT")
        self._wait_for_stacks()

    def _wait_for_stacks(self) -> bool:
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline:
            if all(view.dumped for view in alive(self.server.views())):
                return True
            time.sleep(LOOK_S)
        return False

    def _end(self, srun: subprocess.Popen[bytes], job_id: str, name: str) -> tuple[bool, list[str]]:
        """End what is left of the step. Returns whether no rank lives, and the hosts that are lost, where they may."""
        self.server.tell_all(die=True)
        began, kill_at, listed = time.monotonic(), 0.0, None
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(self._lost_hosts, job_id) if srun.poll() is None else None
            while True:
                passed = time.monotonic() - began
                listed = self._listed(job_id, name)
                if listed and passed >= kill_at:
                    kill_at = passed + KILL_S
                    for step in listed:
                        slurm.signal_step(step, "KILL")
                if srun.poll() is None and passed > DIE_S:
                    srun.kill()
                views = self.server.views()
                left = [view for view in views if view.connected]
                seen_to_end = not left and all(view.heard_at for view in views)
                if srun.poll() is not None and (listed == [] or (listed is None and seen_to_end)):
                    return True, []
                if lost is None and passed > DIE_S:
                    lost = pool.submit(self._lost_hosts, job_id)
                gone = lost.result() if lost is not None and lost.done() else []
                if gone and srun.poll() is not None and all(view.host in gone for view in left):
                    return False, gone
                if passed > END_S:
                    srun.kill()
                    srun.wait()
                    return False, sorted({view.host for view in left})
                time.sleep(LOOK_S)

    def _listed(self, job_id: str, name: str) -> list[str] | None:
        """The step, if SLURM still lists it; none where it does not answer."""
        try:
            return slurm.steps(job_id, name)
        except UnavailableError:
            return None

    def _lost_hosts(self, job_id: str) -> list[str]:
        try:
            return slurm.lost_hosts(job_id, self.hosts, watchdog.host_name())
        except UnavailableError:
            return []
