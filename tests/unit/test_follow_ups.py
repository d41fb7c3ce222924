"""Follow-ups of checkpoints, as far as they need no cluster: what is told, what is let go of."""

import logging

import pytest

from tests.tiny import tiny_config
from tests.unit.test_cluster_profiles import order as make_order
from uvit_dist import attempts, follow_ups, lease, pins
from uvit_dist.config_yaml import dump_config
from uvit_dist.follow_ups import FollowUps, committed, follow_up_directory


@pytest.fixture
def order(tmp_path, monkeypatch):
    """A training with two checkpoints, on a machine that has no SLURM."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    config = tiny_config(tmp_path / "data", tmp_path / "run")
    made = make_order(tmp_path, then=("evaluate",))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    for name in ("step-00000005", "step-00000010", ".tmp-step-00000015", "damaged-step-00000003-0"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "code").mkdir()  # the snapshot that the training runs from
    pins.switch(made.run_dir, on=True)
    return made


def pinned(order):
    return pins.pinned(order.run_dir, committed(order.run_dir))


def test_what_cannot_be_submitted_is_told_and_tried_again_and_never_raised(order, caplog, monkeypatch):
    followed = FollowUps(order)
    with caplog.at_level(logging.WARNING, "uvit_dist"):
        followed.see()
        followed.see()
    assert len(caplog.records) == 1
    assert "sbatch cannot be started" in caplog.text
    directory = follow_up_directory(order.run_dir, "evaluate", 5)
    assert lease.read(directory) is None
    assert attempts.read(directory) == []
    assert pinned(order) == {5, 10}
    monkeypatch.setattr(follow_ups, "AGAIN_S", 0.0)
    FollowUps(order).see()  # a successor's
    assert len(caplog.records) == 2


def test_a_checkpoint_is_let_go_of_when_its_evaluation_has_ended_well_or_not(order):
    for step, cause in ((5, "done"), (10, None)):
        log = attempts.AttemptLog(follow_up_directory(order.run_dir, "evaluate", step))
        log.add("submitted", job_id="12")
        if cause is not None:
            log.add("finished", job_id="12", exit_code=0, reason=cause, cause=cause)
    followed = FollowUps(order)
    followed.see()
    assert pinned(order) == {10}
    log.add("finished", job_id="12", exit_code=65, reason="damaged", cause="data")
    followed.see()
    assert pinned(order) == set()


def test_an_evaluation_that_slurm_forgot_is_over_and_one_that_it_may_know_is_not(order, monkeypatch):
    for step in (5, 10):
        attempts.AttemptLog(follow_up_directory(order.run_dir, "evaluate", step)).add("submitted", job_id=str(step))
    FollowUps(order).see()  # nobody answers here
    assert pinned(order) == {5, 10}
    monkeypatch.setattr(follow_ups.slurm, "job_state", lambda job, _: {"10": "PENDING"}.get(job))
    FollowUps(order).see()
    assert pinned(order) == {10}


def test_nothing_is_done_unless_it_was_asked_for(order, caplog):
    FollowUps(order.model_copy(update={"then": ()})).see()
    assert caplog.records == []
    assert pinned(order) == {5, 10}
