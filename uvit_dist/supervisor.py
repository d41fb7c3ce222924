"""The batch process of a SLURM job: it starts the ranks, watches them, starts them again, and owns requeueing.

What it decides follows from ``attempts.jsonl`` alone, so that whoever takes over, after a requeue or as a guard, goes
on where it was. A failure of a rank is mended in the allocation, a lost node by requeueing; a stop (preemption, the
time limit, a signal) saves and requeues; a mistake, or ``launch.attempts`` failures without a checkpoint, end the job.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from typing import Any

from uvit_dist import attempts, beats, health, lease, run_state, slurm
from uvit_dist.attempts import AttemptLog
from uvit_dist.config_cluster import Order, read_order
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import INTERRUPTED_EXIT_CODE, OutputError, UserError
from uvit_dist.follow_ups import FollowUps
from uvit_dist.notices import Notices
from uvit_dist.rounds import Outcome, Round
from uvit_dist.succession import Succession
from uvit_dist.verdicts import FAILURES, Limits, Verdict
from uvit_dist.watchdog import host_name

INDEPENDENT = ("precompute", "evaluate", "reference")
"""Jobs whose ranks can do without each other."""
PREFLIGHT = "preflight"
"""The job of a step before the first attempt in an allocation: ranks talk, and are timed (``launch.preflight``)."""
SEE_S, LEASE_S = 5.0, 30.0
"""Seconds between looks at new checkpoints and for a missing guard; and at the lease."""
log = logging.getLogger("uvit_dist.supervisor")


def supervise(order_path: str) -> int:
    """Run an order's job to its end, or to its requeueing. Returns the exit code of the batch process."""
    notices = Notices()  # first: SLURM may have given warning already
    set_up_logging()
    try:
        return Supervisor(read_order(order_path), notices).run()
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


