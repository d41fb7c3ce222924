"""The batch process of a SLURM job: it starts the ranks, watches them, starts them again, and owns requeueing.

What it decides follows from ``attempts.jsonl`` alone, so that whoever takes over, after a requeue or as a guard, goes
on where it was. A failure of a rank is mended in the allocation, a lost node by requeueing; a stop (preemption, the
time limit, a signal) saves and requeues; a mistake, or ``launch.attempts`` failures without a checkpoint, end the job.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from uvit_dist import attempts, lease, slurm, submit
from uvit_dist.attempts import AttemptLog, Event
from uvit_dist.beats import BeatServer
from uvit_dist.config_cluster import Order, read_order
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import INTERRUPTED_EXIT_CODE, OutputError, UnavailableError, UserError
from uvit_dist.follow_ups import FollowUps
from uvit_dist.rounds import Outcome, Round
from uvit_dist.verdicts import Limits, Verdict
from uvit_dist.watchdog import host_name

INDEPENDENT = ("precompute", "evaluate", "reference")
"""Jobs whose ranks can do without each other."""
PREFLIGHT = "preflight"
"""The job of a step before the first attempt in an allocation: ranks talk, and are timed (``launch.preflight``)."""
SEE_S, LIMIT_S, GUARD_S = 5.0, 30.0, 60.0
"""Seconds between looks at new checkpoints; at the lease and the time limit; for a guard that is missing."""
LAST_S = 10.0
"""Seconds before the time limit at which ranks that have not saved yet are ended, so that the requeue is ours."""
HAND_OVER_S = 180.0
"""Seconds that a successor or guard waits until the job before it is gone."""
ALIVE = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "CONFIGURING")
NOT_CANCELLED = (*ALIVE, "PENDING", "REQUEUED", "PREEMPTED", "TIMEOUT", "DEADLINE", "NODE_FAIL")
log = logging.getLogger("uvit_dist.supervisor")


def supervise(order_path: str) -> int:
    """Run an order's job to its end, or to its requeueing. Returns the exit code of the batch process."""
    signals = Signals()
    set_up_logging()
    try:
        return Supervisor(read_order(order_path), signals).run()
    except UserError as error:
        log.error("error: %s", error)
        return error.exit_code


