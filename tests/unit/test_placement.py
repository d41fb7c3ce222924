"""Where the ranks run when hosts are lost or have failed: a spare, then fewer, then the queue."""

import pytest

from uvit_dist.placement import place


@pytest.mark.parametrize(
    ("allocation", "lost", "blamed", "counts", "hosts", "spares", "stand_ins", "left_out"),
    [
        # nothing is amiss
        ("a b", "", "", (2,), "a b", "", "", ""),
        ("a b c d", "", "", (2,), "a b", "c d", "", ""),
        # a spare stands in, in SLURM's order, until none is left
        ("a b c d", "b", "", (2,), "a c", "d", "c", "b"),
        ("a b c d", "a", "", (2,), "b c", "d", "c", "a"),
        ("a b c d", "b c", "", (2,), "a d", "", "d", "b c"),
        ("a b c d", "c", "", (2,), "a b", "d", "", "c"),
        # a spare comes before fewer nodes
        ("a b c", "b", "", (2, 1), "a c", "", "c", "b"),
        # fewer nodes, the most that will do; what is left over waits
        ("a b c", "b c", "", (2, 1), "a", "", "", "b c"),
        ("a b c d", "b", "", (4, 2, 1), "a c", "d", "", "b"),
        ("a b c d", "a b c", "", (4, 2, 1), "d", "", "", "a b c"),
        ("a b c d", "a b", "", (2, 1), "c d", "", "c d", "a b"),
        ("a b c d", "a b c", "", (2, 1), "d", "", "d", "a b c"),
        # the queue
        ("a b", "b", "", (2,), None, "", "", ""),
        ("a b c d", "b c d", "", (2,), None, "", "", ""),
        ("a b c d", "a b", "", (4, 3), None, "", "", ""),
        ("a", "a", "", (1,), None, "", "", ""),
        # a host that has failed before makes room for a spare, and is used where there is none
        ("a b c", "", "b", (2,), "a c", "", "c", "b"),
        ("a b c", "", "b c", (2,), "a b", "", "", "c"),
        ("a b c", "c", "b", (2,), "a b", "", "", "c"),
        ("a b", "", "b", (2, 1), "a b", "", "", ""),
        ("a b c d", "b", "a b", (2,), "c d", "", "c d", "a b"),
    ],
)
def test_a_spare_then_fewer_then_the_queue(allocation, lost, blamed, counts, hosts, spares, stand_ins, left_out):
    found = place(allocation.split(), set(lost.split()), blamed.split(), counts)
    if hosts is None:
        assert found is None
        return
    assert (found.hosts, found.spares) == (tuple(hosts.split()), tuple(spares.split()))
    assert (found.stand_ins, found.left_out) == (tuple(stand_ins.split()), tuple(left_out.split()))
