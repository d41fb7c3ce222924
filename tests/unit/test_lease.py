"""Who may run a job of a run. What the scheduler says is given here; the tests of a real cluster ask it."""

import json
import multiprocessing
import os
import time

import pytest

from uvit_dist import lease
from uvit_dist.errors import OutputError, UnavailableError


@pytest.fixture
def states(monkeypatch):
    """Job id → state, as the scheduler tells it; a job that is not there is not known any more."""
    known = {}
    monkeypatch.setattr(lease.slurm, "job_state", lambda job_id, patience_s=0.0: known.get(job_id))
    return known


def test_a_second_launcher_is_refused_with_the_holder(tmp_path, states):
    lease.acquire(tmp_path)
    lease.confirm(tmp_path, "12")
    states["12"] = "PENDING"
    with pytest.raises(OutputError, match=r"held by SLURM job 12, since .*scancel 12") as refused:
        lease.acquire(tmp_path)
    assert refused.value.exit_code == 73
    with pytest.raises(OutputError, match="SLURM job 12"):
        lease.require_free(tmp_path)
    assert lease.read(tmp_path).job_id == "12"


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_lease_is_not_broken_while_its_job_may_live(tmp_path, states, state):
    lease.confirm(tmp_path, "12")
    states["12"] = state
    with pytest.raises(OutputError):
        lease.acquire(tmp_path)


@pytest.mark.parametrize("state", [None, "CANCELLED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_a_lease_is_broken_where_the_scheduler_says_that_its_job_is_gone(tmp_path, states, state):
    lease.confirm(tmp_path, "12")
    states["12"] = state
    lease.acquire(tmp_path)
    assert lease.read(tmp_path).job_id is None
    lease.confirm(tmp_path, "13")
    assert lease.read(tmp_path).job_id == "13"


def test_a_lease_is_not_broken_where_nobody_can_say(tmp_path, monkeypatch):
    lease.confirm(tmp_path, "12")

    def silent(job_id, patience_s=0.0):
        raise UnavailableError("SLURM does not answer")

    monkeypatch.setattr(lease.slurm, "job_state", silent)
    with pytest.raises(OutputError, match=r"SLURM job 12.*cannot be asked"):
        lease.acquire(tmp_path)


def test_a_job_takes_over_from_one_that_is_gone_and_from_no_other(tmp_path):
    lease.confirm(tmp_path, "12")
    with pytest.raises(OutputError, match="SLURM job 12"):
        lease.confirm(tmp_path, "13", lambda job_id: False)
    lease.confirm(tmp_path, "12", lambda job_id: False)  # its own, after a requeue
    asked = []
    lease.confirm(tmp_path, "13", lambda job_id: asked.append(job_id) or True)
    assert asked == ["12"]
    assert lease.read(tmp_path).job_id == "13"


def test_only_the_holder_gives_a_lease_up(tmp_path):
    lease.confirm(tmp_path, "12")
    lease.release(tmp_path, "11")
    lease.release(tmp_path, None)
    assert lease.read(tmp_path).job_id == "12"
    lease.release(tmp_path, "12")
    assert lease.read(tmp_path) is None
    lease.acquire(tmp_path)
    lease.release(tmp_path, None)  # a launcher whose submission failed
    assert lease.read(tmp_path) is None


def hold_as_a_launcher(directory, started, submitted, end, confirm_after_s):
    lease.acquire(directory)
    started.set()
    time.sleep(confirm_after_s)
    if confirm_after_s:
        submitted.set()
        lease.confirm(directory, "12")
    end.wait(60)


def launcher(directory, confirm_after_s):
    context = multiprocessing.get_context("forkserver")
    started, submitted, end = context.Event(), context.Event(), context.Event()
    process = context.Process(target=hold_as_a_launcher, args=(directory, started, submitted, end, confirm_after_s))
    process.start()
    assert started.wait(60)
    return process, submitted, end


@pytest.mark.slow
def test_a_launcher_that_submits_holds_the_lease_and_a_dead_one_does_not(tmp_path):
    process, *_ = launcher(tmp_path, 0)
    with pytest.raises(OutputError, match=rf"held by a launcher \(process {process.pid} on "):
        lease.acquire(tmp_path)
    process.kill()
    process.join()
    lease.acquire(tmp_path)
    assert lease.read(tmp_path).pid == os.getpid()


@pytest.mark.slow
def test_a_job_that_starts_before_its_launcher_has_written_its_id_waits_for_that(tmp_path):
    process, submitted, end = launcher(tmp_path, 1.5)
    lease.confirm(tmp_path, "12")
    assert submitted.is_set()
    with pytest.raises(OutputError, match="SLURM job 12"):
        lease.confirm(tmp_path, "13", lambda job_id: False)
    end.set()
    process.join(60)
    assert process.exitcode == 0


def test_a_launcher_elsewhere_is_taken_for_dead_only_after_long(tmp_path):
    record = {"job_id": None, "host": "elsewhere", "pid": 1, "since": time.time()}
    path = tmp_path / "lease.json"
    path.write_text(json.dumps(record))
    with pytest.raises(OutputError, match="process 1 on elsewhere"):
        lease.acquire(tmp_path)
    path.write_text(json.dumps({**record, "since": time.time() - lease.SUBMISSION_S - 1}))
    lease.acquire(tmp_path)


def try_to_take(directory, go, won):
    go.wait(60)
    try:
        lease.acquire(directory)
    except OutputError:
        return
    won.put(os.getpid())
    time.sleep(1)


@pytest.mark.slow
def test_of_many_launchers_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("forkserver")
    go, won = context.Event(), context.Queue()
    processes = [context.Process(target=try_to_take, args=(tmp_path, go, won)) for _ in range(6)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join(60)
    assert len([won.get() for _ in range(won.qsize())]) == 1
