"""Jobs whose work is shared by leases or units, on a real cluster: a node dies, and all is there in the end, equal to
what an undisturbed job makes. And a training under torchrun, for clusters without SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.rehearsal.processes import is_rank
from tests.integration.jobs import train_job
from tests.ranks import free_port, run_ranks
from tests.status_truth import assert_status_tells, status_of
from tests.tiny import DEMO, ROOT, losses, overrides, same_tensors, saved_state, tiny_config, traces
from uvit_dist import attempts

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]
LIMIT_S = 240
TASKS = 4


class Jobs:
    """A launch on the cluster, by the command that users type, and what becomes of its jobs."""

    def __init__(self, cluster, data_dir, run_dir):
        self.cluster, self.run_dir = cluster, run_dir
        self.profile = run_dir.with_name(f"{run_dir.name}-cluster.yaml")
        self.data_dir = data_dir

    def launch(self, *arguments, fault=""):
        """Submit. Returns the jobs' ids."""
        self.profile.write_text(
            "partition: low\nexclusive: true\ngpus_per_node: 0\ntime_limit_min: 9\nenvironment:\n"
            f"  DS_ACCELERATOR: cpu\n  UVIT_FAULT: '{fault}'\n"
        )
        where = ["launch.target=slurm", f"launch.cluster={self.profile}", "launch.processes_per_node=1",
                 "launch.silence_s=8", "launch.hang_s=60", "launch.start_s=120"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO),
             *overrides(self.data_dir, self.run_dir, *where), *arguments],
            cwd=ROOT, env=self.cluster.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return re.search(r"submitted: job ([\d_ ]+),", done.stdout)[1].split()

    def events(self, name):
        return attempts.read(self.run_dir / "launch" / name)

    def finished(self, *names):
        """Wait until they have ended for good. Returns the ends."""
        self.wait_for(lambda: all(attempts.finished(self.events(name)) for name in names), f"{names} do not finish")
        return [attempts.finished(self.events(name)) for name in names]

    def wait_for(self, condition, what):
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.told()}"
            time.sleep(0.1)

    def told(self):
        paths = [*self.run_dir.glob("launch/*/submitit/*log*"), *self.run_dir.glob("logs/**/*.log")]
        texts = [f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(paths)]
        states = [str(event) for path in sorted(self.run_dir.glob("launch/*")) for event in attempts.read(path)]
        return "\n".join([*states, self.cluster.queue(), *texts])


def written(directory):
    """Name → bytes, of the shards and their index."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".tar", ".json")}


def precompute_arguments(directory):
    """The 1,797 digits in 57 shards."""
    return [f"data.index={directory}/shards/index.json", "data.samples_per_shard=32", "precompute.lease_s=4",
            "precompute.batch_size=16"]  # fmt: skip


@pytest.fixture(scope="module")
def whole_shards(data_dir, tmp_path_factory):
    """What one undisturbed worker makes."""
    directory = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO), "--job", "precompute", "--local", "1",
         *overrides(data_dir, directory / "run", *precompute_arguments(directory))],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return written(directory / "shards")


def test_16_precompute_as_an_array_with_a_node_killed_makes_what_one_worker_makes(
    cluster, data_dir, whole_shards, tmp_path
):
    jobs = Jobs(cluster, data_dir, tmp_path / "run")
    arguments = ["--job", "precompute", "--array", str(TASKS), *precompute_arguments(tmp_path)]
    job_ids = jobs.launch(*arguments, fault="sleep0.2@all,progress:working#*")
    assert len(job_ids) == TASKS
    names = [f"precompute-{task}" for task in range(TASKS)]
    shards = tmp_path / "shards"
    jobs.wait_for(lambda: len(list(shards.glob("*.tar"))) >= 3, "no shards are written")
    assert len(list(shards.glob("*.tar"))) < len(whole_shards) - 1, "it was too quick to be disturbed"
    working = cluster.processes(containing="uvit_dist.worker")
    victim = cluster.node_of(working[-1])
    cluster.kill_node(victim)
    jobs.finished(*names)
    cluster.revive_node(victim)
    assert [attempts.finished(jobs.events(name))["cause"] for name in names] == ["done"] * TASKS, jobs.told()
    assert written(shards) == whole_shards
    states = {job["name"]: job for job in status_of(tmp_path / "run")["jobs"]}
    hit = [name for name in names if len(states[name]["attempts"]) + len(states[name]["other_faults"]) > 1]
    assert hit, "status tells of the attempt that was lost"
    for name in names:
        assert_status_tells(tmp_path / "run", name, state="finished", cause="done")


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A run to evaluate."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train_job, 2, tiny_config(data_dir, run_dir))
    return run_dir


def scores(run_dir):
    """The newest scores: all figures but the time it took."""
    newest = json.loads((run_dir / "evaluation" / "scores.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in newest.items() if isinstance(value, int | float) and "seconds" not in key}


def evaluate_here(data_dir, run_dir, trained):
    """Undisturbed, by one process that adds up as those on the nodes do: with one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO), "--job", "evaluate", "--local", "1",
         *overrides(data_dir, run_dir, f"evaluate.checkpoint={trained}", *EVALUATION)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return scores(run_dir)


