"""`make demo` itself, shrunk: killed and interrupted it goes on, and it ends with what it promises."""

import contextlib
import json
import os
import signal
import time

import pytest

from tests.integration.test_launch import started, wait_for_step, workers_of
from tests.tiny import SMALL, losses

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.fixture
def demo(tmp_path):
    options = [*SMALL, f"run_dir={tmp_path}", f"data.index={tmp_path}/latents/index.json", "data.samples_per_shard=600",
               f"evaluate.reference={tmp_path}/reference.npz"]  # fmt: skip
    with contextlib.ExitStack() as held:
        yield lambda *more: started(held, "uvit_dist.demo", [*options, *more])


def test_killed_and_interrupted_the_demo_goes_on(tmp_path, demo):
    slow = "train.steps=100000"
    first = demo(slow)
    wait_for_step(tmp_path, 7, first)
    first.kill()  # -9 to the demo alone: launcher and ranks must end too
    first.communicate()
    deadline = time.monotonic() + 120
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(tmp_path) == []
    reached = max(losses(tmp_path))

    second = demo(slow)
    wait_for_step(tmp_path, reached + 5, second)
    os.killpg(second.pid, signal.SIGINT)  # what a terminal's Ctrl-C does
    out, err = second.communicate(timeout=400)
    assert second.returncode == 75, err
    assert "Traceback" not in err
    assert "resumed from" in err
    stopped_at = max(losses(tmp_path))
    assert (tmp_path / f"checkpoints/step-{stopped_at:08d}").is_dir(), "saved when it was interrupted"

    third = demo(f"train.steps={stopped_at + 2}")
    out, err = third.communicate(timeout=400)
    assert f"resumed from {tmp_path}/checkpoints/step-{stopped_at:08d}" in err
    assert "$ python -m uvit_dist.launch --config configs/digits_demo.yaml" in out
    assert "untrained weights" in out
    # A tiny network of a few steps does not draw digits: the demo says so, and that is its exit code.
    assert third.returncode == 1
    assert "the demo failed: (class accuracy at least 0.9" in err
    records = [json.loads(line) for line in (tmp_path / "evaluation/scores.jsonl").read_text().splitlines()]
    assert [record["weights"] for record in records] == ["ema", "untrained"]
    assert all(record["samples"] == 60 for record in records)
