"""Evaluation: the same bits however the work is cut, and after a kill only what is missing."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.jobs import evaluate_job, train_job
from tests.ranks import run_ranks
from tests.tiny import DEMO, ROOT, overrides, records, tiny_config
from uvit_dist import checkpoint, score_log
from uvit_dist.spool import spooled
from uvit_dist.work import WorkDirectory

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
OF_THIS_RUN = {"seconds"}
"""What is told of the run and not of the images."""
LEASE_S = 2.0


@pytest.fixture(scope="module")
def run_dir(data_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = tiny_config(data_dir, directory, "launch.processes_per_node=1", "train.steps=10", "checkpoint.keep=2")
    assert run_ranks(train_job, 1, config) == ["complete"]
    return directory


def config_of(data_dir, run_dir, *more):
    return tiny_config(data_dir, run_dir, f"evaluate.lease_s={LEASE_S}", *more)


def clear(run_dir):
    for path in (run_dir / "evaluation").rglob("chunk-*"):
        path.unlink()
    for path in (run_dir / "evaluation").rglob("scores-*.json"):
        path.unlink()


def chunks(run_dir, kind="ema"):
    (directory,) = (run_dir / "evaluation").glob(f"step-*-{kind}-*")
    return {path.name: path.read_bytes() for path in sorted((directory / "chunks").glob("chunk-*.npz"))}


def moments(run_dir, names, count):
    (directory,) = (run_dir / "evaluation").glob("step-*-ema-*")
    with spooled(WorkDirectory(str(directory / "chunks"), names), ["features"], count) as spool:
        return spool.moments("features").state_dict()


def told(scores):
    return {name: value for name, value in scores.items() if name not in OF_THIS_RUN}


def test_any_number_of_workers_and_kills_give_the_same_bits(data_dir, run_dir):
    config = config_of(data_dir, run_dir)
    (alone,) = run_ranks(evaluate_job, 1, config)
    assert alone["samples"] == 60
    expected = chunks(run_dir)
    names = ["chunk-000000", "chunk-000001", "chunk-000002", "chunk-000003-of-12"]
    assert list(expected) == [f"{name}.npz" for name in names]
    as_one = moments(run_dir, names, 60)

    for workers in (2, 3, 4):
        clear(run_dir)
        several = run_ranks(evaluate_job, workers, config)
        assert all(scores == several[0] for scores in several), "all get what the one that scored wrote"
        assert told(several[0]) == told(alone)
        assert chunks(run_dir) == expected

    clear(run_dir)
    for done in (1, 2):  # killed twice, each time after another chunk
        with pytest.raises(AssertionError, match="-9"):
            run_ranks(evaluate_job, 1, config, 1)
        assert len(chunks(run_dir)) == done
    kept = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("chunk-*.npz")}
    resumed = run_ranks(evaluate_job, 3, config)
    assert told(resumed[0]) == told(alone)
    assert chunks(run_dir) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items()), "done work is not done again"
    assert all(np.array_equal(as_one[key], value) for key, value in moments(run_dir, names, 60).items())
    assert not list((run_dir / "evaluation").rglob("*.lease-*"))


def test_a_worker_lost_in_the_middle_costs_its_chunk(data_dir, run_dir):
    """One of four dies with a chunk in its hands, on a machine that the others cannot see: they wait for its lease."""
    config = config_of(data_dir, run_dir)
    (alone,) = run_ranks(evaluate_job, 1, config)
    clear(run_dir)
    with pytest.raises(AssertionError, match=r"exit codes \[0, 0, 0, -9\]"):
        run_ranks(lost_on_the_last, 4, config)
    (directory,) = (run_dir / "evaluation").glob("step-*-ema-*")
    assert told(json.loads((directory / "scores-60.json").read_text())) == told(alone)


def lost_on_the_last(config):
    from uvit_dist import dist

    rank = dist.ranks_from_environment().rank
    return evaluate_job(config, 0 if rank == 3 else None)
