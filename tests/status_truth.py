"""What ``python -m uvit_dist.status`` says of a run, held against the run's own files and what a test did to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny import ROOT


def status_of(run_dir: Path) -> dict[str, Any]:
    """The output of ``status --json``; the lines for people must come, too."""
    command = [sys.executable, "-m", "uvit_dist.status", str(run_dir)]
    told = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    state = json.loads(told.stdout)
    assert state["state"] in status_lines(run_dir).splitlines()[0] or state["state"] != "finished"
    return state


def status_lines(run_dir: Path) -> str:
    """What status says for people."""
    command = [sys.executable, "-m", "uvit_dist.status", str(run_dir)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


def assert_status_tells(run_dir: Path, name: str = "train", **expected: Any) -> dict[str, Any]:
    """Status agrees with the files of a job at rest, and with what is expected. Returns what it says.

    expected: any of state, cause (of the job), causes (of its attempts in order), attempts, requeues (counts),
    step, checkpoint (its step), hosts (of each attempt), job_id.
    """
    state = status_of(run_dir)
    job = next(job for job in state["jobs"] if job["name"] == name)
    training = state["training"]
    lines = [json.loads(line) for line in (run_dir / "launch" / name / "attempts.jsonl").read_text().splitlines()]
    events = {kind: [line for line in lines if line["event"] == kind] for kind in ("attempt", "ended", "requeued")}
    told = {
        "state": job["state"],
        "cause": job["cause"],
        "causes": [one["cause"] for one in job["attempts"]],
        "attempts": len(job["attempts"]),
        "requeues": job["requeues"],
        "step": training["step"],
        "checkpoint": None if training["checkpoint"] is None else training["checkpoint"]["step"],
        "hosts": [one["hosts"] for one in job["attempts"]],
        "job_id": job["job_id"],
    }
    assert {key: told[key] for key in expected} == expected, json.dumps(state, indent=1)
    assert told["attempts"] == len(events["attempt"])
    assert told["requeues"] == len(events["requeued"])
    assert [one["from_step"] for one in job["attempts"]] == [event["from_step"] for event in events["attempt"]]
    faults = [one["cause"] for one in job["other_faults"]]
    assert sorted(cause for cause in [*told["causes"], *faults] if cause not in (None, "done")) == sorted(
        event["cause"] for event in events["ended"] if event["cause"] != "done"
    )
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    if name == "train":
        assert state["state"] == job["state"]
        assert told["checkpoint"] == (int(saved[-1].removeprefix("step-")) if saved else None)
    if (run_dir / "metrics.jsonl").exists():
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in metrics if "images_per_s" in record]
        assert training["step"] <= max(steps)
        assert training["step"] >= steps[-1] or job["state"] != "finished"
        assert 0 < training["goodput"] < 1
        assert training["useful_s"] < training["elapsed_s"]
    return state
