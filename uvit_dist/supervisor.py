"""The batch process of a SLURM job: it starts the ranks, watches them, starts them again, and owns requeueing.

What it decides follows from ``attempts.jsonl`` alone, so that whoever takes over, after a requeue or as a guard, goes
on where it was. A failure of a rank is mended in the allocation; a lost node by a spare, by fewer nodes where the
configuration allows that, or by requeueing (``placement``); a stop (preemption, the
time limit, a signal) saves and requeues; a mistake, or ``launch.attempts`` failures without a checkpoint, end the job.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from typing import Any

from uvit_dist import attempts, beats, health, lease, run_state, sentry, slurm
from uvit_dist.attempts import AttemptLog
from uvit_dist.config_cluster import Order, read_order
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import INTERRUPTED_EXIT_CODE, OutputError, UserError
from uvit_dist.follow_ups import FollowUps
from uvit_dist.notices import Notices
from uvit_dist.placement import Placement, place
from uvit_dist.rounds import Outcome, Round
from uvit_dist.succession import Succession
from uvit_dist.verdicts import FAILURES, Limits, Verdict
from uvit_dist.watchdog import BEAT_S, CONNECT_S, host_name

INDEPENDENT = ("precompute", "evaluate", "reference")
"""Jobs whose ranks can do without each other."""
PREFLIGHT = "preflight"
"""The job of a step before the first attempt in an allocation: ranks talk, and are timed (``launch.preflight``)."""
SEE_S, LEASE_S = 5.0, 30.0
"""Seconds between looks at new checkpoints and for a missing guard; and at the lease, and for dead sentries."""
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
        self.allocation, self.lost = slurm.hosts(), set[str]()
        self.placement = Placement(tuple(self.allocation[: order.nodes]))
        self.checked, self.sentries = frozenset[str](), sentry.Sentries(order)
        self._see_at, self._lease_at = 0.0, time.monotonic() + LEASE_S

    def run(self) -> int:
        """Take over, then attempt after attempt. Returns the exit code."""
        if not self.succession.take_over(self.limits.silence_s):
            return 0
        self.record.add("started", hosts=self.allocation)
        log.info("job %s on %s", self.succession.job, ", ".join(self.allocation))
        self.notices.know_the_limit(self.order.profile.lead_s(attempts.longest_save_s(self._events())))
        self.succession.ensure_guard()
        self.address, self.server = beats.serve(host_name(), self.allocation, self.limits.silence_s)
        try:
            while (code := self._next()) is None:
                pass
            return code
        finally:
            self.sentries.close()
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
        if lost := self._place(events):
            self._note_end(Outcome(_lost("", lost), lost, None, None))
            return self.succession.requeue(f"lost {', '.join(lost)}")
        if self.preflight and not self.checked.issuperset(self.hosts):
            outcome = self._check_ranks(attempts.number_of_attempts(events))
            if outcome.verdict.cause == "done":
                self.checked |= set(self.hosts)
                return None
        else:
            outcome = self._attempt()
        if outcome.verdict.cause == "node_lost" and outcome.hosts and self.order.no_kill:
            outcome = self._with_lost_spares(outcome)
        self._note_end(outcome)
        self.follow_ups.see()
        verdict = outcome.verdict
        if verdict.cause in ("done", "cancelled") or verdict.exit_code in attempts.FINAL:
            return self._finish(verdict)
        stays = {"node_lost": self._goes_on, "hardware": self._can_leave_out}.get(verdict.cause)
        if verdict.cause == "stopped" or (stays is not None and not stays(outcome)):
            return self.succession.requeue(self.notices.reason or verdict.reason)
        shrunk = len(self.hosts) < self.order.nodes
        if shrunk and attempts.failures_without_progress(self._events()) == self.most_failures - 1:
            return self.succession.requeue(f"{verdict.reason}; the last try is made on all nodes")
        return None

    # -- the hosts -------------------------------------------------------------------------------------------------

    @property
    def hosts(self) -> tuple[str, ...]:
        """Where the ranks run."""
        return self.placement.hosts

    def _place(self, events: list[attempts.Event]) -> list[str]:
        """Choose the hosts of the next step among those that start a process, spares as well. Returns those that are
        lost, where too few are left."""
        found = self._probe()
        placement = self._placement(events)
        if placement is None:
            return found or sorted(self.lost)
        if placement.hosts != self.hosts:
            told = f", without {', '.join(placement.left_out)}" if placement.left_out else ""
            log.info("the ranks run on %s%s", ", ".join(placement.hosts), told)
        self.placement = placement
        self._post_sentries()
        return []

    def _post_sentries(self) -> None:
        placement = self.placement
        left_out = [host for host in placement.left_out if host not in self.lost]
        self.sentries.post([*placement.spares, *placement.hosts, *left_out])

    def _probe(self) -> list[str]:
        """Try every host that is left in the allocation. Returns those that are lost now."""
        left = [host for host in self.allocation if host not in self.lost or host == host_name()]
        found = slurm.lost_hosts(self.succession.job, left, host_name())
        self.lost.update(found)
        return found

    def _with_lost_spares(self, outcome: Outcome) -> Outcome:
        """What ended a step may have struck hosts beside it: told in one, it is one failure."""
        self.lost.update(outcome.hosts)
        if not (others := self._probe()):
            return outcome
        verdict = _lost(f"{outcome.verdict.reason}; ", others)
        return replace(outcome, verdict=verdict, hosts=[*outcome.hosts, *others])

    def _placement(self, events: list[attempts.Event]) -> Placement | None:
        counts = (self.order.nodes, *self.order.shrinks_to)
        return place(self.allocation, self.lost, attempts.hosts_to_exclude(events), counts)

    def _can_leave_out(self, outcome: Outcome) -> bool:
        """Whether the allocation has enough hosts beside those that compute wrongly."""
        placement = self._placement(self._events())
        return placement is not None and not set(outcome.hosts) & set(placement.hosts)

    def _goes_on(self, outcome: Outcome) -> bool:
        """Whether the rest of the allocation will do, after a loss; then no rank lives on the lost hosts any more."""
        if not self.order.no_kill or not outcome.hosts or self.notices.reason is not None:
            return False
        if self._placement(self._events()) is None:
            return False
        if slurm.fate(self.succession.job) != "runs":  # SLURM requeues or ends it, whatever is left
            return False
        heard = [outcome.heard_at[host] for host in outcome.hosts if host in outcome.heard_at]
        # there they end themselves, when nobody has answered them for silence_s; they look after each beat
        until = max(heard, default=time.monotonic()) + self.limits.silence_s + BEAT_S + CONNECT_S
        left = max(0.0, until - time.monotonic())
        log.info("waiting %.0f s, until no rank can live on %s", left, ", ".join(outcome.hosts))
        while time.monotonic() < until and not any(self._stopping()):
            time.sleep(0.2)
        return True

    # -- an attempt ------------------------------------------------------------------------------------------------

    def _attempt(self) -> Outcome:
        """Run the ranks of the job once."""
        from_step = attempts.newest_checkpoint(self.order.run_dir)
        world_size, placement = len(self.hosts) * self.order.processes_per_node, self.placement
        number = self.record.add(
            "attempt", hosts=self.hosts, world_size=world_size, from_step=from_step, wanted=self.order.world_size,
            spares=placement.spares, stand_ins=placement.stand_ins, left_out=placement.left_out,
            lost=sorted(self.lost),
        )["attempt"]  # fmt: skip
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
            if self.order.no_kill:
                sentry.show_life(self.order)
        if now >= self._lease_at:
            self._lease_at = now + LEASE_S
            self._check_lease()
            self._post_sentries()
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
