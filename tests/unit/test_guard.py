"""The guard: a pure function of the losses that all ranks share, and the same after it went through JSON."""

import dataclasses
import json
import math
import statistics

import pytest

from uvit_dist.config import GuardConfig
from uvit_dist.guard import Guard, Verdict

APPLY, SKIP, DIVERGED = Verdict.APPLY, Verdict.SKIP, Verdict.DIVERGED
NOT_FINITE = [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]


def after(guard, *losses):
    for loss in losses:
        assert guard.judge(loss, 1.0) is APPLY
        guard = guard.applied(loss)
    return guard


@pytest.mark.parametrize(("loss", "norm"), NOT_FINITE)
def test_without_rules_what_is_not_finite_diverges_at_once_and_all_else_passes(loss, norm):
    guard = after(Guard(GuardConfig()), *[1.0] * 200, 1e30)
    assert guard.judge(loss, norm) is DIVERGED
    assert not guard.admits(loss, norm)
    assert guard.admits(1e38, 1e38)
    assert len(guard.losses) == 100


@pytest.mark.parametrize(("loss", "norm"), NOT_FINITE)
def test_so_many_in_a_row_are_skipped_and_no_more(loss, norm):
    guard = Guard(GuardConfig(skip_nonfinite=2))
    for _ in range(2):
        assert guard.judge(loss, norm) is SKIP
        guard = guard.passed_over()
    assert guard.judge(loss, norm) is DIVERGED
    guard = after(guard, 1.0)
    assert guard.judge(loss, norm) is SKIP, "an update ends the row"
    assert guard.losses == (1.0,)


def test_a_leap_is_one_above_the_mean_of_a_full_window():
    guard = after(Guard(GuardConfig(spike=3.0, window=4, skip_nonfinite=5)), 1.0, 9.0, 0.9)
    assert guard.limit == math.inf, "three losses do not tell"
    assert guard.judge(1e9, 1.0) is APPLY
    guard = after(guard, 1.1)
    limit = statistics.fmean([1.0, 9.0, 0.9, 1.1]) + 3 * statistics.pstdev([1.0, 9.0, 0.9, 1.1])
    assert guard.limit == pytest.approx(limit, rel=1e-12)
    assert guard.judge(guard.limit, 1.0) is APPLY
    assert guard.judge(math.nextafter(guard.limit, math.inf), 1.0) is DIVERGED, "never skipped: it may be the weights"
    assert guard.judge(-1e9, 1.0) is APPLY
    guard = after(guard, 1.2, 1.0)
    assert guard.losses == (0.9, 1.1, 1.2, 1.0)
    assert guard.limit < 2


def test_its_state_survives_json_exactly():
    rules = GuardConfig(spike=2.0, window=3, skip_nonfinite=4, rollbacks=2)
    guard = dataclasses.replace(after(Guard(rules), 0.1 + 0.2, 1 / 3, 2**-40).passed_over(), rollbacks=1)
    again = Guard.from_dict(rules, json.loads(json.dumps(guard.to_dict())))
    assert again == guard
    assert again.limit == guard.limit
    assert Guard.from_dict(rules, {}) == Guard(rules)
    narrower = GuardConfig(spike=2.0, window=2)
    assert Guard.from_dict(narrower, guard.to_dict()).losses == guard.losses[-2:]
    with pytest.raises(KeyError):
        Guard.from_dict(rules, {"losses": []})


def test_going_back_restores_the_losses_and_remembers_the_rollbacks():
    rules = GuardConfig(skip_nonfinite=1, rollbacks=3)
    saved = after(Guard(rules), 1.0, 2.0)
    guard = after(saved, 3.0).passed_over()
    back = guard.gone_back(saved.passed_over().to_dict())
    assert back == dataclasses.replace(saved, rollbacks=1)
    assert after(back, 5.0).gone_back(saved.to_dict()).rollbacks == 2
    assert guard.gone_back({}) == Guard(rules, rollbacks=1), "a checkpoint of before there was a guard"
