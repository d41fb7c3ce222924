"""The plan: exactly once, independent of ranks, different in every epoch, shuffled across shards."""

import numpy as np
import pytest

from uvit_dist.data.plan import Plan
from uvit_dist.errors import ConfigError

PLAN = Plan(shard_counts=(50, 7, 93, 50, 61), seed=3, global_batch_size=24, lanes=12, block_size=8)


def epoch_ids(plan, epoch):
    first = epoch * plan.steps_per_epoch
    return np.concatenate([plan.sample_ids(s) for s in range(first, first + plan.steps_per_epoch)])


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_sees_every_sample_at_most_once_and_all_but_the_remainder(epoch):
    ids = epoch_ids(PLAN, epoch)
    assert len(ids) == 261 // 24 * 24
    assert len(set(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < 261


def test_what_is_left_over_differs_from_epoch_to_epoch():
    left = [frozenset(range(261)) - set(epoch_ids(PLAN, epoch)) for epoch in range(40)]
    assert len(set(left)) > 30
    assert len(frozenset().union(*left)) > 200, "no part of the data is favoured"


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_the_number_of_ranks_changes_nothing(world_size):
    for step in (0, 9, 10, 37):
        parts = [PLAN.sample_ids(step, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), PLAN.sample_ids(step))


def test_order_depends_on_seed_and_epoch_and_is_shuffled():
    other = Plan(PLAN.shard_counts, 4, 24, 12, 8)
    assert not np.array_equal(epoch_ids(PLAN, 0), epoch_ids(other, 0))
    assert not np.array_equal(epoch_ids(PLAN, 0), epoch_ids(PLAN, 1))
    orders = [PLAN.block(0, lane, 0).order.tolist() for lane in range(12)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert sum(order == sorted(order) for order in orders) == 0


def test_blocks_that_span_shards_and_steps_that_span_blocks():
    plan = Plan((5, 3, 4, 9, 3), seed=0, global_batch_size=12, lanes=2, block_size=4)
    assert sorted(len(plan.block(0, 0, b).order) for b in range(3)) == [4, 4, 4]
    assert sum(n for _, _, n in plan.block(0, 1, 2).pieces) == 4
    assert len(set(epoch_ids(plan, 0))) == 24


def test_the_order_is_frozen():
    """A change of this order would silently change what a resumed run reads."""
    assert PLAN.sample_ids(11)[:6].tolist() == [152, 155, 179, 175, 193, 192]


def test_mistakes_are_explained():
    with pytest.raises(ConfigError, match=r"global_batch_size 10 must be divisible by data\.lanes 4"):
        Plan((100,), 0, 10, 4, 8)
    with pytest.raises(ConfigError, match="holds 5 samples, fewer than"):
        Plan((5,), 0, 8, 4, 8)
    with pytest.raises(ConfigError, match=r"5 ranks do not divide data\.lanes 12; use \[1, 2, 3, 4, 6, 12\]"):
        PLAN.sample_ids(0, 0, 5)
