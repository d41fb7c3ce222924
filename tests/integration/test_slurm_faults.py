"""Every fault that a SLURM job meets, on a real cluster of four nodes: the run is finished as if nothing had been."""

import os
import re
import signal
import time

import pytest

from tests.integration.s3_fixtures import credentials, proxy, s3_server, upload  # noqa: F401 - fixtures
from tests.slurm_jobs import EVERY, SLOW, STEPS, assert_as_if_undisturbed
from tests.tiny import losses, records

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess, pytest.mark.slow]


def assert_same_job(job, restarts):
    """It ran under the id that it was submitted with, and SLURM started it again so many times."""
    begun = job.of("attempt")
    assert {event["job_id"] for event in begun} == {job.job_id}
    assert begun[-1]["restart"] == restarts


def test_1_preempted_by_a_job_of_a_higher_partition(start, whole, cluster):
    job = start()
    job.wait_for_step(8)
    cluster.preempt(seconds=2)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["stopped", "done"]
    assert job.of("ended")[0]["reason"] == "stopped, and saved"
    assert job.of("ended")[0]["checkpoint"] == job.of("attempt")[1]["from_step"] == job.of("ended")[0]["last_step"]
    assert [event["how"] for event in job.of("requeued")] == ["scontrol"]
    assert_same_job(job, 1)


def test_2_the_time_limit(start, whole, cluster):
    """Brought near, so that it meets a run that trains."""
    job = start(fault="sleep1@all,progress:training#*/1")
    job.wait_for_step(8)
    cluster.command("scontrol", "update", f"JobId={job.job_id}", "EndTime=now+60seconds")
    job.wait_for(lambda: job.of("requeued"), "it is not requeued")
    cluster.command("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=9")
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["stopped", "done"]
    assert job.of("ended")[0]["reason"] == "stopped, and saved"
    assert "time limit" in job.of("requeued")[0]["reason"]
    assert "Caught signal" not in job.told(), "submitit's own handler, which counts time limits under ten minutes"
    assert_same_job(job, 1)


@pytest.mark.parametrize("whom", ["steps", "batch"])
def test_3_a_signal_by_scancel(start, whole, cluster, whom):
    """And what a kill in the middle of submitit's pickling leaves behind does not matter."""
    job = start()
    job.wait_for_step(8)
    for name in ("submitted.pkl", "0_result.pkl"):
        (job.run_dir / f"launch/train/submitit/{job.job_id}_{name}.save_tmp").write_bytes(b"half a pick")
    # to the steps, it also says that some process could not be told: the probes' steps have none any more
    cluster.command("scancel", "--signal=USR2", *(["--batch"] if whom == "batch" else []), job.job_id, check=False)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["stopped", "done"]
    assert job.of("ended")[0]["reason"] == "stopped, and saved"
    assert_same_job(job, 1)


def test_4_kill_9_of_one_rank(start, whole, cluster):
    job = start()
    job.wait_for_step(8)
    victim = cluster.rank_process(1)
    host = cluster.node_of(victim)
    job.kill(victim)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["rank_died", "done"]
    assert job.of("ended")[0]["hosts"] == [host]
    assert "rank 1" in job.of("ended")[0]["reason"]
    assert job.of("attempt")[1]["from_step"] == EVERY
    assert job.of("requeued") == []
    assert_same_job(job, 0)


@pytest.mark.parametrize("which", ["other", "batch"])
def test_5_a_node_dies(start, whole, cluster, which):
    """With the batch process on another node, and on that very one."""
    job = start()
    job.wait_for_step(8)
    hosts = job.of("attempt")[0]["hosts"]
    node = hosts[0 if which == "batch" else 1]
    cluster.kill_node(node)
    try:
        assert_as_if_undisturbed(job, whole)
    finally:
        cluster.revive_node(node)
    assert job.causes == ["node_lost", "done"]
    if which == "other":
        assert job.of("ended")[0]["hosts"] == [node]
        assert [event["how"] for event in job.of("requeued")] == ["scontrol"]
        assert cluster.job(job.job_id)["ExcNodeList"] == node, "it is remembered"
    assert node not in job.of("attempt")[1]["hosts"]
    assert_same_job(job, 1)


def test_6_sigstop_of_one_rank(start, whole, cluster):
    job = start()
    job.wait_for_step(8)
    victim = cluster.rank_process(1)
    host = cluster.node_of(victim)
    job.kill(victim, number=signal.SIGSTOP)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["silent", "done"]
    assert job.of("ended")[0]["exit_code"] == 74
    assert job.of("ended")[0]["hosts"] == [host]
    assert "rank 1" in job.of("ended")[0]["reason"]
    for rank in (0, 1):
        assert re.search(r"most recent call first.*uvit_dist/worker\.py.*, line \d+ in main", job.log(rank), re.S), (
            f"the stacks of its main thread, wherever that stood: {job.log(rank)}"
        )
    assert_same_job(job, 0)


