"""The journal: a damaged shard changes the stream at one place, the same for every way of cutting the work."""

import itertools

import numpy as np
import pytest
import torch

from tests.unit.test_shards import data_offset, index_path, loader, moments_of  # noqa: F401 - a fixture
from uvit_dist.data.journal import Damage, Journal, Substitute, stand_ins
from uvit_dist.errors import DataError

STEPS = 20
"""Two epochs and a half of 100 samples."""


def damage_shard(path):
    shard = path.parent / "shard-2.tar"
    content = bytearray(shard.read_bytes())
    for sample in range(5, 59, 7):
        content[data_offset(path, 2, sample)] ^= 1
    shard.write_bytes(content)


def agree(loaders, batches):
    """What training does after each step."""
    found = [damage for batch in batches for damage in batch.damage]
    used = [used for batch in batches for used in batch.substitutes]
    if found:
        for each in loaders:
            each.adopt(each.journal.after(batches[0].step, found, used))


def run(path, world_size, steps, journal=None, start=0, **options):
    """Ids of each step, over all ranks, and the journal after the last."""
    loaders = [loader(path, start, rank, world_size, journal=journal, **options) for rank in range(world_size)]
    ids = []
    for _ in range(steps):
        batches = [next(each) for each in loaders]
        agree(loaders, batches)
        for batch in batches:
            assert torch.equal(batch.labels, batch.ids % 10)
            assert all(np.array_equal(m, moments_of(int(i))) for i, m in zip(batch.ids, batch.data, strict=True))
        ids.append(torch.cat([batch.ids for batch in batches]).tolist())
    assert len({each.journal for each in loaders}) == 1
    return ids, loaders[0].journal


@pytest.mark.slow
def test_a_damaged_shard_is_left_out_from_the_next_step_on_whatever_ranks_threads_and_prefetch(index_path):  # noqa: F811
    whole, _ = run(index_path, 1, STEPS)
    damage_shard(index_path)
    ids, journal = run(index_path, 1, STEPS)
    (shard,) = journal.quarantined_shards
    assert shard.name == "shard-2.tar"
    assert 0 < shard.from_step < 8
    first = shard.from_step - 1
    assert ids[:first] == whole[:first]
    bad = set(range(41, 100))
    for step, (ours, planned) in enumerate(zip(ids, whole, strict=True)):
        assert all(i == p for i, p in zip(ours, planned, strict=True) if p not in bad), "no silent shift"
        if step > first:
            assert not bad & set(ours), "none of its samples, good ones neither"
    assert [used for used in journal.substitutes if used.step != first] == []
    assert {used.planned for used in journal.substitutes} <= bad

    for world_size, threads, ahead in itertools.product((1, 2, 4), (0, 1, 5), (0, 3)):
        again = run(index_path, world_size, STEPS, read_threads=threads, prefetch_blocks=ahead)
        assert again == (ids, journal), f"{world_size} ranks, {threads} threads, {ahead} blocks ahead"

    for stop in (first, first + 1, 11):
        _, kept = run(index_path, 2, stop)
        kept = Journal.from_dict(kept.to_dict())
        assert run(index_path, 4, STEPS - stop, kept, stop) == (ids[stop:], journal), f"resumed after {stop} steps"


def test_a_repaired_shard_stays_out_of_a_run_that_has_put_it_in_quarantine(index_path):  # noqa: F811
    whole = (index_path.parent / "shard-2.tar").read_bytes()
    damage_shard(index_path)
    ids, journal = run(index_path, 1, 12)
    (index_path.parent / "shard-2.tar").write_bytes(whole)
    assert run(index_path, 2, 4, journal, 8)[0] == ids[8:12]


