"""The launcher on a real SLURM cluster: what it refuses, what it submits, how a run ends, and what follows from it."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.status_truth import assert_status_tells
from tests.tiny import DEMO, ROOT, losses, overrides, tiny_config, traces
from uvit_dist import attempts, lease
from uvit_dist.config_cluster import job_directory, read_order

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]

SLOW = "sleep0.25@all,progress:training#*"


@pytest.fixture
def launch(cluster, data_dir, tmp_path):
    """Starts a launch of the tiny run in tmp_path/run, 2 nodes of 1 rank; it does not outlive the test."""
    profile = tmp_path / "profile.yaml"
    with contextlib.ExitStack() as held:

        def start(*arguments, run_dir=tmp_path / "run", profile_text="", fault="", cwd=ROOT):
            environment = f"\n  UVIT_FAULT: '{fault}'" if fault else ""
            profile.write_text(f"gpus_per_node: 0\nenvironment:\n  OMP_NUM_THREADS: '1'{environment}\n{profile_text}")
            more = ["launch.target=slurm", f"launch.cluster={profile}", "launch.nodes=2", "launch.processes_per_node=1"]
            command = [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO)]
            process = subprocess.Popen(
                [*command, *overrides(data_dir, run_dir, *more), *arguments],
                cwd=cwd, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            held.enter_context(process)
            held.callback(process.kill)
            return process

        yield start


def ended(process, timeout=300):
    """(exit code, stdout, stderr)"""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for(condition, what, limit_s=240):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def steps_made(run_dir):
    return max(losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def events(run_dir, name="train", event=None):
    found = attempts.read(job_directory(run_dir, name))
    return [one for one in found if event in (None, one["event"])]


def submitted(out):
    return re.search(r"submitted: job (\S+),", out)[1]


def next_job_id(cluster):
    return re.search(r"NEXT_JOB_ID\s+= (\d+)", cluster.command("scontrol", "show", "config"))[1]


def test_mistakes_cost_no_submission(cluster, launch, tmp_path):
    before = next_job_id(cluster)
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "wrong.yaml").write_text("partitoin: low\n")
    for code, words, arguments in (
        (78, "must be divisible by data.lanes", ["train.global_batch_size=25"]),
        (78, "did you mean partition?", [f"launch.cluster={tmp_path}/wrong.yaml"]),
        (66, "data.index nowhere/index.json", ["data.index=nowhere/index.json"]),
        (73, "file/run", [f"run_dir={tmp_path}/file/run"]),
    ):
        done, out, err = ended(launch(*arguments))
        assert (done, out) == (code, ""), err
        assert words in err
        assert "Traceback" not in err
    assert next_job_id(cluster) == before
    assert cluster.jobs() == []
    assert not (tmp_path / "run" / "launch").exists()

    done, _, err = ended(launch(profile_text="partition: nowhere"))
    assert done == 78
    assert "sbatch refused the job" in err
    assert "invalid partition specified: nowhere" in err
    assert lease.read(job_directory(tmp_path / "run", "train")) is None
    assert events(tmp_path / "run") == []


def test_a_second_launch_is_refused_and_a_stale_lease_broken(cluster, launch, tmp_path):
    done, out, err = ended(launch(profile_text="sbatch: {hold: true}"))
    assert done == 0, err
    job_id = submitted(out)
    assert cluster.state(job_id) == "PENDING"
    done, _, err = ended(launch())
    assert done == 73
    assert f"held by SLURM job {job_id}, since" in err
    assert cluster.jobs() == [job_id]
    assert_status_tells(tmp_path / "run", state="queued", job_id=job_id, attempts=0)
    local = subprocess.run(
        [sys.executable, "-m", "uvit_dist.launch", "--config", DEMO, f"run_dir={tmp_path}/run", "--local", "1"],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert local.returncode == 73
    assert f"held by SLURM job {job_id}, since" in local.stderr

    cluster.command("scancel", job_id)
    wait_for(lambda: cluster.state(job_id) == "CANCELLED", "not cancelled")
    assert lease.read(job_directory(tmp_path / "run", "train")).job_id == job_id
    done, out, err = ended(launch("--follow", "train.steps=5"))
    assert done == 0, out + err
    assert "is broken: the scheduler says that it is gone" in err
    assert "complete after step 5" in out
    assert lease.read(job_directory(tmp_path / "run", "train")) is None


def test_a_cancelled_job_stays_cancelled_whoever_watches_it(cluster, launch, tmp_path):
    run_dir = tmp_path / "run"
    follower = launch("--follow", "train.steps=100000", fault=SLOW)
    wait_for(lambda: steps_made(run_dir) >= 2, "no steps")
    (job_id,) = [one["job_id"] for one in events(run_dir, event="submitted") if not one.get("guard_of")]
    follower.send_signal(signal.SIGINT)
    done, _, err = ended(follower)
    assert done == 130
    assert f"job {job_id} goes on without this" in err
    assert cluster.state(job_id) == "RUNNING"
    made = steps_made(run_dir)
    wait_for(lambda: steps_made(run_dir) > made + 1, "it does not go on")

    cluster.command("scancel", job_id)
    wait_for(lambda: not cluster.jobs(), "jobs are left")
    follow = [sys.executable, "-m", "uvit_dist.follow", str(run_dir)]
    again = subprocess.run(follow, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=400)
    (end,) = events(run_dir, event="finished")
    assert (end["cause"], end["exit_code"]) == ("cancelled", again.returncode)
    assert again.returncode == 75
    assert "cancelled" in again.stdout
    assert events(run_dir, event="requeued") == []
    assert_status_tells(run_dir, state="finished", cause="cancelled", requeues=0, job_id=job_id)
    time.sleep(3)
    assert cluster.jobs() == []
    assert lease.read(job_directory(run_dir, "train")) is None


def test_a_run_that_crashes_at_once_stops_after_three_attempts_with_a_report(cluster, launch, tmp_path):
    done, out, err = ended(launch("--follow", fault="sigkill@rank1,progress:joining#*"))
    run_dir = tmp_path / "run"
    (end,) = events(run_dir, event="finished")
    assert end["cause"] == "gave_up"
    assert done == end["exit_code"] != 0, err
    assert [one["cause"] for one in events(run_dir, event="ended")] == ["rank_died"] * 3
    assert "given up: 3 failures in a row without a new checkpoint (launch.attempts)" in out
    for number in (1, 2, 3):
        assert f"attempt {number} (job {end['job_id']}): rank_died" in out
    assert len({one["job_id"] for one in events(run_dir, event="attempt")}) == 1  # none of them queued again
    assert_status_tells(run_dir, state="finished", cause="gave_up", causes=["rank_died"] * 3, requeues=0)
    wait_for(lambda: not cluster.jobs(), "jobs are left")


def test_a_chain_over_time_limits_runs_the_code_of_its_submission(cluster, launch, data_dir, tmp_path):
    """The checkout is edited while the chain runs; paths in the configuration are relative to the submission.

    Three times the limit is brought near to a run that trains, slowly; the fourth stretch ends the run.
    """
    checkout = tmp_path / "checkout"
    for package in ("uvit_dist", "data_tools"):
        shutil.copytree(ROOT / package, checkout / package)
    run_dir, steps = checkout / "runs" / "chain", 150
    arguments = ["run_dir=runs/chain", f"train.steps={steps}", "checkpoint.every=1000"]
    fault = ";".join(f"sleep1@all,progress:training#*/{attempt}" for attempt in (1, 2, 3))
    limits = "time_limit_min: 9\nsignal_lead_s: 50"
    follower = launch("--follow", *arguments, cwd=checkout, fault=fault, profile_text=limits)
    for number in (1, 2, 3):
        made = steps_made(run_dir)
        wait_for(lambda made=made: steps_made(run_dir) >= made + 2, "no steps")
        (checkout / "uvit_dist" / "train.py").write_text("raise RuntimeError('edited')\n")
        job_id = events(run_dir, event="attempt")[-1]["job_id"]
        cluster.command("scontrol", "update", f"JobId={job_id}", "EndTime=now+60seconds")
        wait_for(lambda number=number: len(events(run_dir, event="requeued")) == number, "not requeued")
        cluster.command("scontrol", "update", f"JobId={job_id}", "TimeLimit=9")
    done, out, err = ended(follower)
    assert done == 0, out + err
    stops = [one for one in events(run_dir, event="ended") if one["cause"] == "stopped"]
    assert len(stops) == 3, stops
    assert all(one["exit_code"] == 75 for one in stops)
    assert [one["how"] for one in events(run_dir, event="requeued")] == ["scontrol"] * len(stops)
    assert len({one["job_id"] for one in events(run_dir, event="attempt")}) == 1
    assert_status_tells(run_dir, state="finished", cause="done", requeues=len(stops), step=steps)
    order = read_order(job_directory(run_dir, "train") / "order.json")
    assert order.code.startswith(f"{run_dir}/launch/code-")
    assert order.workdir == str(checkout)

    undisturbed = tiny_config(data_dir, tmp_path / "undisturbed", f"train.steps={steps}", "checkpoint.every=1000")
    assert run_ranks(train_job, 2, undisturbed) == ["complete"] * 2
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    assert traces(run_dir) == traces(tmp_path / "undisturbed")


def test_each_checkpoint_is_evaluated_in_a_job_of_its_own(cluster, launch, tmp_path):
    run_dir = tmp_path / "run"
    kept = ["train.steps=12", "checkpoint.every=4", "checkpoint.keep=2", "evaluate.samples=16"]
    done, out, err = ended(launch("--follow", "--then", "evaluate", *kept))
    assert done == 0, out + err
    assert "complete after step 12" in out
    names = [f"evaluate-step-{step:08d}" for step in (4, 8, 12)]
    for name in names:
        wait_for(lambda name=name: events(run_dir, name, "finished"), f"{name} has not finished")
        (end,) = events(run_dir, name, "finished")
        assert (end["cause"], end["exit_code"]) == ("done", 0)
        order = read_order(job_directory(run_dir, name) / "order.json")
        assert (order.nodes, order.job) == (1, "evaluate")
        assert_status_tells(run_dir, name, state="finished", cause="done")
    jobs = [events(run_dir, name, "submitted")[0]["job_id"] for name in names]
    assert len({*jobs, *(one["job_id"] for one in events(run_dir, event="submitted"))}) >= 4
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == [
        f"step-{step:08d}" for step in (4, 8, 12)
    ]  # the first was kept for its evaluation
    folder = run_dir / "evaluation"
    scored = {re.search(r"step-\d{8}", str(path.relative_to(folder)))[0] for path in folder.rglob("scores*.json")}
    assert sorted(scored) == [f"step-{step:08d}" for step in (4, 8, 12)]

    # What is evaluated is let go of by the next training; an evaluation that fails does not stop it.
    (tmp_path / "garbage.npz").write_bytes(b"no archive")
    more = ["train.steps=20", "checkpoint.every=4", "checkpoint.keep=2", f"evaluate.reference={tmp_path}/garbage.npz"]
    done, out, err = ended(launch("--follow", "--then", "evaluate", *more))
    assert done == 0, out + err
    wait_for(lambda: events(run_dir, "evaluate-step-00000020", "finished"), "the evaluation has not finished")
    (end,) = events(run_dir, "evaluate-step-00000020", "finished")
    assert (end["cause"], end["exit_code"]) == ("data", 65)
    assert not (run_dir / "checkpoints" / "step-00000004").exists()
    assert (run_dir / "checkpoints" / "step-00000016").exists()


def test_an_array_shares_the_work(cluster, launch, tmp_path):
    index = tmp_path / "latents" / "index.json"
    done, out, err = ended(launch("--follow", "--job", "precompute", "--array", "2", f"data.index={index}"))
    assert done == 0, out + err
    job_ids = re.search(r"submitted: job (\S+) (\S+),", out).groups()
    assert [job_id.partition("_")[2] for job_id in job_ids] == ["0", "1"]
    for name in ("precompute-0", "precompute-1"):
        (end,) = events(tmp_path / "run", name, "finished")
        assert end["cause"] == "done"
    assert index.exists()


def test_a_reference_is_made_by_one_process(cluster, launch, tmp_path):
    reference = tmp_path / "reference.npz"
    done, out, err = ended(launch("--follow", "--job", "reference", f"evaluate.reference={reference}"))
    assert done == 0, out + err
    assert reference.exists()
    (started,) = events(tmp_path / "run", "reference", "started")
    assert len(started["hosts"]) == 1
