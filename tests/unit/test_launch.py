"""Who failed first, where several ranks are found dead at one look."""

from signal import SIGABRT, SIGKILL, SIGSEGV

import pytest

from uvit_dist.errors import INTERRUPTED_EXIT_CODE
from uvit_dist.local import first_failure


@pytest.mark.parametrize(
    ("codes", "first"),
    [
        ([None, None], None),
        ([0, None], None),
        ([INTERRUPTED_EXIT_CODE, None], None),
        ([None, 1], (1, 1)),
        ([1, -SIGKILL], (1, -SIGKILL)),  # rank 0 noticed that rank 1 was gone
        ([-SIGABRT, -SIGKILL], (1, -SIGKILL)),
        ([1, -SIGABRT], (0, 1)),
        ([-SIGSEGV, -SIGKILL], (0, -SIGSEGV)),
        ([65, 66], (0, 65)),
    ],
)
def test_a_killed_rank_is_named_before_those_that_lost_it(codes, first):
    assert first_failure(codes) == first