def test_6_a_rank_that_hangs_while_its_heart_beats(start, whole):
    """A stuck read, as a file system or server that never answers: the other rank waits in its collective."""
    job = start("launch.hang_s=31", fault=f"{SLOW};hang@rank1,progress:reading#8/1")
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["hang", "done"]
    ended = job.of("ended")[0]
    assert ended["exit_code"] == 74
    assert "rank 1" in ended["reason"]
    assert "rank 0" not in ended["reason"], "it only waits"
    assert "while reading" in ended["reason"]
    assert "in waiting" in job.log(1)
    assert "in train_step" in job.log(0)
    assert_same_job(job, 0)


def test_7_an_exception_on_one_rank(start, whole):
    job = start(fault=f"{SLOW};raise@rank1,progress:training#8/1")
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["error", "done"]
    ended = job.of("ended")[0]
    assert "rank 1" in ended["reason"]
    assert "RuntimeError: UVIT_FAULT: asked for at progress:training" in ended["reason"]
    assert "Traceback" in job.log(1)
    assert_same_job(job, 0)


def test_8_kill_9_of_everything_during_a_save(start, whole, cluster):
    """Ranks, srun and supervisor, between the manifest and the commit: the guard goes on."""
    job = start(fault=f"{SLOW};sleep600@rank0,save:after_manifest#2/1")
    half = job.run_dir / f"checkpoints/.tmp-step-{2 * EVERY:08d}/manifest.json"
    job.wait_for(half.exists, "the second save has begun")
    job.kill(job.supervisor(), *cluster.processes(containing="uvit_dist.worker"))
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["supervisor_died", "done"]
    assert job.of("attempt")[1]["from_step"] == EVERY
    assert job.of("attempt")[1]["job_id"] != job.job_id


def test_9_the_s3_server_is_away_for_a_minute(start, whole, data_dir, s3_server, proxy, credentials):  # noqa: F811
    """The read that it meets is tried again until it is back: no attempt is lost."""
    url = upload(s3_server, data_dir, "slurm")
    keys = {"AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key}
    patience = ("storage.retry_s=100", "launch.hang_s=120", "launch.timeout_s=150")
    job = start(f"data.index={url}/index.json", f"storage.endpoint={proxy.endpoint}", *patience, environment=keys)
    job.wait_for_step(8)
    proxy.down = True
    time.sleep(60)
    assert max(losses(job.run_dir)) < STEPS, "it had to wait"
    proxy.down = False
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["done"]
    assert sum(record["data_retries"] for record in records(job.run_dir, "metrics.jsonl").values()) > 0
    assert_same_job(job, 0)


def test_10_the_supervisor_is_killed(start, whole):
    job = start()
    job.wait_for_step(8)
    (guard,) = [event for event in job.of("submitted") if event.get("guard_of")]
    assert guard["guard_of"] == job.job_id
    os.kill(job.supervisor(), signal.SIGKILL)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["supervisor_died", "done"]
    assert job.of("attempt")[1]["job_id"] == guard["job_id"]
    assert max(event["step"] for event in job.of("running")) >= EVERY
    assert job.of("ended")[1]["last_step"] == STEPS


def test_11_a_host_that_computes_wrongly_is_left_out(start, whole, cluster):
    """A bit of rank 1's gradient flips in step 8, which is computed twice, and each time that it is done again."""
    flips = ";".join(f"flip@rank1,gradient:silent#{micro_batch}/1" for micro_batch in (15, 17, 19))
    job = start("train.deterministic=true", "attribution.replay=true", "attribution.replay_every=8",
                fault=f"{SLOW};{flips}")  # fmt: skip
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["hardware", "done"]
    first, second = job.of("attempt")
    wrong, ended = first["hosts"][1], job.of("ended")[0]
    assert (ended["hosts"], ended["exit_code"]) == ([wrong], 71)
    assert f"rank 1 on {wrong}: the same step computed twice gave two results; 3 of 3" in ended["reason"]
    assert second["from_step"] == EVERY
    assert wrong not in second["hosts"]
    assert cluster.job(job.job_id)["ExcNodeList"] == wrong
    assert_same_job(job, 1)


def test_12_a_slow_host_is_left_out_of_the_next_start(start, whole, cluster):
    job = start("stragglers.every=2", "stragglers.gathers=2", "stragglers.ratio=5", "stragglers.exclude=true",
                fault=f"{SLOW};sleep0.3@rank1,step:forward#*/1")  # fmt: skip
    job.wait_for(lambda: (job.run_dir / "health.jsonl").exists(), "nobody is named")
    slow = job.of("attempt")[0]["hosts"][1]
    assert f"rank 1 on {slow} is slow" in job.told()
    cluster.command("scancel", "--signal=USR2", "--batch", job.job_id)
    assert_as_if_undisturbed(job, whole)
    assert job.causes == ["stopped", "done"]
    assert job.of("ended")[0]["slow_hosts"] == [slow]
    assert slow not in job.of("attempt")[1]["hosts"]