EVALUATION = ["evaluate.samples=192", "evaluate.sub_batch_size=8", "evaluate.chunk_size=8"]
"""24 units of work."""


def test_16_an_evaluation_over_four_nodes_with_a_node_killed_scores_as_an_undisturbed_one(
    cluster, data_dir, trained, tmp_path
):
    whole = evaluate_here(data_dir, tmp_path / "whole", trained)
    jobs = Jobs(cluster, data_dir, tmp_path / "run")
    arguments = ["--job", "evaluate", "--nodes", "4", f"evaluate.checkpoint={trained}", *EVALUATION]
    (job_id,) = jobs.launch(*arguments, fault="sleep1@all,progress:working#*")

    def units():
        return list((tmp_path / "run").glob("evaluation/*/*/*.npz"))

    jobs.wait_for(lambda: len(units()) >= 3, "no unit is done")
    assert len(units()) < 20, "it was too quick to be disturbed"
    kept = {path: path.stat().st_mtime_ns for path in units()}
    cluster.kill_node("n3")
    # The others do its part, or its supervisor or SLURM requeues it before they have; then it needs four nodes.
    jobs.wait_for(
        lambda: attempts.finished(jobs.events("evaluate")) or cluster.state(job_id) == "PENDING", "neither is so"
    )
    cluster.revive_node("n3", wait=False)
    (end,) = jobs.finished("evaluate")
    assert end["cause"] == "done", jobs.told()
    assert scores(tmp_path / "run") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was done is not done again"
    state = assert_status_tells(tmp_path / "run", "evaluate", state="finished", cause="done")
    *before, last = [one["cause"] for one in state["jobs"][0]["attempts"]]
    assert last == "done"
    assert set(before) <= {"node_lost"}
    assert state["evaluations"][-1]["step"] == whole["step"]


def test_torchrun_on_two_nodes_trains_what_the_launcher_does(data_dir, trained, tmp_path):
    """Two agents, as on two machines without SLURM, on loopback."""
    from uvit_dist.config_yaml import dump_config

    run_dir = tmp_path / "run"
    config = tiny_config(data_dir, run_dir)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    port = free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run",
             "--local-addr", "127.0.0.1",
             "-m", "uvit_dist.worker", "--config", str(resolved), "--job", "train"]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    try:
        told = [agent.communicate(timeout=LIMIT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # and its worker
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(told)
    assert traces(run_dir) == traces(trained)
    assert losses(run_dir) == losses(trained)
    assert same_tensors(saved_state(run_dir, 10), saved_state(trained, 10))
    state = status_of(run_dir)
    assert (state["training"]["step"], state["training"]["checkpoint"]["step"]) == (10, 10)


def test_a_training_begins_after_its_ranks_have_tried_each_other_out(cluster, data_dir, tmp_path):
    jobs = Jobs(cluster, data_dir, tmp_path / "run")
    jobs.launch("--nodes", "3", "launch.preflight=true", "train.micro_batch_size=8", "train.steps=5")
    (end,) = jobs.finished("train")
    assert end["cause"] == "done", jobs.told()
    report = status_of(tmp_path / "run")["preflight"]
    assert report["passed"]
    assert report["hosts"] == sorted(report["nodes"])
    assert len(report["nodes"]) == 3
    assert_status_tells(tmp_path / "run", state="finished", cause="done", causes=["done"], step=5)
    assert Path(tmp_path, "run", "ema.safetensors").exists()


def test_a_node_that_does_not_answer_the_roll_call_is_left_out(cluster, data_dir, tmp_path):
    jobs = Jobs(cluster, data_dir, tmp_path / "run")
    limits = ["launch.timeout_s=12", "storage.retry_s=5"]
    (job_id,) = jobs.launch("--nodes", "2", "launch.preflight=true", "train.steps=5", *limits)

    def second_rank():
        return [pid for pid in cluster.processes(containing="--job preflight") if is_rank(pid, 1)]

    jobs.wait_for(second_rank, "no pre-flight step begins")
    (pid,) = second_rank()
    victim = cluster.node_of(pid)
    os.kill(pid, signal.SIGSTOP)  # it still imports
    (end,) = jobs.finished("train")
    assert end["cause"] == "done", jobs.told()
    (fault,) = [event for event in jobs.events("train") if event["event"] == "ended" and event["cause"] != "done"]
    assert fault["hosts"] == [victim]
    assert f"rank 1 on {victim} did not join within launch.timeout_s, 12 s" in fault["reason"]
    (attempt,) = [event for event in jobs.events("train") if event["event"] == "attempt"]
    assert victim not in attempt["hosts"]
    assert (attempt["job_id"], attempt["restart"]) == (job_id, 1)
    assert status_of(tmp_path / "run")["preflight"]["passed"]
    state = assert_status_tells(tmp_path / "run", state="finished", cause="done", causes=["done"], requeues=1, step=5)
    assert [one["blamed"] for one in state["jobs"][0]["other_faults"]] == [[victim]]
