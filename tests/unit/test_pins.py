"""Checkpoints that wait for a follow-up are kept by the retention, from their commit on."""

import pytest

from tests.unit.test_checkpoint import process_group, save  # noqa: F401 - a fixture
from uvit_dist import pins
from uvit_dist.follow_ups import committed as steps


@pytest.mark.usefixtures("process_group")
def test_retention_spares_what_is_still_to_be_evaluated(tmp_path):
    pins.switch(tmp_path, on=True)
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert steps(tmp_path) == [1, 2, 3, 4]
    pins.release(tmp_path, 1)
    pins.release(tmp_path, 4)
    save(tmp_path, 5)
    assert steps(tmp_path) == [2, 3, 4, 5]
    pins.switch(tmp_path, on=True)  # a run that goes on
    save(tmp_path, 6)
    assert steps(tmp_path) == [2, 3, 5, 6]
    pins.switch(tmp_path, on=False)
    save(tmp_path, 7)
    assert steps(tmp_path) == [6, 7]


def test_a_run_without_follow_ups_pins_nothing(tmp_path):
    assert pins.pinned(tmp_path, [1, 2]) == set()
    pins.release(tmp_path, 1)
    assert not (tmp_path / "launch").exists()
    pins.switch(tmp_path, on=True)
    pins.release(tmp_path, 1)
    assert pins.pinned(tmp_path, [1, 2]) == {2}