class Supervisor:
    """One allocation's worth of a job."""

    def __init__(self, order: Order, notices: Notices) -> None:
        self.order, self.notices = order, notices
        config = load_config(order.config)
        launch, self.leave_out_slow = config.launch, config.stragglers.exclude
        self.limits = Limits(launch.silence_s, launch.hang_s, launch.start_s)
        self.most_failures = launch.attempts
        self.preflight = launch.preflight and order.nodes > 1 and order.job == "train"
        self.record = AttemptLog(order.directory)
        self.succession, self.follow_ups = Succession(order, self.record), FollowUps(order)
        self.hosts = slurm.hosts()
        self._see_at, self._lease_at = 0.0, time.monotonic() + LEASE_S

    def run(self) -> int:
        """Take over, then attempt after attempt. Returns the exit code."""
        if not self.succession.take_over(self.limits.silence_s):
            return 0
        self.record.add("started", hosts=self.hosts)
        log.info("job %s on %s", self.succession.job, ", ".join(self.hosts))
        self.notices.know_the_limit(self.order.profile.lead_s(attempts.longest_save_s(self._events())))
        self.succession.ensure_guard()
        self.address, self.server = beats.serve(host_name(), self.hosts, self.limits.silence_s)
        try:
            while (code := self._next()) is None:
                pass
            return code
        finally:
            self.server.close()

    def _events(self) -> list[attempts.Event]:
        return list(attempts.read(self.order.directory))

    def _next(self) -> int | None:
        """One attempt and what follows from it: the exit code where this process ends; none for another attempt."""
        events = self._events()
        if attempts.failures_without_progress(events) >= self.most_failures:
            return self._give_up(events)
        slurm.job_state(self.succession.job)  # waits for the controller: no attempt is wasted while it is away
        self._stopping()
        if self.notices.cancelled:
            return self._finish(Verdict("cancelled", "cancelled", INTERRUPTED_EXIT_CODE))
        if self.notices.reason is not None:
            return self.succession.requeue(self.notices.reason)
        if lost := self._lost_hosts():
            self._note_end(Outcome(_lost("", lost), lost, None, None))
            return self.succession.requeue(f"lost {', '.join(lost)}")
        if self.preflight:
            outcome = self._check_ranks(attempts.number_of_attempts(events))
            self.preflight = outcome.verdict.cause != "done"
            if not self.preflight:
                return None
        else:
            outcome = self._attempt()
        self._note_end(outcome)
        self.follow_ups.see()
        verdict = outcome.verdict
        if verdict.cause in ("done", "cancelled") or verdict.exit_code in attempts.FINAL:
            return self._finish(verdict)
        if verdict.cause in ("stopped", "node_lost", "hardware"):
            return self.succession.requeue(self.notices.reason or verdict.reason)
        return None

    # -- an attempt ------------------------------------------------------------------------------------------------

    def _attempt(self) -> Outcome:
        """Run the ranks of the job once."""
        from_step = attempts.newest_checkpoint(self.order.run_dir)
        world_size = len(self.hosts) * self.order.processes_per_node
        number = self.record.add("attempt", hosts=self.hosts, world_size=world_size, from_step=from_step)["attempt"]
        where = "the beginning" if from_step is None else f"the checkpoint of step {from_step}"
        log.info("attempt %d: %s on %d ranks, from %s", number, self.order.job, world_size, where)
        return self._step(self.order.job, number)

    def _check_ranks(self, number: int) -> Outcome:
        """The ranks try each other out before the first attempt in an allocation: failing hosts are as good as lost."""
        began = time.time()
        outcome = self._step(PREFLIGHT, number)
        found = run_state.preflight(self.order.directory)
        if outcome.verdict.cause != "done" and found and found["failing"] and found["time"] >= began:
            verdict = replace(outcome.verdict, cause="node_lost", exit_code=1)
            return replace(outcome, verdict=verdict, hosts=list(found["failing"]))
        return outcome

    def _step(self, job: str, number: int) -> Outcome:
        outcome = Round(
            self.order,
            job,
            self.hosts,
            number,
            self.server,
            self.address,
            self.limits,
            self._stopping,
            lambda step: None if job == PREFLIGHT else self._note_running(step),
            job in INDEPENDENT,
        ).run()
        verdict = outcome.verdict
        if verdict.cause in FAILURES and verdict.exit_code not in attempts.FINAL:
            if lost := self._lost_hosts():
                outcome = replace(outcome, verdict=_lost(f"{verdict.reason}; ", lost), hosts=lost)
            elif slurm.fate(self.succession.job) == "requeued":
                told = f"{verdict.reason}; SLURM has requeued the job: a node failed, or it was preempted"
                outcome = replace(outcome, verdict=Verdict("node_lost", told, 1))
        if self.notices.cancelled and verdict.cause != "done":
            ended = Verdict("cancelled", f"cancelled; {verdict.reason}", INTERRUPTED_EXIT_CODE)
            outcome = replace(outcome, verdict=ended)
        return outcome

    def _stopping(self) -> tuple[bool, bool]:
        """Whether the ranks are to save and stop, and whether there is no time left for that. Does what is due."""
        now = time.monotonic()
        if now >= self._see_at:
            self._see_at = now + SEE_S
            self.follow_ups.see()
            self.succession.ensure_guard()
        if now >= self._lease_at:
            self._lease_at = now + LEASE_S
            self._check_lease()
        was_cancelled = self.notices.cancelled
        stop, end = self.notices.look()
        if self.notices.cancelled and not was_cancelled:  # at once: SLURM may give no more time
            self._note_finished(INTERRUPTED_EXIT_CODE, "cancelled", "cancelled")
        return stop, end

    def _check_lease(self) -> None:
        """End at once where another has taken over: this host was taken for lost."""
        holder = lease.read(self.order.directory)
        if holder is not None and holder.job_id not in (None, self.succession.job):
            log.error("%s has taken over; this supervisor ends", holder.describe())
            os._exit(OutputError.exit_code)

    def _lost_hosts(self) -> list[str]:
        return slurm.lost_hosts(self.succession.job, self.hosts, host_name())

    # -- the record ------------------------------------------------------------------------------------------------

    def _note_running(self, step: int | None) -> None:
        self.record.add("running", step=step)

    def _note_end(self, outcome: Outcome) -> None:
        verdict = outcome.verdict
        log.info("ended: %s: %s", verdict.cause, verdict.reason)
        more: dict[str, Any] = {} if outcome.save_s is None else {"save_s": round(outcome.save_s, 3)}
        if self.order.job in INDEPENDENT and outcome.last_step:
            more["progressed"] = True  # units of work are done, though there are no checkpoints
        begun = attempts.open_attempt(self._events())
        if self.leave_out_slow and begun is not None:
            more["slow_hosts"] = health.slow_hosts(self.order.run_dir, begun["time"])
        self.record.add(
            "ended",
            exit_code=verdict.exit_code,
            reason=verdict.reason,
            cause=verdict.cause,
            hosts=outcome.hosts,
            checkpoint=attempts.newest_checkpoint(self.order.run_dir),
            last_step=outcome.last_step,
            **more,
        )

    def _note_finished(self, code: int, reason: str, cause: str) -> None:
        if attempts.finished(self._events()) is None:
            self.record.add("finished", exit_code=code, reason=reason, cause=cause)
        self.succession.cancel_guards()

    # -- the end ---------------------------------------------------------------------------------------------------

    def _give_up(self, events: list[attempts.Event]) -> int:
        ends = [event for event in events if event["event"] == "ended"]
        code, last = (ends[-1]["exit_code"], ends[-1]["reason"]) if ends else (1, "no attempt was made")
        reason = f"{self.most_failures} failures in a row without a new checkpoint (launch.attempts)"
        report = attempts.report(events)
        log.error("given up: %s\n%s", reason, report)
        return self._finish(Verdict("gave_up", f"{reason}; the last: {last}", code or 1))

    def _finish(self, verdict: Verdict) -> int:
        """End for good: nothing starts this job again but a user."""
        self._note_finished(verdict.exit_code, verdict.reason, verdict.cause)
        lease.release(self.order.directory, self.succession.job)
        log.info("finished: %s: %s", verdict.cause, verdict.reason)
        return verdict.exit_code


def _lost(before: str, hosts: list[str]) -> Verdict:
    return Verdict("node_lost", f"{before}no process starts on {', '.join(hosts)}", 1)
