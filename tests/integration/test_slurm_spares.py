"""A node lost inside an allocation: a spare takes its place, or the run shrinks, or it requeues. On a real cluster."""

import pytest

from tests.slurm_jobs import EVERY, SLOW, STEPS, assert_as_if_undisturbed
from tests.status_truth import status_lines
from tests.tiny import losses, traces

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]


def failures(job):
    """How attempts ended, but for stops: a node that comes back may be told then to end what it had of the job before
    it was lost, and the job that was requeued has the same number."""
    return [cause for cause in job.causes if cause != "stopped"]


def test_a_spare_stands_in_though_another_spare_is_dead_as_well(start, whole, cluster):
    job = start("--spares", "2")
    job.wait_for_step(8)
    (begun,) = job.of("attempt")
    (_, lost), (dead, sound) = begun["hosts"], begun["spares"]
    cluster.kill_node(dead)
    cluster.kill_node(lost)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["node_lost", "done"]
    assert job.of("ended")[0]["hosts"] == [lost, dead]
    again = job.of("attempt")[1]
    assert again["hosts"] == [begun["hosts"][0], sound]
    assert (again["stand_ins"], again["spares"]) == ([sound], [])
    assert set(again["left_out"]) == {lost, dead}
    assert again["from_step"] == EVERY
    assert (again["job_id"], again["restart"], job.of("requeued")) == (job.job_id, 0, []), "no trip through the queue"
    assert f"(spare {sound}, without {lost}, {dead})" in status_lines(job.run_dir)


def test_without_a_spare_it_shrinks_and_grows_back_when_it_is_requeued(start, whole, cluster):
    job = start("launch.min_nodes=1")
    job.wait_for_step(8)
    kept, lost = job.of("attempt")[0]["hosts"]
    cluster.kill_node(lost)
    job.wait_for(lambda: len(job.of("attempt")) == 2, "it does not go on")
    job.wait_for_step(16)
    cluster.revive_node(lost)
    cluster.command("scancel", "--signal=USR2", "--batch", job.job_id)
    assert job.wait_for_end()["cause"] == "done", job.told()
    _, shrunk, grown, *_ = job.of("attempt")
    assert (shrunk["hosts"], shrunk["world_size"], shrunk["restart"]) == ([kept], 1, 0), "no trip through the queue"
    assert (len(grown["hosts"]), grown["world_size"], grown["restart"]) == (2, 2, 1)
    assert lost not in grown["hosts"], "it is remembered"
    assert job.causes[:2] == ["node_lost", "stopped"]
    assert failures(job) == ["node_lost", "done"]
    assert grown["from_step"] >= 16, "the shrunk run's checkpoint"
    assert f"(1 of 2 ranks, without {lost})" in status_lines(job.run_dir)
    assert traces(job.run_dir) == traces(whole.run_dir)
    assert losses(job.run_dir) == pytest.approx(losses(whole.run_dir), rel=1e-5)
    assert max(losses(job.run_dir)) == STEPS


def test_with_neither_left_it_goes_through_the_queue(start, whole, cluster):
    job = start("--spares", "1")
    job.wait_for_step(8)
    (begun,) = job.of("attempt")
    lost = [begun["hosts"][1], *begun["spares"]]
    for node in lost:
        cluster.kill_node(node)
    job.wait_for(lambda: job.of("requeued"), "it is not requeued")
    for node in lost:
        cluster.revive_node(node)
    assert_as_if_undisturbed(job, whole)
    assert job.of("requeued")[0]["how"] == "scontrol"
    assert failures(job) == ["node_lost", "done"]
    assert job.of("ended")[0]["hosts"] == lost
    again = job.of("attempt")[1]
    assert (again["restart"], len(again["hosts"])) == (1, 2)
    assert len(job.of("started")[1]["hosts"]) == 3, "it asks for all of them again"
    assert again["left_out"] == [lost[1]], "no spare of a host that was lost before, as long as it is not needed"


def test_the_batch_process_is_lost_with_its_node(start, whole, cluster):
    """SLURM leaves such a job RUNNING with nothing in it: a sentry on another host puts it back into the queue."""
    job = start("--spares", "1")
    job.wait_for_step(8)
    lost = job.of("attempt")[0]["hosts"][0]
    cluster.kill_node(lost)
    job.wait_for(lambda: job.of("requeued"), "it is not requeued")
    cluster.revive_node(lost)
    assert_as_if_undisturbed(job, whole)
    assert failures(job) == ["node_lost", "done"]
    assert job.of("ended")[0]["hosts"] == [lost]
    assert job.of("requeued")[0]["how"] == "scontrol"
    again = job.of("attempt")[1]
    assert (again["job_id"], again["restart"]) == (job.job_id, 1)
    assert lost not in [*again["hosts"], *again["spares"]], "it is remembered"


def test_the_batch_host_computes_wrongly_and_a_spare_takes_its_ranks(start, whole):
    """Rank 0 moves to another host than the supervisor's, which goes on where it is."""
    flips = ";".join(f"flip@rank0,gradient:silent#{micro_batch}/1" for micro_batch in (15, 17, 19))
    job = start("--spares", "1", "train.deterministic=true", "attribution.replay=true", "attribution.replay_every=8",
                fault=f"{SLOW};{flips}")  # fmt: skip
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["hardware", "done"]
    first, second = job.of("attempt")
    assert job.of("ended")[0]["hosts"] == [first["hosts"][0]]
    assert second["hosts"] == [first["hosts"][1], *first["spares"]]
    assert (second["job_id"], job.of("requeued")) == (job.job_id, []), "no trip through the queue"
