"""Clusters that are not as they should be: commands that are missing, a controller that is away."""

import json
import os
import signal
import time

import pytest

from slurm.rehearsal.cluster import STATE
from tests.slurm_jobs import SlurmJob, assert_as_if_undisturbed

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture(scope="module")
def whole(slurm_cluster, data_dir, tmp_path_factory):
    """The undisturbed run. (This cluster has no accounting, and no time limit here is above ten minutes.)"""
    job = SlurmJob(slurm_cluster, data_dir, tmp_path_factory.mktemp("whole") / "run", fault="").launch()
    assert job.wait_for_end()["cause"] == "done", job.told()
    return job


def test_without_scontrol_on_the_nodes_a_successor_goes_on(cluster, data_dir, tmp_path, whole):
    path = {"setup": [f"export PATH={cluster.path_without('scontrol')}"]}
    job = SlurmJob(cluster, data_dir, tmp_path / "run", profile=path).launch()
    job.wait_for_step(8)
    cluster.command("scancel", "--signal=USR2", "--batch", job.job_id)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["stopped", "done"]
    assert [event["how"] for event in job.of("requeued")] == ["sbatch"]
    successor = job.of("attempt")[1]["job_id"]
    assert successor not in (job.job_id, job.of("submitted")[1]["job_id"]), "the guard stayed one"


def test_a_controller_that_is_away_for_a_while_costs_no_attempt(cluster, data_dir, tmp_path, whole):
    job = SlurmJob(cluster, data_dir, tmp_path / "run").launch()
    job.wait_for_step(8)
    controller = json.loads((cluster.directory / STATE).read_text())["slurmctld"]
    os.kill(controller, signal.SIGSTOP)
    try:
        job.kill(cluster.rank_process(1))
        time.sleep(30)
    finally:
        os.kill(controller, signal.SIGCONT)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["rank_died", "done"]