def set_up_logging() -> None:
    """The supervisor's words, on stderr: the batch job's log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s supervisor: %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("uvit_dist")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [handler]


class Signals:
    """When SLURM's signals came, monotonic seconds. They replace submitit's, which would requeue by themselves."""

    def __init__(self) -> None:
        self.warned_at: float | None = None
        self.ended_at: float | None = None
        signal.signal(signal.SIGUSR2, self._warn)
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        signal.signal(signal.SIGCONT, lambda number, frame: None)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self.warned_at = self.warned_at or time.monotonic()

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.ended_at = self.ended_at or time.monotonic()


def was_cancelled(warned: bool, state: str | None, at_the_limit: bool) -> bool:
    """Whether a SIGTERM was a cancellation. warned: SIGUSR2 had come; state: of the job, or none if nobody knows.

    at_the_limit: its time was over anyway.
    """
    return not warned and not at_the_limit and state not in NOT_CANCELLED


@dataclass
class Supervisor:
    """One allocation's worth of a job."""

    order: Order
    signals: Signals
    _cancelled: bool = field(default=False, init=False)
    _stop_reason: str | None = field(default=None, init=False)
    _limit: float | None = field(default=None, init=False)
    _next: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.job = attempts.this_job() or ""
        self.raw_job = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.log = AttemptLog(self.order.directory)
        self.config = load_config(self.order.config)
        launch = self.config.launch
        self.limits = Limits(launch.silence_s, launch.hang_s, launch.start_s)
        self.follow_ups = FollowUps(self.order)
        self.hosts = slurm.hosts()

    # -- the whole -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Take over, then attempt after attempt. Returns the exit code."""
        events = attempts.read(self.order.directory)
        if (code := self._nothing_to_do(events)) is not None:
            return code
        try:
            lease.confirm(self.order.directory, self.job, self._predecessor_is_gone)
        except OutputError as error:
            log.error("%s", error)
            return error.exit_code
        self._close_open_attempt(events)
        self._wait_for_fence(events)
        self.log.add("started", hosts=self.hosts)
        log.info("job %s, restart %d, on %s", self.job, self.restart, ", ".join(self.hosts))
        self._limit = slurm.end_time(self.raw_job, 10.0)
        self.lead_s = self.order.profile.lead_s(attempts.longest_save_s(events))
        self._ensure_guard()
        self.address, server = serve(self.hosts, self.limits.silence_s)
        try:
            return self._attempts(server)
        finally:
            server.close()

    def _attempts(self, server: BeatServer) -> int:
        checked = not (self.config.launch.preflight and self.order.nodes > 1 and self.order.job == "train")
        while True:
            events = attempts.read(self.order.directory)
            if attempts.failures_without_progress(events) >= self.config.launch.attempts:
                return self._give_up(events)
            slurm.job_state(self.raw_job)  # waits for the controller: no attempt is wasted while it is away
            stop, _ = self._stopping()
            if self._cancelled:
                return self._finish(INTERRUPTED_EXIT_CODE, "cancelled", "cancelled")
            if stop:
                return self._requeue(self._stop_reason or "stopped")
            if lost := self._lost_hosts():
                self._ended(1, f"no process starts on {', '.join(lost)}", "node_lost", lost)
                return self._requeue(f"lost {', '.join(lost)}")
            outcome = self._attempt(server, self.order.job if checked else PREFLIGHT)
            if outcome.verdict.cause == "done" and not checked:
                checked = True
                continue
            if (code := self._after(outcome)) is not None:
                return code

    def _attempt(self, server: BeatServer, job: str) -> Outcome:
        """Run the ranks once, and note it."""
        from_step = attempts.newest_checkpoint(self.order.run_dir)
        world_size = len(self.hosts) * self.order.processes_per_node
        if job != PREFLIGHT:
            self.log.add("attempt", hosts=self.hosts, world_size=world_size, from_step=from_step)
        number = attempts.number_of_attempts(attempts.read(self.order.directory))
        log.info("attempt %d: %s, %d ranks, from %s", number, job, world_size,
                 "the beginning" if from_step is None else f"the checkpoint of step {from_step}")  # fmt: skip
        outcome = Round(
            self.order, job, self.hosts, number, server, self.address, self.limits, self._stopping,
            lambda step: None if job == PREFLIGHT else self._note_running(step), job in INDEPENDENT,
        ).run()  # fmt: skip
        verdict, hosts = outcome.verdict, outcome.hosts
        if verdict.cause in ("rank_died", "silent", "hang", "error") and (lost := self._lost_hosts()):
            verdict = Verdict("node_lost", f"{verdict.reason}; no process starts on {', '.join(lost)}", 1)
            hosts = lost
        if self._cancelled and verdict.cause != "done":
            verdict = Verdict("cancelled", f"cancelled; {verdict.reason}", INTERRUPTED_EXIT_CODE)
        outcome = Outcome(verdict, hosts, outcome.last_step, outcome.save_s)
        if job != PREFLIGHT or verdict.cause != "done":
            self._ended(verdict.exit_code, verdict.reason, verdict.cause, hosts, outcome)
        return outcome

    def _after(self, outcome: Outcome) -> int | None:
        """What follows an attempt: the exit code where this process ends; none for another attempt here."""
        verdict = outcome.verdict
        self.follow_ups.see()
        if verdict.cause in ("done", "cancelled") or verdict.exit_code in attempts.FINAL:
            return self._finish(verdict.exit_code, verdict.reason, verdict.cause)
        if verdict.cause == "stopped":
            return self._requeue(self._stop_reason or verdict.reason)
        if verdict.cause == "node_lost":
            return self._requeue(verdict.reason)
        return None

    # -- taking over -----------------------------------------------------------------------------------------------

    def _nothing_to_do(self, events: Sequence[Event]) -> int | None:
        """The exit code where the job needs no supervisor any more: a guard whose run is at its end, or cancelled."""
        end = attempts.finished(events)
        if end is not None:
            same, requeued = end["job_id"] == self.job, self.restart > end["restart"]
            if not (end["cause"] == "cancelled" and same and requeued):  # what is cancelled is never requeued
                log.info("the job has finished (%s): nothing to do", end["cause"])
                return 0
        guarded = [str(e["guard_of"]) for e in events if e["event"] == "submitted" and e["job_id"] == self.job
                   and e.get("guard_of")]  # fmt: skip
        if guarded and self.restart == 0:
            with contextlib.suppress(UnavailableError):
                state = slurm.job_state(guarded[-1])
                if state == "CANCELLED":
                    log.info("job %s, which this one guards, was cancelled: nothing to do", guarded[-1])
                    self.log.add("finished", exit_code=INTERRUPTED_EXIT_CODE, reason="cancelled", cause="cancelled")
                    return 0
        return None

    def _predecessor_is_gone(self, job: str) -> bool:
        """Whether the job that holds the lease is gone; one that hands over to this one is waited for."""
        events = attempts.read(self.order.directory)
        expected = any(
            (event["job_id"] == job and event["event"] == "requeued" and event["how"] != "scontrol")
            or (event["job_id"] == self.job and event.get("guard_of") == job)
            for event in events
        )  # fmt: skip
        deadline = time.monotonic() + (HAND_OVER_S if expected else 5.0)
        while not (gone := lease.gone(job)) and time.monotonic() < deadline:
            time.sleep(1.0)
        return gone

    def _close_open_attempt(self, events: Sequence[Event]) -> None:
        """Note how the last attempt ended, where its supervisor could not: it was killed, or its node was lost."""
        begun = attempts.open_attempt(events)
        if begun is None:
            return
        again = begun["job_id"] == self.job
        cause = "node_lost" if again else "supervisor_died"
        reason = "SLURM requeued the job: a node was lost, or it was preempted" if again else "its supervisor died"
        running = [event for event in events if event["event"] == "running" and event["attempt"] == begun["attempt"]]
        self.log.add(
            "ended", exit_code=1, reason=reason, cause=cause, hosts=[], job_id=begun["job_id"],
            restart=begun["restart"], checkpoint=attempts.newest_checkpoint(self.order.run_dir),
            last_step=running[-1]["step"] if running else None,
        )  # fmt: skip

    def _wait_for_fence(self, events: Sequence[Event]) -> None:
        """A rank on a lost host that still lives ends itself when nobody has answered it for so long: not before."""
        if events and (ends := [event for event in events if event["event"] == "ended"]):
            left = ends[-1]["time"] + self.limits.silence_s - time.time()
            if ends[-1]["cause"] == "node_lost" and left > 0:
                log.info("waiting %.0f s, until no rank can live on the lost host", left)
                time.sleep(min(left, self.limits.silence_s))

    def _ensure_guard(self) -> None:
        """See that a guard is in the queue: a job that starts if this one ends in any way that it has not told."""
        self._next["guard"] = time.monotonic() + GUARD_S
        try:
            for event in attempts.read(self.order.directory):
                if event.get("guard_of") == self.job and slurm.job_state(event["job_id"], 10.0) == "PENDING":
                    self._next["guard"] = float("inf")
                    return
            guard = submit.submit(self.order, after=self.job)
        except UserError as error:
            log.warning("no guard is in the queue yet: %s", error)
            return
        self._next["guard"] = float("inf")
        self.log.add("submitted", job_id=guard, guard_of=self.job, restart=0, nodes=self.order.nodes,
                     processes_per_node=self.order.processes_per_node)  # fmt: skip

    # -- while ranks run -------------------------------------------------------------------------------------------

    def _stopping(self) -> tuple[bool, bool]:
        """Whether the ranks are to save and stop, and whether there is no time left for that. Does what is due."""
        now = time.monotonic()
        if self._due("see", SEE_S):
            self.follow_ups.see()
        if self._due("guard", GUARD_S):
            self._ensure_guard()
        if self._due("limit", LAST_S / 2 if self._stop_reason else LIMIT_S):
            self._limit = slurm.end_time(self.raw_job) or self._limit
            self._check_lease()
        left = float("inf") if self._limit is None else self._limit - time.time()
        if self._stop_reason is None:
            if self.signals.warned_at is not None:
                self._stop_reason = "SLURM's warning: preemption, the time limit, or a user's signal"
            elif left < self.lead_s:
                self._stop_reason = "the time limit is near"
            if self._stop_reason:
                log.info("%s; the ranks save and stop", self._stop_reason)
        if self.signals.ended_at is not None and self._stop_reason is None and not self._cancelled:
            state = None
            with contextlib.suppress(UnavailableError):
                state = slurm.job_state(self.raw_job, 5.0)
            self._cancelled = was_cancelled(self.signals.warned_at is not None, state, left < LAST_S)
            self._stop_reason = "cancelled" if self._cancelled else f"SIGTERM in state {state}"
            log.info("%s", self._stop_reason)
            if self._cancelled:  # at once: SLURM may give no more time
                self.log.add("finished", exit_code=INTERRUPTED_EXIT_CODE, reason="cancelled", cause="cancelled")
                self._cancel_guards()
        ended = self.signals.ended_at is not None and now - self.signals.ended_at > 120
        return self._stop_reason is not None, left < LAST_S or ended

    def _due(self, what: str, every_s: float) -> bool:
        if time.monotonic() < self._next.get(what, 0.0):
            return False
        self._next[what] = time.monotonic() + every_s
        return True

    def _check_lease(self) -> None:
        """End at once where another has taken over: this host was taken for lost."""
        holder = lease.read(self.order.directory)
        if holder is not None and holder.job_id not in (None, self.job):
            log.error("%s has taken over; this supervisor ends", holder.describe())
            os._exit(OutputError.exit_code)

    def _lost_hosts(self) -> list[str]:
        """The hosts that do not start a process, while the controller answers."""
        lost = slurm.silent_hosts(self.hosts)
        if lost:
            slurm.job_state(self.raw_job)
            lost = slurm.silent_hosts(lost)
        if host_name() in lost:  # where this very process runs: the probe tells nothing
            log.warning("no process can be started on %s by srun: the nodes are taken for sound", ", ".join(lost))
            return []
        return lost

    def _note_running(self, step: int | None) -> None:
        self.log.add("running", step=step)

    def _ended(self, code: int, reason: str, cause: str, hosts: list[str], outcome: Outcome | None = None) -> None:
        log.info("ended: %s: %s", cause, reason)
        saved = {"save_s": round(outcome.save_s, 3)} if outcome is not None and outcome.save_s is not None else {}
        self.log.add(
            "ended", exit_code=code, reason=reason, cause=cause, hosts=hosts,
            checkpoint=attempts.newest_checkpoint(self.order.run_dir),
            last_step=outcome.last_step if outcome is not None else None, **saved,
        )  # fmt: skip

    # -- the end ---------------------------------------------------------------------------------------------------

    def _give_up(self, events: Sequence[Event]) -> int:
        ends = [event for event in events if event["event"] == "ended"]
        report = attempts.report(events)
        reason = f"{self.config.launch.attempts} failures without a new checkpoint (launch.attempts); the last: "
        log.error("given up: %s\n%s", reason + ends[-1]["reason"], report)
        code = int(ends[-1]["exit_code"])
        return self._finish(code or 1, reason + ends[-1]["reason"], "gave_up")

    def _finish(self, code: int, reason: str, cause: str) -> int:
        """End for good: nothing starts this job again but a user."""
        if attempts.finished(attempts.read(self.order.directory)) is None:
            self.log.add("finished", exit_code=code, reason=reason, cause=cause)
        self._cancel_guards()
        lease.release(self.order.directory, self.job)
        log.info("finished: %s: %s", cause, reason)
        return code

    def _cancel_guards(self) -> None:
        for event in attempts.read(self.order.directory):
            if event.get("guard_of") and event["job_id"] != self.job:
                try:
                    if slurm.job_state(event["job_id"], 10.0) == "PENDING":
                        slurm.cancel(event["job_id"])
                except UnavailableError as error:
                    log.warning("guard %s is not cancelled (%s); it will find the job finished", event["job_id"], error)

    def _requeue(self, reason: str) -> int:
        """Have the job start again: by scontrol, or as a successor, or else by the guard, which a failure wakes."""
        log.info("requeueing: %s", reason)
        excluded = attempts.hosts_to_exclude(attempts.read(self.order.directory))
        try:
            self.log.add("requeued", how="scontrol", reason=reason)
            slurm.requeue(self.raw_job)
            slurm.exclude(self.raw_job, excluded, self.order.nodes)
            return INTERRUPTED_EXIT_CODE
        except UnavailableError as error:
            log.warning("%s", error)
        try:
            successor = submit.submit(self.order)
            self.log.add("requeued", how="sbatch", reason=reason)
            # exit code 0: the guard's dependency fails, and it is dropped
            self.log.add("submitted", job_id=successor, restart=0, guard_of=self.job, nodes=self.order.nodes,
                         processes_per_node=self.order.processes_per_node)  # fmt: skip
            return 0
        except UserError as error:
            log.warning("%s", error)
        self.log.add("requeued", how="guard", reason=reason)
        return INTERRUPTED_EXIT_CODE


def serve(hosts: list[str], silence_s: float) -> tuple[str, BeatServer]:
    """A server for the ranks' beats, and the name that they reach it by.

    It listens on the address that this host's name has; on all where that is the machine's own, while others need it.
    """
    name = host_name()

    def is_loopback(host: str) -> bool:
        try:
            return socket.gethostbyname(host).startswith("127.")
        except OSError:
            return False

    try:
        address = socket.gethostbyname(name)
    except OSError:
        address, name = "", socket.gethostname()
    if address.startswith("127.") and not all(is_loopback(host) for host in hosts):
        address = ""
    try:
        return name, BeatServer(address, silence_s)
    except OSError:
        return name, BeatServer("", silence_s)
