"""The real four-node SLURM cluster of the tests, on loopback; it is the rehearsal cluster that users have."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from slurm.rehearsal.cluster import Cluster, missing_programs, needed

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
