"""Status: what is read from the files of a run, whatever state they are in."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT
from uvit_dist.attempts import AttemptLog
from uvit_dist.errors import MissingInputError
from uvit_dist.run_state import counted, newest_whole_checkpoint, run_state, useful_seconds
from uvit_dist.status import describe


def line(step, rate=24.0, when=1000.0, **more):
    """24 samples a step; one step a second, unless told otherwise."""
    return {"step": step, "samples_seen": 24 * step, "images_per_s": rate, "loss": 1 / step, "time": when, **more}


def write_metrics(run_dir, *lines, tail=""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + tail)


def save(run_dir, step, size=4, written=4):
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "rank-0.safetensors").write_bytes(b"x" * written)
    manifest = {"step": step, "files": [{"name": "rank-0.safetensors", "size": size}]}
    (directory / "manifest.json").write_text(json.dumps(manifest))


class Life:
    """Writes a job's events, at times of the test's."""

    def __init__(self, run_dir, name="train"):
        self.log = AttemptLog(run_dir / "launch" / name)

    def add(self, when, event, **fields):
        self.log.add(event, **{"time": when, "job_id": "7", "restart": 0, **fields})

    def attempt(self, when, from_step=None, **fields):
        self.add(when, "attempt", hosts=["n0", "n1"], world_size=2, from_step=from_step, **fields)

    def ended(self, when, cause, reason="so", checkpoint=None, last_step=None, **fields):
        end = {"cause": cause, "reason": reason, "checkpoint": checkpoint, "last_step": last_step, "hosts": []}
        self.add(when, "ended", exit_code=1, **{**end, **fields})


def test_a_step_done_twice_counts_once():
    lines = [line(2), line(4), line(6, rate=12.0), line(4, rate=48.0), line(6)]
    assert [(one["step"], one["images_per_s"]) for one in counted(lines)] == [(2, 24.0), (4, 48.0), (6, 24.0)]
    assert useful_seconds(lines) == pytest.approx(2 + 1 + 2)
    assert useful_seconds(lines[:4]) == pytest.approx(2 + 1), "what was lost has not been done again yet"
    assert useful_seconds([line(10), line(17)]) == pytest.approx(17), "a stop between two lines"
    assert useful_seconds([]) == 0


def test_goodput_is_useful_time_over_all_since_the_first_start(tmp_path):
    life = Life(tmp_path)
    life.add(800, "submitted")
    life.add(900, "started", hosts=["n0", "n1"])
    life.attempt(905)
    write_metrics(tmp_path, line(2, when=912), line(4, when=914), line(6, when=916))
    life.ended(920, "rank_died", checkpoint=4, last_step=7)
    state = run_state(tmp_path, now=950)
    assert (state["state"], state["training"]["step"]) == ("restarting", 7)
    assert state["training"]["goodput"] == pytest.approx(6 / 50), "not since the submission"
    life.attempt(955, from_step=4)
    state = run_state(tmp_path, now=960)
    assert (state["state"], state["training"]["step"]) == ("starting", 4), "of an older attempt is not done yet"
    assert state["training"]["useful_s"] == pytest.approx(4), "step 6 is lost, and not done again yet"
    assert state["training"]["images_per_s"] is None
    life.add(965, "running", step=4)
    write_metrics(tmp_path, line(2, when=912), line(4, when=914), line(6, when=916), line(6, when=970))
    life.add(970, "running", step=4)
    state = run_state(tmp_path, now=975)
    assert (state["state"], state["training"]["step"]) == ("running", 6)
    assert state["training"]["goodput"] == pytest.approx(6 / 75)
    life.ended(980, "done", last_step=6)
    life.add(980, "finished", exit_code=0, reason="done", cause="done")
    state = run_state(tmp_path, now=5000)
    assert (state["state"], state["cause"]) == ("finished", "done")
    assert state["training"]["goodput"] == pytest.approx(6 / 80), "time does not go on when all is done"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (["submitted"], "queued"),
        (["submitted", "started"], "starting"),
        (["submitted", "started", "guard"], "starting"),
        (["submitted", "started", "attempt"], "starting"),
        (["submitted", "started", "attempt", "running"], "running"),
        (["submitted", "started", "attempt", "running", "ended"], "restarting"),
        (["submitted", "started", "attempt", "running", "ended", "requeued"], "requeued"),
        (["submitted", "started", "attempt", "running", "ended", "requeued", "started"], "starting"),
        (["submitted", "started", "attempt", "ended", "finished"], "finished"),
        (["submitted", "started", "attempt", "ended", "finished", "submitted"], "queued"),
    ],
)
def test_the_state_follows_from_the_last_event(tmp_path, events, expected):
    life = Life(tmp_path)
    for when, event in enumerate(events):
        if event == "attempt":
            life.attempt(when)
        elif event == "ended":
            life.ended(when, "rank_died")
        elif event == "guard":
            life.add(when, "submitted", guard_of="7", job_id="8")
        elif event == "finished":
            life.add(when, event, exit_code=1, reason="three failures", cause="gave_up")
        else:
            life.add(when, event)
    state = run_state(tmp_path, now=100)
    assert state["state"] == state["jobs"][0]["state"] == expected
    assert state["jobs"][0]["job_id"] == "7"
    assert state["jobs"][0]["guard"] == ("8" if "guard" in events else None)
    assert state["cause"] == ("gave_up" if expected == "finished" else None)


def test_attempts_tell_where_and_why(tmp_path):
    life = Life(tmp_path)
    life.add(1, "submitted")
    life.add(2, "started", hosts=["n0", "n1"])
    life.ended(3, "node_lost", "n1 does not answer", hosts=["n1"])
    life.add(4, "requeued", how="scontrol")
    life.attempt(5, restart=1)
    life.ended(9, "hang", "rank 1 stood still", checkpoint=5, last_step=8, hosts=["n1"])
    life.attempt(10, from_step=5, restart=1)
    (job,) = run_state(tmp_path, now=20)["jobs"]
    first, second = job["attempts"]
    assert (first["cause"], first["blamed"], first["last_step"], first["checkpoint"]) == ("hang", ["n1"], 8, 5)
    assert (second["from_step"], second["ended"], second["restart"]) == (5, None, 1)
    assert [fault["reason"] for fault in job["other_faults"]] == ["n1 does not answer"]
    assert (job["restarts"], job["requeues"], job["failures_without_progress"]) == (1, 1, 0)
    text = describe(run_state(tmp_path, now=20))
    told = ["node_lost: n1 does not answer", "hang at step 8, after 4 s: rank 1 stood still", "from step 5: starting"]
    for words in [*told, "1 restart, 1 requeue"]:
        assert words in text


@pytest.mark.parametrize(
    ("placed", "told"),
    [
        ({}, "job 7 on n0, n1, from the beginning"),
        ({"wanted": 2, "spares": ["n2"]}, "job 7 on n0, n1, from the beginning"),
        ({"wanted": 2, "stand_ins": ["n1"], "left_out": ["n9"]}, "job 7 on n0, n1 (spare n1, without n9), from"),
        ({"wanted": 4, "left_out": ["n9"]}, "job 7 on n0, n1 (2 of 4 ranks, without n9), from the beginning"),
        ({"wanted": 2, "left_out": ["n9"]}, "job 7 on n0, n1, from the beginning"),  # a spare was found dead
    ],
)
def test_spares_and_fewer_ranks_are_told(tmp_path, placed, told):
    life = Life(tmp_path)
    life.attempt(5, **placed)
    text = describe(run_state(tmp_path, now=20))
    assert told in text
    assert ("2 ranks on n0, n1, spare: n2" in text) == ("spares" in placed)


def test_the_pre_flight_step_is_told(tmp_path):
    Life(tmp_path).add(1, "submitted")
    path = tmp_path / "launch" / "train" / "preflight.json"
    passed = {"time": 5, "passed": True, "failing": {}, "slow": {"n3": "its network at 20%"}}
    path.write_text(json.dumps({**passed, "all_reduce_gbytes_per_s": 3.25}))
    assert "all-reduce 3.25 GB/s; n3: its network at 20%" in describe(run_state(tmp_path))
    path.write_text(json.dumps({"time": 5, "passed": False, "failing": {"n1": "did not join"}}))
    state = run_state(tmp_path)
    assert state["preflight"]["failing"] == {"n1": "did not join"}
    assert "pre-flight failed" in describe(state)
    assert "n1: did not join" in describe(state)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10, written=3)
    (tmp_path / "checkpoints" / "step-00000015").mkdir()
    assert newest_whole_checkpoint(tmp_path)["step"] == 5
    save(tmp_path, 20)
    assert newest_whole_checkpoint(tmp_path)["step"] == 20
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


def test_lines_cut_by_a_kill_are_passed_over(tmp_path):
    life = Life(tmp_path)
    life.add(1, "submitted")
    with open(life.log.path, "a") as file:
        file.write('{"event": "star')
    write_metrics(tmp_path, line(1), tail='{"step": 2, "lo')
    state = run_state(tmp_path, now=20)
    assert (state["state"], state["training"]["step"]) == ("queued", 1)


def test_a_local_run_is_running_while_its_lock_is_held(tmp_path):
    write_metrics(tmp_path, line(4, when=1000.0), {"step": 2, "evaluation": {"fid": 3.0}})
    assert run_state(tmp_path)["training"]["step"] == 4, "a line of an evaluation is none of the training"
    assert run_state(tmp_path)["state"] == "not running"
    assert run_state(tmp_path)["training"]["goodput"] == pytest.approx(1.0)
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = run_state(tmp_path, now=1006.0)
        assert (state["state"], state["process"]) == ("running", os.getpid())
        assert state["training"]["goodput"] == pytest.approx(0.4)
        assert f"running, here, by process {os.getpid()}" in describe(state)
    assert run_state(tmp_path)["state"] == "not running"


def test_silence_is_told(tmp_path):
    life = Life(tmp_path)
    life.add(1, "submitted")
    life.attempt(2)
    written = life.log.path.stat().st_mtime
    assert "silent" not in describe(run_state(tmp_path, now=written + 60))
    assert "but its files have been silent for 10 min 0 s" in describe(run_state(tmp_path, now=written + 600))


def test_the_command_line(tmp_path):
    def call(*arguments):
        command = [sys.executable, "-m", "uvit_dist.status", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    nothing = call(tmp_path)
    assert (nothing.returncode, nothing.stdout) == (66, "")
    assert f"{tmp_path}: no run is here" in nothing.stderr
    assert "Traceback" not in nothing.stderr
    with pytest.raises(MissingInputError):
        run_state(tmp_path)
    write_metrics(tmp_path, line(4))
    assert json.loads(call(tmp_path, "--json").stdout)["training"]["step"] == 4
    assert "step 4" in call(tmp_path).stdout
