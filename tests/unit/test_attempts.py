"""The life of a job, and what follows from it."""

import json
import subprocess
import sys

import pytest

from tests.tiny import ROOT
from uvit_dist import attempts
from uvit_dist.attempts import AttemptLog


def life(*told):
    """Events from short words: "attempt", "attempt 5" (from a checkpoint), "rank_died", "hang 5" (one was made)…"""
    events, number = [], 0
    for words in told:
        name, _, step = words.partition(" ")
        made = int(step) if step else None
        number += name == "attempt"
        event = {"event": name, "attempt": number, "job_id": "7", "restart": 0, "hosts": ["n1"]}
        if name == "attempt":
            event["from_step"] = made
        elif name not in ("submitted", "started", "requeued", "finished", "guard"):
            event |= {"event": "ended", "cause": name, "checkpoint": made, "reason": "so it was", "last_step": 3}
        if name == "guard":
            event |= {"event": "submitted", "guard_of": "7", "job_id": "8"}
        events.append(event)
    return events


@pytest.mark.parametrize(
    ("told", "failures"),
    [
        ([], 0),
        (["submitted", "started", "attempt", "rank_died"], 1),
        (["submitted", "started", "attempt", "rank_died", "attempt", "hang", "attempt", "error"], 3),
        (["started", "attempt", "rank_died", "attempt", "hang 5"], 0),
        (["started", "attempt", "rank_died 5", "attempt 5", "hang 5"], 1),
        (["started", "attempt 5", "rank_died 5"], 1),
        (["started", "attempt 5", "rank_died 10", "attempt 10", "rank_died 10", "attempt 10", "rank_died 10"], 2),
        (["started", "attempt", *["stopped", "requeued", "started", "attempt"] * 4], 0),
        (["started", *["attempt", "stopped", "requeued", "started"] * 5], 1),
        (["started", "attempt", "rank_died", "attempt", "rank_died", "submitted"], 0),
        (["started", "attempt", "rank_died", "attempt", "rank_died", "guard"], 2),
        (["started", "started", "started"], 2),
        (["started", "attempt", "supervisor_died", "guard", "started"], 1),
        (["started", "node_lost", "requeued", "started", "node_lost", "requeued", "started"], 2),
    ],
)
def test_failures_count_until_a_checkpoint_is_made(told, failures):
    assert attempts.failures_without_progress(life(*told)) == failures


def test_work_that_is_done_counts_where_there_are_no_checkpoints():
    events = life("started", "attempt", "node_lost", "attempt", "node_lost", "attempt", "node_lost")
    events[4]["progressed"] = True
    assert attempts.failures_without_progress(events) == 1


def test_finished_until_it_starts_again():
    assert attempts.finished(life("submitted", "started", "attempt", "done")) is None
    assert attempts.finished(life("started", "done", "finished"))["event"] == "finished"
    assert attempts.finished(life("started", "done", "finished", "guard"))["event"] == "finished"
    assert attempts.finished(life("finished", "submitted")) is None
    assert attempts.finished(life("finished", "started")) is None


def test_an_attempt_whose_end_nobody_told():
    assert attempts.open_attempt(life("started", "attempt", "rank_died")) is None
    assert attempts.open_attempt(life("started", "attempt", "rank_died", "attempt"))["attempt"] == 2


def test_hosts_are_left_out_when_lost_or_blamed_twice():
    assert attempts.hosts_to_exclude(life("started", "attempt", "rank_died")) == []
    assert attempts.hosts_to_exclude(life("attempt", "rank_died", "attempt", "hang")) == ["n1"]
    assert attempts.hosts_to_exclude(life("attempt", "node_lost")) == ["n1"]
    found_dead = [{"event": "attempt", "hosts": ["n1"], "lost": ["n3"]}] * 2
    assert attempts.hosts_to_exclude(found_dead) == ["n3"], "a spare, too"
    assert attempts.hosts_to_exclude(life("attempt", "data", "attempt", "stopped", "attempt", "divergence")) == []


def test_the_report_names_each_end():
    text = attempts.report(life("started", "attempt", "rank_died", "attempt", "hang 5"))
    first, second = text.splitlines()
    assert first == "attempt 1 (job 7): rank_died on n1: so it was; last step 3, newest checkpoint none"
    assert second.endswith("newest checkpoint 5")


def test_the_log_is_appended_whole_and_survives_a_cut_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    log = AttemptLog(tmp_path)
    log.add("submitted", job_id="12")
    assert log.add("attempt", hosts=["n0"])["attempt"] == 1
    with open(log.path, "ab") as file:
        file.write(b'{"event": "ended", "ca')
    assert log.add("attempt", hosts=["n0"])["attempt"] == 2
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert log.add("ended", cause="done")["job_id"] == "11_3"
    assert [(e["event"], e["attempt"]) for e in attempts.read(tmp_path)] == [
        ("submitted", 0), ("attempt", 1), ("attempt", 2), ("ended", 2)
    ]  # fmt: skip
    assert len(log.path.read_bytes().splitlines()) == 5
    assert attempts.read(tmp_path / "nowhere") == []


def test_the_newest_checkpoint_is_a_committed_one(tmp_path):
    assert attempts.newest_checkpoint(tmp_path) is None
    for name in ("step-00000005", "step-00000010", ".tmp-step-00000015", "damaged-step-00000020-0"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text(json.dumps({}))
    (tmp_path / "checkpoints/step-00000099").mkdir()
    assert attempts.newest_checkpoint(tmp_path) == 10


def test_the_supervisor_needs_no_torch():
    """It must be there in a second, and leave the node's memory to the ranks."""
    code = "import sys, uvit_dist.supervisor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_job_has_handed_over_once_a_successor_or_guard_is_to_go_on():
    def requeued(*ways):
        return [{"event": "requeued", "job_id": "7", "how": how} for how in ways]

    assert not attempts.handed_over(life("started", "attempt"), "7")
    assert not attempts.handed_over(requeued("sbatch"), "8")
    assert attempts.handed_over(requeued("scontrol", "sbatch"), "7")
    assert attempts.handed_over(requeued("guard"), "7")
    assert not attempts.handed_over(requeued("sbatch", "slurm"), "7"), "it came back itself"