def test_skipped_steps_are_left_out_of_the_stream(index_path):  # noqa: F811
    whole, _ = run(index_path, 1, STEPS)
    journal = Journal().skipping(3, 4).skipping(9, 9)
    assert run(index_path, 2, STEPS - 3, journal)[0] == whole[:3] + whole[5:9] + whole[10:]
    assert run(index_path, 1, 6, journal, 5)[0] == [whole[7], whole[8], *whole[10:14]]


@pytest.mark.parametrize(("threads", "ahead"), [(0, 0), (5, 3)])
def test_what_is_skipped_as_it_is_met_is_as_if_it_had_never_been_planned(index_path, threads, ahead):  # noqa: F811
    """Left out: step 4 after it was served, then, gone back from step 7 to the update 2, the steps 2…8 with it."""
    batches = loader(index_path, read_threads=threads, prefetch_blocks=ahead)
    served = [next(batches).step for _ in range(5)]
    batches.adopt(batches.journal.skipping(4, 4), 4)
    served += [next(batches).step for _ in range(4)]
    assert served == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    batches.adopt(batches.journal.skipping(2, 8), 2)
    assert batches.journal == Journal().skipping(2, 8)
    planned = loader(index_path, 2, journal=Journal().skipping(2, 8))
    for _ in range(12):
        ours, theirs = next(batches), next(planned)
        assert ours.step == theirs.step
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.labels, ours.ids % 10)
        assert torch.equal(ours.data, theirs.data)
    with pytest.raises(AssertionError, match="forwards"):
        batches.adopt(batches.journal, 3)


def test_skipped_ranges_merge_and_updates_map_to_the_steps_that_are_left():
    journal = Journal().skipping(5, 6).skipping(2, 2).skipping(7, 8).skipping(6, 7)
    assert journal.skipped_steps == ((2, 2), (5, 8))
    left = [step for step in range(30) if step != 2 and not 5 <= step <= 8]
    assert [journal.plan_step(update) for update in range(25)] == left[:25]
    assert Journal.from_dict(journal.to_dict()) == journal


def test_ranks_find_in_any_order_and_the_journal_is_one():
    found = [Damage("b.tar", "missing"), Damage("a.tar", "y"), Damage("a.tar", "x")]
    used = [Substitute(4, 9, 1), Substitute(4, 3, 8)]
    journals = {
        Journal().after(4, order, pair) for order in itertools.permutations(found) for pair in (used, used[::-1])
    }
    (journal,) = journals
    assert [(shard.name, shard.from_step, shard.reason) for shard in journal.quarantined_shards] == [
        ("a.tar", 5, "x"), ("b.tar", 5, "missing")]  # fmt: skip
    assert journal.after(9, [Damage("a.tar", "z")], []) == journal, "known already"
    assert journal.out_of_use(["a.tar", "c.tar", "b.tar"], 4) == frozenset()
    assert journal.out_of_use(["a.tar", "c.tar", "b.tar"], 5) == {0, 2}


def test_stand_ins_are_uniform_and_a_function_of_identity():
    def allowed(sample):
        return sample >= 20

    first = [next(stand_ins(1, 0, planned, 100, allowed)) for planned in range(4000)]
    assert first == [next(stand_ins(1, 0, planned, 100, allowed)) for planned in range(4000)]
    counts = np.bincount(first, minlength=100)
    assert counts[:20].sum() == 0
    assert abs(counts[20:] - 50).max() < 5 * 50**0.5
    assert next(stand_ins(1, 1, 7, 10**6, allowed)) != next(stand_ins(1, 0, 7, 10**6, allowed))


def test_more_damage_than_the_budget_allows_ends_the_run_with_each_named():
    journal = Journal().after(3, [Damage("a.tar", "missing"), Damage("b.tar", "truncated")], [])
    journal.check_budget(200, 0.01, "shards")
    with pytest.raises(DataError, match=r"(?s)2 of 199 shards .* a\.tar: missing\n  b\.tar: truncated\n") as caught:
        journal.check_budget(199, 0.01, "shards")
    assert caught.value.exit_code == 65
