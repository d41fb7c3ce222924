"""Who a process is: told by the environment in full, or alone; never half."""

import os

import pytest

from uvit_dist import dist
from uvit_dist.dist import Ranks, ranks_from_environment
from uvit_dist.errors import ConfigError

WHOLE = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def make(variables):
        for name in (*WHOLE, "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


def test_all_or_nothing(environment):
    environment({})
    assert ranks_from_environment() == Ranks(0, 1, 0)
    environment(WHOLE)
    assert ranks_from_environment() == Ranks(3, 8, 1)
    environment({"RANK": "3", "WORLD_SIZE": "8"})
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"):
        ranks_from_environment()
    environment({**WHOLE, "RANK": "three"})
    with pytest.raises(ConfigError, match="must be whole numbers"):
        ranks_from_environment()


def test_slurm_tasks_that_would_each_think_they_are_alone(environment):
    environment({"SLURM_NTASKS": "4"})
    with pytest.raises(ConfigError, match="4 SLURM tasks, but none of RANK"):
        ranks_from_environment()
    environment({"SLURM_NTASKS": "1"})
    assert ranks_from_environment() == Ranks()


def test_a_process_alone_leaves_the_environment_as_it_was(environment):
    environment({})
    before = dict(os.environ)
    dist.start(Ranks(), 10)
    assert os.environ["WORLD_SIZE"] == "1", "DeepSpeed looks for it"
    dist.stop()
    assert dict(os.environ) == before
