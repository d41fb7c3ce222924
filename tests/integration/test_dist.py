"""Work of rank 0 that takes longer than a collective may."""

import time

import pytest

from tests.ranks import run_ranks
from uvit_dist import dist
from uvit_dist.errors import DataError

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
TIMEOUT_S, LONGER_S = 2.0, 5.0


def long_work(how: str) -> str:
    ranks = dist.ranks_from_environment()
    dist.start(ranks, TIMEOUT_S)
    dist.ASKED_EVERY_S = 0.5

    def work():
        time.sleep(LONGER_S)
        if how == "a mistake":
            raise DataError("shards: damaged")
        return "done"

    try:
        return (dist.on_main if how == "in a collective" else dist.on_main_for_long)(ranks, work)
    except DataError as error:
        return f"rank {ranks.rank}: {error}"


def test_the_others_wait_as_long_as_it_takes_and_hear_of_its_result_or_error():
    assert run_ranks(long_work, 2, "for long") == ["done", "done"]
    assert run_ranks(long_work, 2, "a mistake") == ["rank 0: shards: damaged", "rank 1: shards: damaged"]
    with pytest.raises(AssertionError, match=r"exit codes \[\d, 1\]"):
        run_ranks(long_work, 2, "in a collective")
