"""The pre-flight step: ranks that are absent, wrong or slow are named, by real ranks on this machine."""

import json
import logging
import os

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import tiny_config
from uvit_dist import dist, rank_check, run_state
from uvit_dist.errors import UnavailableError
from uvit_dist.rank_check import Nodes, check_ranks, judge, known, known_sum

NODES = Nodes(("a", "a", "b", "b", "c", "c"))
FIGURES = {"faults": [], "tflops": 100.0, "all_reduce": 50.0, "ring": 10.0}


def found(**of_ranks):
    """What six healthy ranks find, but for some. of_ranks: r1={...}"""
    return [FIGURES | of_ranks.get(f"r{rank}", {}) for rank in range(6)]


def on_nodes(directory, timeout_s=60.0):
    """(config, ranks) of a rank of this test, with two ranks on each node."""
    ranks = dist.ranks_from_environment()
    os.environ["SLURMD_NODENAME"] = f"n{ranks.rank // 2}"
    os.environ["SLURM_JOB_NODELIST"] = "n[0-9]"
    changes = ["launch.processes_per_node=2", f"launch.timeout_s={timeout_s}", "storage.retry_s=1"]
    return tiny_config(directory, directory / "run", *changes), ranks


def healthy(directory):
    logging.basicConfig(level=logging.INFO)
    return check_ranks(*on_nodes(directory))


def with_a_wrong_rank(directory):
    """Rank 2's memory flips a bit of what it contributes."""
    config, ranks = on_nodes(directory)
    right = rank_check.known
    if ranks.rank == 2:

        def wrong(rank, numel, device):
            numbers = right(rank, numel, device)
            if rank == 2:
                numbers[77] += 1
            return numbers

        rank_check.known = wrong
    with pytest.raises(UnavailableError) as error:
        check_ranks(config, ranks)
    return str(error.value)


def with_an_absent_rank(directory):
    config, ranks = on_nodes(directory, timeout_s=3.0)
    if ranks.rank == 3:
        return ""
    with pytest.raises(UnavailableError) as error:
        check_ranks(config, ranks)
    return str(error.value)


def with_a_rank_that_is_cut_off(directory):
    config, ranks = on_nodes(directory, timeout_s=3.0)
    if ranks.rank == 1:
        os.environ["MASTER_PORT"] = "1"  # nobody listens there
    with pytest.raises(UnavailableError) as error:
        check_ranks(config, ranks)
    return str(error.value)


def report_of(directory):
    return json.loads((directory / "run" / "launch" / "train" / "preflight.json").read_text())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_healthy_ranks_pass_and_are_timed(tmp_path):
    reports = run_ranks(healthy, 4, tmp_path)
    assert all(report == reports[0] for report in reports)
    written = report_of(tmp_path)
    assert written["passed"]
    assert written["failing"] == {}
    assert written["hosts"] == ["n0", "n0", "n1", "n1"]
    assert set(written["nodes"]) == {"n0", "n1"}
    assert all(value > 0 for figures in written["nodes"].values() for value in figures.values())
    assert written["all_reduce_gbytes_per_s"] > 0
    assert set(written["slowest"].values()) <= {"n0", "n1"}
    assert run_state.preflight(tmp_path / "run" / "launch" / "train") == written


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_whose_numbers_are_wrong_is_named_by_its_node(tmp_path):
    for message in run_ranks(with_a_wrong_rank, 4, tmp_path):
        assert message.startswith("pre-flight: n1: wrong sums within the node (rank 2)")
        assert "n0" not in message
    assert list(report_of(tmp_path)["failing"]) == ["n1"]
    assert not report_of(tmp_path)["passed"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_does_not_come_is_named(tmp_path):
    *told, absent = run_ranks(with_an_absent_rank, 4, tmp_path)
    assert absent == ""
    for message in told:
        assert "rank 3 on n1 did not join within launch.timeout_s, 3 s" in message
        assert "n0" not in message
    assert list(report_of(tmp_path)["failing"]) == ["n1"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_rank_that_does_not_reach_the_first_says_so(tmp_path):
    first, cut_off = run_ranks(with_a_rank_that_is_cut_off, 2, tmp_path)
    assert "rank 1 on n0 did not join" in first
    assert "rank 1 on n0 does not reach rank 0 at 127.0.0.1:1 within 3 s" in cut_off


def test_known_sums_are_exact():
    cpu = torch.device("cpu")
    ranks = range(30_000)
    total = sum(known(0, 14, cpu).double() * (rank % 61 + 1) for rank in ranks)
    assert torch.equal(known_sum(ranks, 14, cpu).double(), total)
    assert torch.equal(known(61, 14, cpu), known(0, 14, cpu)), "numbers stay small"


def test_neighbours_are_on_other_nodes_in_the_same_place():
    assert [NODES.neighbours(rank) for rank in range(6)] == [(2, 4), (3, 5), (4, 0), (5, 1), (0, 2), (1, 3)]
    assert Nodes(("a", "a")).neighbours(1) == (1, 1)
    assert Nodes(("a", "a", "b")).neighbours(2) == (0, 0), "a node with fewer ranks"


@pytest.mark.parametrize(
    ("ranks", "failing"),
    [
        ({}, {}),
        ({"r3": {"faults": ["alone", "node", "all"]}, "r0": {"faults": ["all"]}}, {"b": "wrong results of its own"}),
        ({"r4": {"faults": ["ring"]}, "r0": {"faults": ["all"]}}, {"b": "what it sends to c arrives wrong (rank 2)"}),
        ({"r2": {"faults": ["node", "all"]}, "r4": {"faults": ["ring"]}}, {"b": "wrong sums within the node"}),
        ({"r5": {"faults": ["all"]}}, dict.fromkeys("abc", "nothing tells whose fault it is")),
    ],
)
def test_the_narrowest_check_that_fails_says_whose_fault_it_is(ranks, failing):
    told = judge(NODES, found(**ranks))["failing"]
    assert told.keys() == failing.keys()
    for name, words in failing.items():
        assert words in told[name]


def test_slow_nodes_are_named():
    report = judge(NODES, found(r3={"tflops": 60.0}))
    assert report["slow"] == {"b": "products of matrices at 60% of the median node's"}
    assert report["slowest"]["products"] == "b"
    # b's network is slow both ways: what it receives, and what c receives from it
    slow_link = {"ring": 2.0}
    report = judge(NODES, found(r2=slow_link, r3=slow_link, r4=slow_link, r5=slow_link))
    assert report["slow"] == {"b": "its network at 20% of the median node's"}
    assert report["slowest"]["network"] == "b"
    assert judge(NODES, found())["slow"] == {}
