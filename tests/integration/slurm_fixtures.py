"""The real four-node SLURM cluster of the tests, on loopback; it is the rehearsal cluster that users have."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.rehearsal.cluster import Cluster, missing_programs, needed
from tests.slurm_jobs import SlurmJob

EMPTY_S = 60


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for all tests that need one. Without SLURM they skip, and fail in CI."""
    if missing_programs():
        pytest.fail(needed()) if os.environ.get("CI") else pytest.skip(needed())
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def cluster(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up and no job in it; what a test leaves there is ended with the test."""
    for node in slurm_cluster.nodes:
        if node not in slurm_cluster.living_nodes():
            slurm_cluster.revive_node(node)
    yield slurm_cluster
    for job in slurm_cluster.jobs():
        slurm_cluster.command("scancel", "--full", job, check=False)
    deadline = time.monotonic() + EMPTY_S
    while slurm_cluster.jobs():
        assert time.monotonic() < deadline, slurm_cluster.queue()
        time.sleep(0.2)


@pytest.fixture(scope="session")
def whole(slurm_cluster: Cluster, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SlurmJob:
    """The undisturbed run, on two nodes: what all others must equal."""
    job = SlurmJob(slurm_cluster, data_dir, tmp_path_factory.mktemp("whole") / "run", fault="").launch()
    assert job.wait_for_end()["cause"] == "done", job.told()
    assert job.causes == ["done"]
    return job


@pytest.fixture
def start(cluster: Cluster, data_dir: Path, tmp_path: Path, whole: SlurmJob) -> Callable[..., SlurmJob]:
    """Launches a run."""
    return lambda *changes, **options: SlurmJob(cluster, data_dir, tmp_path / "run", *changes, **options).launch()
