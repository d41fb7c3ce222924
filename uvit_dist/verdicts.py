"""What the heartbeats mean: whether a step of ranks is to be ended, and why it ended. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uvit_dist.attempts import FINAL
from uvit_dist.beats import RankView, alive
from uvit_dist.errors import HANG_EXIT_CODE, INTERRUPTED_EXIT_CODE, HardwareError

GONE_S = 5.0
"""Seconds that a rank whose connection broke has to come back, where its step still runs."""
GRACE_S = 10.0
"""Seconds that the others have to tell of their own error after a rank has ended with one."""
TOGETHER_S = 0.3
"""Ends so close together are told in any order: one that was killed is then the cause, the others lost their peer."""
STARTING = ("", "starting", "joining", "preparing", "first step")
"""Phases that may take ``start_s``: imports, resuming, compiling."""
BOUNDED_BY_ITSELF = ("copying",)
"""Phases of one rank alone, whose requests to a server have limits of their own."""
FAILURES = ("rank_died", "error", "silent", "hang", "hardware")
"""Causes that another attempt may mend, in order of how sure they are."""
ENDED_WELL = (0, INTERRUPTED_EXIT_CODE)


@dataclass(frozen=True)
class Limits:
    """Seconds: without a beat; without progress; the same while ranks start."""

    silence_s: float
    hang_s: float
    start_s: float

    def of(self, phase: str) -> float:
        """The longest that a phase may go without progress."""
        if phase in BOUNDED_BY_ITSELF:
            return float("inf")
        return self.start_s if phase in STARTING else self.hang_s


@dataclass(frozen=True)
class Verdict:
    """Why a step ended, or is to be. ranks: those blamed. cause: as in attempts.jsonl."""

    cause: str
    reason: str
    exit_code: int
    ranks: tuple[int, ...] = ()


def judge(views: Sequence[RankView], now: float, began: float, limits: Limits, independent: bool) -> Verdict | None:
    """Whether a step that runs is to be ended. now, began: monotonic seconds.

    independent: whether ranks can do without each other; then only when none of them works any more.
    """
    troubled = {view.rank: found for view in views if (found := _trouble(view, now, began, limits)) is not None}
    if independent:
        waited_for = {view.rank for view in views if view.end is None}
        if not waited_for or waited_for - troubled.keys():
            return None
    for cause in FAILURES:
        ranks = [view for view in views if troubled.get(view.rank, ("",))[0] == cause]
        if cause == "hang" and ranks:  # found first where it is waited for, by up to a beat
            ranks = furthest_behind(ranks if independent else list(alive(views)))
        if ranks:
            told = (troubled.get(view.rank, ("", _standing(view, now)))[1] for view in ranks[:4])
            reasons = "; ".join(told)
            more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
            code = HANG_EXIT_CODE if cause in ("silent", "hang") else 1
            return Verdict(cause, reasons + more, code, tuple(view.rank for view in ranks))
    return None


def _trouble(view: RankView, now: float, began: float, limits: Limits) -> tuple[str, str] | None:
    """(cause, reason) for which a rank cannot be waited for any longer, or none."""
    who = f"rank {view.rank}" + (f" on {view.host}" if view.host else "")
    if view.end is not None:
        assert view.ended_at is not None
        late = view.end[0] not in ENDED_WELL and now - view.ended_at > GRACE_S
        return ("error", f"{who} ended with {view.end[0]}: {view.end[1]}") if late else None
    if view.gone_at is not None:
        return ("rank_died", f"{who} was killed, or its host is lost") if now - view.gone_at > GONE_S else None
    if not view.connected:
        late = now - began > limits.start_s
        return ("hang", f"{who} did not start within {limits.start_s:g} s") if late else None
    if now - view.heard_at > limits.silence_s:
        return "silent", f"{who} has been silent for {now - view.heard_at:.0f} s, while {_where(view)}"
    if now - view.progressed_at > limits.of(view.phase):
        return "hang", _standing(view, now)
    return None


def _standing(view: RankView, now: float) -> str:
    who = f"rank {view.rank} on {view.host}"
    return f"{who} has stood still for {now - view.progressed_at:.0f} s, while {_where(view)}"


def _where(view: RankView) -> str:
    return (view.phase or "starting") + ("" if view.step is None else f" after step {view.step}")


def furthest_behind(views: Sequence[RankView]) -> list[RankView]:
    """Those of the least progress: the others wait for them."""
    least = min(((view.connected, view.count) for view in views), default=None)
    return [view for view in views if (view.connected, view.count) == least]


def verdict_of_end(
    views: Sequence[RankView], srun_code: int, judged: Verdict | None, stopping: bool, independent: bool
) -> Verdict:
    """Why a step ended. srun_code: its exit code; judged: for what it was ended, if it was; stopping: it was asked to.

    independent: a rank that is done then says that all is.
    """
    ends = {view.rank: view.end for view in views if view.end is not None}
    codes = [end[0] for end in ends.values()]
    if (independent and 0 in codes) or (len(codes) == len(views) and not any(codes)):
        return Verdict("done", "done", 0)
    for view in views:
        if view.end is not None and view.blamed:
            return Verdict("hardware", view.end[1], HardwareError.exit_code, view.blamed)
    mistakes = [(rank, end) for rank, end in ends.items() if end[2]]
    if mistakes:
        told = "; ".join(dict.fromkeys(end[1] for _, end in mistakes))
        code = next((end[0] for _, end in mistakes if end[0] in FINAL), mistakes[0][1][0])
        return Verdict(FINAL.get(code, "error"), told, code)
    if stopping or (len(codes) == len(views) and all(code in ENDED_WELL for code in codes)):
        saved = len(codes) == len(views) and all(code in ENDED_WELL for code in codes)
        return Verdict("stopped", "stopped, and saved" if saved else "stopped before it had saved", 75)
    if judged is not None and judged.cause != "error":
        return judged
    return _first_end(views, srun_code)


def _first_end(views: Sequence[RankView], srun_code: int) -> Verdict:
    """The rank that ended first, of those that failed: one that was killed before those that lost their peer."""
    failed = [view for view in views if view.gone_at is not None or (view.end and view.end[0] not in ENDED_WELL)]
    if not failed:
        seen = sum(1 for view in views if view.heard_at)
        told = f"srun ended with {srun_code}; {seen} of {len(views)} ranks had started, see the job's log"
        return Verdict(FINAL.get(srun_code, "error"), told, srun_code or 1)
    first = min(_ended_at(view) for view in failed)
    together = [view for view in failed if _ended_at(view) <= first + TOGETHER_S]
    view = min(together, key=lambda view: (view.gone_at is None, _ended_at(view)))
    if view.end is None:
        return Verdict("rank_died", f"rank {view.rank} on {view.host} was killed while {_where(view)}", 1, (view.rank,))
    code, message, _ = view.end
    cause = "silent" if code == HANG_EXIT_CODE else "error"
    return Verdict(cause, f"rank {view.rank} on {view.host}: {message}", code, (view.rank,))


def _ended_at(view: RankView) -> float:
    return min(time for time in (view.gone_at, view.ended_at) if time is not None)
