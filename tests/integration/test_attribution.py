"""Whose fault it was: a slow rank, a flipped bit of a gradient or of weights, a poisoned sample.

Every rank of these runs is on a host of its own, n0, n1, …
"""

import io
import json
import os

import numpy as np
import pytest

from data_tools.shard_set import TarSamples
from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import losses, same_tensors, saved_state, tiny_config
from uvit_dist import health
from uvit_dist.data.latents import Sample
from uvit_dist.data.shards import read_index, write_index, write_shard
from uvit_dist.page.facts import read_run
from uvit_dist.page.html import render
from uvit_dist.run_state import run_state
from uvit_dist.status import describe

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
WATCHED = ["train.deterministic=true", "attribution.replay=true", "attribution.replay_every=2", "stragglers.every=2",
           "stragglers.gathers=2", "stragglers.ratio=5"]  # fmt: skip
"""On two cores that do other work as well, ranks differ by themselves; a slow one of these tests does by more."""


def health_job(config):
    os.environ["SLURMD_NODENAME"] = f"n{os.environ['RANK']}"
    return train_job(config)


def options(stage, precision="bf16_autocast"):
    weights = ["attribution.weights_every=2"] if stage < 3 else []
    return [*WATCHED, f"zero.stage={stage}", f"train.precision={precision}", *weights]


@pytest.fixture(scope="module")
def plain(data_dir, tmp_path_factory):
    """The run without any of it, by stage and precision: its directory."""
    made = {}

    def run(stage, precision="bf16_autocast"):
        if (stage, precision) not in made:
            run_dir = tmp_path_factory.mktemp("plain")
            config = tiny_config(data_dir, run_dir, f"zero.stage={stage}", f"train.precision={precision}")
            assert run_ranks(train_job, 2, config) == ["complete"] * 2
            made[stage, precision] = run_dir
        return made[stage, precision]

    return run


def assert_same(run_dir, other):
    assert list(losses(run_dir)) == list(range(1, 11))
    assert losses(run_dir) == losses(other)
    assert same_tensors(saved_state(run_dir, 10), saved_state(other, 10))


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16_autocast"), (1, "bf16_autocast"), (2, "bf16"), (3, "bf16_autocast")]
)
def test_undisturbed_nothing_is_found_and_nothing_changes(data_dir, tmp_path, plain, stage, precision):
    config = tiny_config(data_dir, tmp_path, *options(stage, precision))
    assert run_ranks(health_job, 2, config) == ["complete"] * 2
    assert health.findings(tmp_path) == []
    assert_same(tmp_path, plain(stage, precision))


@pytest.mark.parametrize(
    ("stage", "fault", "step"),
    [
        (1, "flip@rank1,gradient:silent#7", 3),  # of the second micro-batch of every other step's, which is replayed
        (3, "flip@rank1,gradient:loud#5", 2),  # no step that is due, but a suspicious one
        (0, "flip@rank1,gradient:silent#8", 3),
    ],
)
def test_a_flipped_bit_of_a_gradient_is_its_hosts_fault_and_the_step_is_done_again(
    data_dir, tmp_path, plain, monkeypatch, stage, fault, step
):
    monkeypatch.setenv("UVIT_FAULT", fault)
    assert run_ranks(health_job, 2, tiny_config(data_dir, tmp_path, *options(stage))) == ["complete"] * 2
    (found,) = health.findings(tmp_path)
    assert (found["kind"], found["step"], found["ranks"], found["hosts"]) == ("gradient", step, [1], ["n1"])
    assert_same(tmp_path, plain(stage))


