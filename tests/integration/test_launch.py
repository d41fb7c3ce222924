"""The command users type: interrupted in every way, it can be typed again."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.integration.test_mistakes import launch
from tests.tiny import DEMO, ROOT, losses, overrides, tiny_config, traces
from uvit_dist.config_yaml import dump_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def started(held, module, arguments):
    """A process that does not outlive the test. Its own session: a signal to its group reaches nothing else."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    held.enter_context(process)
    held.callback(process.kill)
    return process


@pytest.fixture
def start():
    with contextlib.ExitStack() as held:
        yield lambda arguments: started(held, "uvit_dist.launch", ["--config", str(DEMO), *arguments])


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"step {step} not reached")


def workers_of(run_dir):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                command = file.read()
        except OSError:
            continue
        if b"uvit_dist.worker" in command and str(run_dir).encode() in command:
            found.append(int(pid))
    return found


def environment_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return b"\0" + file.read()


def test_interrupted_killed_and_locked_out_it_goes_on_where_it_was(data_dir, tmp_path, start):
    arguments = overrides(data_dir, tmp_path, "train.steps=100000", "checkpoint.every=10")
    first = start(arguments)
    wait_for_step(tmp_path, 3, first)

    second = launch(*arguments)
    assert second.returncode == 73
    assert f"{tmp_path}: another job is running in it" in second.stderr

    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=400)
    assert first.returncode == 75, told
    assert "stopping: the ranks save their state" in told
    assert "Traceback" not in told
    stopped_at = max(losses(tmp_path))
    assert (tmp_path / f"checkpoints/step-{stopped_at:08d}/manifest.json").exists()

    third = start(arguments)
    wait_for_step(tmp_path, stopped_at + 25, third)
    third.kill()  # -9, to the launcher alone: its ranks must not live on and write
    third.communicate()
    deadline = time.monotonic() + 60
    while workers_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_of(tmp_path) == []

    before = losses(tmp_path)
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").glob("step-*"))
    last = newest + 3
    done = launch(*arguments, f"train.steps={last}")
    assert done.returncode == 0, done.stderr
    assert f"resumed from {tmp_path}/checkpoints/step-{newest:08d}" in done.stderr
    after = losses(tmp_path)
    again = [step for step in before if newest < step <= last]
    assert all(after[step] == before[step] for step in again)
    ids = [row[0] for row in traces(tmp_path)[last]]
    assert len(set(ids)) == 24
    assert (tmp_path / "ema.safetensors").exists()
    assert [path.name for path in sorted((tmp_path / "logs").glob("*.log"))] == ["rank-00000.log", "rank-00001.log"]


def test_a_rank_that_dies_ends_the_job_and_is_named(data_dir, tmp_path, start):
    process = start(overrides(data_dir, tmp_path, "train.steps=100000"))
    wait_for_step(tmp_path, 2, process)
    (victim,) = [pid for pid in workers_of(tmp_path) if b"\0RANK=1\0" in environment_of(pid)]
    os.kill(victim, signal.SIGKILL)
    _, told = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "error: rank 1 ended first, by SIGKILL; out of memory?" in told
    assert "start the same command again to go on" in told
    assert "Traceback" not in told
    assert workers_of(tmp_path) == []


def test_without_slurm_it_says_what_to_do_instead(tmp_path):
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable)}
    done = subprocess.run(
        [sys.executable, "-m", "uvit_dist.launch", "--config", DEMO, "launch.target=slurm", f"run_dir={tmp_path}/run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 78
    for remedy in ("--local N", "--dry-run", "slurm/rehearsal"):
        assert remedy in done.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_started_by_torchrun_or_one_alone(data_dir, tmp_path):
    worker = ["-m", "uvit_dist.worker", "--job", "train", "--config"]
    starters = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "alone": [sys.executable],
    }
    for name, starter in starters.items():
        run_dir, path = tmp_path / name, tmp_path / f"{name}.yaml"
        ranks = 2 if name == "torchrun" else 1
        config = tiny_config(data_dir, run_dir, f"launch.processes_per_node={ranks}", "train.steps=3")
        path.write_text(dump_config(config))
        done = subprocess.run([*starter, *worker, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert list(losses(run_dir)) == [1, 2, 3]
    assert traces(tmp_path / "torchrun") == traces(tmp_path / "alone")

    path.write_text(path.read_text().replace("global_batch_size: 24", "global_batch_size: 25"))
    done = subprocess.run([sys.executable, *worker, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 78
    assert "train.global_batch_size 25 must be divisible by data.lanes 12" in done.stderr
