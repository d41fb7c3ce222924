"""The stream of samples whatever happens to the run: the same ids; and memory and files that do not grow."""

import gc
import os
import random

import numpy as np
import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import losses, tiny_config, traces
from tests.unit.test_shards import provenance
from uvit_dist.data.latents import Sample
from uvit_dist.data.loader import ShardLoader
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import read_index, write_index, write_shard

pytestmark = [pytest.mark.slow]
STEPS = 24
"""Nearly five epochs of 120 samples in batches of 24."""


def ids(run_dir):
    """Step → ids consumed, in the order of the batch: the last record of each step counts."""
    return {step: [row[0] for row in rows] for step, rows in traces(run_dir).items()}


@pytest.mark.multiprocess
def test_the_ids_consumed_are_the_same_however_often_killed_and_on_whatever_ranks_and_workers(data_dir, tmp_path):
    def on(run, ranks, threads, *more):
        return tiny_config(
            data_dir, tmp_path / run, f"launch.processes_per_node={ranks}", "train.micro_batch_size=2",
            f"data.read_threads={threads}", f"train.steps={STEPS}", "checkpoint.every=3", *more,
        )  # fmt: skip

    whole = on("whole", 1, 1)
    assert (whole.train.global_batch_size, whole.data.lanes) == (24, 12)
    assert run_ranks(train_job, 1, whole) == ["complete"]
    expected = ids(tmp_path / "whole")
    assert list(expected) == list(range(1, STEPS + 1))
    for epoch in range(4):
        seen = [i for step in range(5 * epoch + 1, 5 * epoch + 6) for i in expected[step]]
        assert len(set(seen)) == len(seen) == 120, "no id twice in an epoch, and all but the remainder"

    kills = sorted(random.Random(os.environ.get("UVIT_TEST_SEED", "4")).sample(range(4, 16), 2))
    for step in kills:
        with pytest.raises(AssertionError, match="-9"):
            run_ranks(train_job, 2, on("broken", 2, 1), f"kill one rank after step {step}")
    assert run_ranks(train_job, 1, on("broken", 1, 2, "train.steps=19")) == ["complete"]
    assert run_ranks(train_job, 4, on("broken", 4, 0)) == ["complete"] * 4
    assert ids(tmp_path / "broken") == expected, f"killed after steps {kills}"
    assert run_ranks(train_job, 3, on("three", 3, 1)) == ["complete"] * 3
    assert ids(tmp_path / "three") == expected
    ours, theirs = losses(tmp_path / "broken"), losses(tmp_path / "whole")
    assert max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs) <= 1e-5


SAMPLES = 200_000


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_open_files_stay_flat_over_200_000_samples(tmp_path):
    shape, each, shards = (2, 4, 4), 500, 16
    made = provenance(shape=shape, samples=each * shards, class_counts=(each * shards // 10,) * 10)
    data = np.zeros(shape, np.float16)
    records = [
        write_shard(str(tmp_path), f"shard-{s:02d}", [Sample(f"{s}-{i}", i % 10, data) for i in range(each)], made)
        for s in range(shards)
    ]
    write_index(f"{tmp_path}/index.json", records, made)
    index = read_index(f"{tmp_path}/index.json")
    plan = Plan(index.counts, seed=1, global_batch_size=250, lanes=5, block_size=100)
    loader = ShardLoader(index, plan, 0, 1, 0, 2, 2)
    memory, files = [], []
    for step in range(SAMPLES // 250):
        next(loader)
        if step % 80 == 79:
            gc.collect()
            memory.append(resident_bytes())
            files.append(len(os.listdir("/proc/self/fd")))
    loader.close()
    assert len(memory) == 10
    batch_bytes = 250 * 2 * 4 * 4 * 2
    growth = memory[-1] - memory[2]
    assert growth < 40 * batch_bytes, f"grew by {growth} bytes over {7 * 80} batches of {batch_bytes}"
    assert max(files) - min(files) <= 2 + 2, "a file for each of two threads, and no more"
