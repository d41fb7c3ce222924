"""How the tests are shared between processes (``pytest -n 2``): those of one rig in one process, others by file."""

import pytest

RIGS = ("slurm", "s3")
"""Markers of tests that need servers, which one process starts once for all of them."""


def rig_of(item: pytest.Item) -> str | None:
    return next((name for name in RIGS if item.get_closest_marker(name)), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(rig_of(item) or item.path.stem))
    items.sort(key=lambda item: rig_of(item) != "slurm")  # by far the longest, and mostly waiting: from the start on
