"""What heartbeats mean."""

import pytest

from uvit_dist.beats import RankView
from uvit_dist.verdicts import Limits, Verdict, judge, verdict_of_end

LIMITS = Limits(silence_s=10, hang_s=50, start_s=300)


def view(rank, **fields):
    """A rank that beats and trains at time 100, on a host of its own."""
    plain = {"host": f"n{rank}", "connected": True, "heard_at": 99.5, "progressed_at": 95.0, "count": 7, "step": 6,
             "phase": "training"}  # fmt: skip
    return RankView(rank, **{**plain, **fields})


def ended(rank, code, message="", mistake=False, at=90.0):
    return view(rank, end=(code, message, mistake), ended_at=at, connected=False)


def gone(rank, at):
    return view(rank, gone_at=at, connected=False)


def judged(*views, independent=False, now=100.0):
    return judge(views, now, 0.0, LIMITS, independent)


def test_ranks_that_beat_and_advance_are_let_be():
    assert judged(view(0), view(1)) is None
    assert judged(view(0), ended(1, 0, at=1.0)) is None
    assert judged(view(0), gone(1, 97.0)) is None, "it may come back"
    assert judged(view(0), ended(1, 1, at=95.0)) is None, "the others may tell of their own error"
    assert judged(RankView(0), view(1)) is None, "it may still start"


@pytest.mark.parametrize(
    ("other", "cause", "words"),
    [
        (gone(1, 94.0), "rank_died", "rank 1 on n1 was killed"),
        (view(1, heard_at=89.0), "silent", "rank 1 on n1 has been silent for 11 s, while training after step 6"),
        (view(1, progressed_at=49.0, count=6, phase="reading"), "hang", "stood still for 51 s, while reading"),
        (ended(1, 1, "boom", at=89.0), "error", "rank 1 on n1 ended with 1: boom"),
    ],
)
def test_a_rank_that_cannot_be_waited_for_is_named(other, cause, words):
    verdict = judged(view(0), other, view(2))
    assert (verdict.cause, verdict.ranks) == (cause, (1,))
    assert words in verdict.reason


def test_of_ranks_that_all_stand_still_the_one_behind_is_blamed():
    stuck = [view(rank, progressed_at=40.0, count=8) for rank in range(4)]
    stuck[2] = view(2, progressed_at=39.0, count=7, phase="reading")
    assert judged(*stuck).ranks == (2,)
    stuck[2] = view(2, progressed_at=51.0, count=7, phase="reading")  # told of its last progress a beat later
    verdict = judged(*stuck)
    assert verdict.ranks == (2,)
    assert "rank 2 on n2 has stood still for 49 s, while reading after step 6" in verdict.reason


def test_starting_has_a_bound_of_its_own_and_copying_none():
    assert judged(view(0, phase="preparing", progressed_at=1.0)) is None
    assert judged(view(0, phase="preparing", progressed_at=1.0, heard_at=301.5), now=302.0).cause == "hang"
    assert judged(view(0, phase="copying", progressed_at=1.0, heard_at=9999.0), now=10_000.0) is None
    assert judged(RankView(0), view(1, heard_at=300.5, progressed_at=300.0), now=301.0).ranks == (0,)


def test_independent_ranks_are_waited_for_while_one_works():
    assert judged(view(0), gone(1, 1.0), view(2, heard_at=1.0), independent=True) is None
    assert judged(ended(0, 1, at=1.0), gone(1, 1.0), independent=True).cause == "rank_died"
    assert judged(ended(0, 0, at=1.0), view(1, heard_at=1.0), independent=True).cause == "silent"


def end(*views, srun=1, verdict=None, stopping=False, independent=False):
    return verdict_of_end(views, srun, verdict, stopping, independent)


def test_why_a_step_ended():
    assert end(ended(0, 0), ended(1, 0), srun=0).cause == "done"
    assert end(ended(0, 75), ended(1, 75)).cause == "stopped"
    assert end(ended(0, 75), ended(1, 0)).cause == "stopped"
    assert end(gone(0, 1.0), ended(1, 1), stopping=True).reason == "stopped before it had saved"
    hang = Verdict("hang", "rank 1 stood still", 74, (1,))
    assert end(view(0), view(1), verdict=hang) is hang
    died = end(ended(0, 1, "Connection closed by peer", at=90.1), gone(1, 90.2))
    assert (died.cause, died.ranks) == ("rank_died", (1,)), "told together, the one that was killed is the cause"
    raised = end(gone(0, 92.0), ended(1, 1, "RuntimeError: boom", at=90.0))
    assert (raised.cause, raised.ranks) == ("error", (1,))
    assert "RuntimeError: boom" in raised.reason
    assert end(ended(0, 1, at=50), ended(1, 74, "alone", at=40)).cause == "silent"


@pytest.mark.parametrize(
    ("code", "cause"), [(65, "data"), (66, "data"), (70, "divergence"), (78, "config"), (73, "error"), (69, "error")]
)
def test_a_mistake_is_told_by_its_code(code, cause):
    verdict = end(ended(0, code, "mend it", mistake=True), ended(1, 1, "lost its peer", at=80.0))
    assert (verdict.cause, verdict.exit_code, verdict.reason) == (cause, code, "mend it")


def test_ranks_that_never_came():
    assert end(RankView(0), RankView(1), srun=78).cause == "config"
    verdict = end(RankView(0), RankView(1), srun=127)
    assert (verdict.cause, verdict.exit_code) == ("error", 127)
    assert "0 of 2 ranks had started" in verdict.reason


def test_one_independent_rank_that_is_done_says_that_all_is():
    assert end(ended(0, 0), gone(1, 1.0), independent=True).cause == "done"
    assert end(ended(0, 1, "x"), gone(1, 1.0), independent=True).cause == "rank_died"