def test_a_host_that_is_wrong_too_often_ends_the_run_by_its_name(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_FAULT", "flip@rank0,gradient:silent#*")
    told = run_ranks(health_job, 2, tiny_config(data_dir, tmp_path, *options(2)))
    assert told[0] == told[1]
    assert told[0].startswith(
        "HardwareError 71: step 1: rank 0 on n0: the same step computed twice gave two results; 3"
    )
    assert [(one["kind"], one["step"], one["hosts"]) for one in health.findings(tmp_path)] == [
        ("gradient", 1, ["n0"])
    ] * 3
    again = run_ranks(health_job, 2, tiny_config(data_dir, tmp_path, *options(2)))
    assert "4 of 3" in again[0], "what is known of a host outlives an attempt"


def test_a_flipped_bit_of_weights_is_its_hosts_fault_also_of_two(data_dir, tmp_path, plain, monkeypatch):
    """The masters tell whose copy is wrong; from them it is mended."""
    monkeypatch.setenv("UVIT_FAULT", "flip@rank1,step:weights#4")
    assert run_ranks(health_job, 2, tiny_config(data_dir, tmp_path, *options(1))) == ["complete"] * 2
    (found,) = health.findings(tmp_path)
    assert (found["kind"], found["step"], found["ranks"], found["hosts"]) == ("weights", 3, [1], ["n1"])
    assert_same(tmp_path, plain(1))


def test_without_masters_the_majority_tells_whose_weights_are_wrong(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("UVIT_FAULT", "flip@rank1,step:weights#3")
    config = tiny_config(data_dir, tmp_path, "zero.stage=0", "attribution.weights_every=2")
    told = run_ranks(health_job, 3, config)
    assert told[0] == told[1] == told[2]
    assert told[0].startswith("HardwareError 71: step 3: rank 1 on n1: its weights are not those of the others")


@pytest.mark.parametrize("stage", [1, 3])
def test_a_slow_rank_is_named_in_time_and_no_other(data_dir, tmp_path, monkeypatch, stage):
    """It is as slow as a busy machine of two cores makes nobody."""
    monkeypatch.setenv("UVIT_FAULT", "sleep1.5@rank1,step:forward#*")
    short = ["stragglers.ratio=3", "train.steps=5", "train.micro_batch_size=8"]
    assert run_ranks(health_job, 3, tiny_config(data_dir, tmp_path, *options(stage), *short)) == ["complete"] * 3
    (found,) = health.findings(tmp_path)
    assert (found["kind"], found["ranks"], found["hosts"]) == ("straggler", [1], ["n1"])
    assert found["step"] + 1 == 2 * 2, "stragglers.every, stragglers.gathers"
    told = "rank 1 on n1 is slow: the forward passes of a step take"
    for rank in range(3):
        assert told in (tmp_path / f"logs/rank-{rank:05d}.log").read_text()
    assert told in describe(run_state(tmp_path))
    assert told in render(read_run(tmp_path))
    assert json.loads((tmp_path / "health.jsonl").read_text())["told"].startswith(told)


def poisoned(data_dir, directory, number, value):
    """The shards with one number of a sample's moments at ``value``. Returns the path of their index."""
    index, records, seen = read_index(str(data_dir / "index.json")), [], 0
    for shard, record in enumerate(index.shards):
        samples = []
        for raw in TarSamples(index.shard_path(shard), record.size, lambda size: None):
            data = np.load(io.BytesIO(raw.members["npy"][1])).copy()
            if seen == number:
                data[0, 3, 3] = value
            samples.append(Sample(raw.key, int(raw.members["cls"][1]), data))
            seen += 1
        records.append(write_shard(str(directory), record.name.removesuffix(".tar"), samples, index.provenance))
    write_index(str(directory / "index.json"), records, index.provenance)
    return directory / "index.json"


def test_a_poisoned_sample_is_the_datas_fault_and_is_named(data_dir, tmp_path):
    index = poisoned(data_dir, tmp_path, 77, np.inf)
    config = tiny_config(data_dir, tmp_path / "run", *options(1), "guard.skip_nonfinite=1", f"data.index={index}")
    assert run_ranks(health_job, 2, config) == ["complete"] * 2
    found = health.findings(tmp_path / "run")
    assert found
    for one in found:
        assert (one["kind"], one["samples"], one["hosts"]) == ("data", [77], [])
        assert "the same on all ranks, so not the hardware. these samples stand out: 77 (loss nan" in one["told"]
