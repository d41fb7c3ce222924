"""Which SLURM job runs a job of ours: taking over from the one before, and seeing that another follows.

Before a job's supervisor begins, nothing of the one before it may live. After it there is, by order of preference: the
same job, requeued; a successor that it submits; or its guard, a job submitted beforehand that starts if this one fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence

from uvit_dist import attempts, lease, slurm, submit
from uvit_dist.attempts import AttemptLog, Event
from uvit_dist.config_cluster import Order
from uvit_dist.errors import INTERRUPTED_EXIT_CODE, UnavailableError, UserError

HAND_OVER_S, ENDING_S = 180.0, 5.0
"""Seconds that a successor or guard waits until the job before it is gone; and that any other job does."""
GUARD_S = 60.0
"""Seconds between two tries to submit a guard."""
log = logging.getLogger("uvit_dist.supervisor")


class Succession:
    """The jobs before and after this one, of one order. job: this one's id."""

    def __init__(self, order: Order, record: AttemptLog) -> None:
        self._order, self._record = order, record
        self.job = attempts.this_job() or ""
        self._raw_job = os.environ["SLURM_JOB_ID"]
        self._restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._guarded, self._try_at = False, 0.0

    def _events(self) -> list[Event]:
        return list(attempts.read(self._order.directory))

    # -- before ----------------------------------------------------------------------------------------------------

    def take_over(self, silence_s: float) -> bool:
        """Take the lease, when nothing of the job before lives any more; note how its last attempt ended.

        Returns whether there is something to do. silence_s: a rank that no supervisor answers for so long ends itself.
        Raises ``OutputError`` where another job holds the lease, ``UnavailableError``.
        """
        lease.confirm(self._order.directory, self.job, self._is_gone)  # first: a launcher may still write the events
        events = self._events()
        if self._nothing_to_do(events):
            lease.release(self._order.directory, self.job)
            return False
        self._close_open_attempt(events)
        ends = [event for event in events if event["event"] == "ended"]
        if ends and ends[-1]["cause"] == "node_lost":
            left = min(ends[-1]["time"] + silence_s - time.time(), silence_s)
            if left > 0:
                log.info("waiting %.0f s, until no rank can live on the lost host", left)
                time.sleep(left)
        return True

    def _nothing_to_do(self, events: Sequence[Event]) -> bool:
        """Whether no supervisor is needed any more: a guard whose run is at its end, or was cancelled."""
        end = attempts.finished(events)
        if end is not None:
            # SLURM never requeues what a user has cancelled: it was no cancellation
            requeued = end["job_id"] == self.job and self._restart > end["restart"]
            if not (end["cause"] == "cancelled" and requeued):
                log.info("the job has finished (%s): nothing to do", end["cause"])
                return True
        mine = [event for event in events if event["event"] == "submitted" and event["job_id"] == self.job]
        before = mine[-1].get("guard_of") if mine else None
        if before and self._restart == 0 and not attempts.handed_over(events, before):
            waited = events[-1]["event"] == "requeued" and events[-1]["job_id"] == before
            with contextlib.suppress(UnavailableError):
                state = slurm.job_state(before)
                # SLURM forgets jobs; one that was gone while it waited in the queue has been cancelled there
                if state == "CANCELLED" or (state is None and waited):
                    reason = f"job {before} was cancelled"
                    log.info("%s: nothing to do", reason)
                    self._record.add(
                        "finished", exit_code=INTERRUPTED_EXIT_CODE, reason=reason, cause="cancelled"
                    )  # fmt: skip
                    return True
        return False

    def _is_gone(self, job: str) -> bool:
        """Whether the job that holds the lease is gone. One that hands over to this one is waited for."""
        handed_over = any(
            (event["job_id"] == job and event["event"] == "requeued" and event["how"] != "scontrol")
            or (event["job_id"] == self.job and event.get("guard_of") == job)
            for event in self._events()
        )
        deadline = time.monotonic() + (HAND_OVER_S if handed_over else ENDING_S)
        while not (gone := lease.gone(job)) and time.monotonic() < deadline:
            time.sleep(1.0)
        return gone

    def _close_open_attempt(self, events: Sequence[Event]) -> None:
        """Note how the last attempt ended, where its supervisor could not: it was killed, or its node was lost."""
        begun = attempts.open_attempt(events)
        if begun is None:
            return
        requeued = begun["job_id"] == self.job
        reason = "SLURM requeued the job: a node was lost, or it was preempted" if requeued else "its supervisor died"
        running = [event for event in events if event["event"] == "running" and event["attempt"] == begun["attempt"]]
        self._record.add(
            "ended", exit_code=1, reason=reason, cause="node_lost" if requeued else "supervisor_died", hosts=[],
            job_id=begun["job_id"], restart=begun["restart"], attempt=begun["attempt"],
            checkpoint=attempts.newest_checkpoint(self._order.run_dir),
            last_step=running[-1]["step"] if running else None,
        )  # fmt: skip

    # -- after -----------------------------------------------------------------------------------------------------

    def ensure_guard(self) -> None:
        """See that a guard is in the queue: a job that starts if this one ends in any way that it has not told."""
        if self._guarded or time.monotonic() < self._try_at:
            return
        self._try_at = time.monotonic() + GUARD_S
        try:
            guards = [event["job_id"] for event in self._events() if event.get("guard_of") == self.job]
            if not any(slurm.job_state(guard, 10.0) == "PENDING" for guard in guards):
                self._note_submitted(submit.submit(self._order, self.job, self._excluded()))
        except UserError as error:
            log.warning("no guard is in the queue yet: %s", error)
            return
        self._guarded = True

    def _excluded(self) -> list[str]:
        """Hosts that failed, where enough are left without them."""
        return slurm.spared(attempts.hosts_to_exclude(self._events()), self._order.all_nodes)

    def _note_submitted(self, job: str) -> None:
        self._record.add(
            "submitted", job_id=job, restart=0, guard_of=self.job, nodes=self._order.nodes,
            spares=self._order.spares, processes_per_node=self._order.processes_per_node,
        )  # fmt: skip

    def cancel_guards(self) -> None:
        """Take the guards out of the queue: the job has come to its end."""
        for event in self._events():
            if event.get("guard_of") and event["job_id"] != self.job:
                guard = event["job_id"]
                try:
                    if slurm.job_state(guard, 10.0) == "PENDING":
                        slurm.cancel(guard)
                except UnavailableError as error:
                    log.warning("guard %s is not cancelled (%s); it will find the job finished", guard, error)

    def requeue(self, reason: str) -> int:
        """Have the job start again: by scontrol, or as a successor, or else by the guard, which a failure wakes.

        Returns the exit code to end with.
        """
        log.info("requeueing: %s", reason)
        try:
            if slurm.fate(self._raw_job) == "requeued":  # as it does with preempted jobs, and where a node fails
                self._record.add("requeued", how="slurm", reason=reason)
                return INTERRUPTED_EXIT_CODE
            slurm.require_scontrol()
            self._record.add("requeued", how="scontrol", reason=reason)  # before: SLURM ends this process
            excluded = self._excluded()  # before: SLURM's SIGTERM ends a command that is under way, too
            slurm.requeue(self._raw_job)
            slurm.exclude(self._raw_job, excluded)
            return INTERRUPTED_EXIT_CODE
        except UnavailableError as error:
            log.warning("%s", error)
        try:
            successor = submit.submit(self._order, exclude=self._excluded())
        except UserError as error:
            log.warning("no successor: %s; the guard goes on", error)
            self._record.add("requeued", how="guard", reason=reason)
            return INTERRUPTED_EXIT_CODE
        self._record.add("requeued", how="sbatch", reason=reason)
        self._note_submitted(successor)
        return 0  # so that the guard's dependency fails, and it is dropped
