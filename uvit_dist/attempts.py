"""The life of a job in its own words: ``attempts.jsonl``, from which every decision on retrying follows.

One JSON object a line, appended whole. ``event`` is one of submitted, started, attempt, running, ended, requeued,
finished; every line has ``time`` (Unix seconds), ``job_id``, ``restart`` (SLURM's count) and ``attempt``. What follows
from the events are pure functions of the list.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uvit_dist.score_log import read_lines

FILE = "attempts.jsonl"
Event = Mapping[str, Any]
INNOCENT = ("done", "stopped", "cancelled")
"""Causes of an end that is no failure."""
FINAL = {64: "config", 65: "data", 66: "data", 70: "divergence", 73: "error", 78: "config"}
"""Exit codes of mistakes that a retry would repeat → cause."""
STOPS_PER_ATTEMPT = 5
"""So many stops (preemptions, time limits) without a checkpoint weigh as one failure: a limit may be too short."""
BLAMED_TWICE = 2
"""Failures on a host, one way or another, before it is left out; a lost node is left out at once."""
_STEP = re.compile(r"step-(\d{8,})")


class AttemptLog:
    """Appends to the ``attempts.jsonl`` of a job's directory."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory, FILE)

    def add(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append an event, durably. Job, restart and attempt are this process's and the file's, unless given."""
        attempt = number_of_attempts(read(self.path.parent)) + (event == "attempt")
        record = {
            "event": event,
            "time": time.time(),
            "job_id": this_job(),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "attempt": attempt,
            **fields,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            # A kill may have cut the last line: begin on a new one.
            torn = self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
            file.write((b"\n" if torn else b"") + json.dumps(record).encode() + b"\n")
            os.fsync(file.fileno())
        return record


def this_job() -> str | None:
    """The id of the SLURM job that this process belongs to, ARRAY_TASK in an array; none outside."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def read(directory: str | Path) -> list[dict[str, Any]]:
    """The events, oldest first; none where the job was never submitted. A line cut by a kill is passed over."""
    return [event for event in read_lines(Path(directory, FILE)) if "event" in event]


def newest_checkpoint(run_dir: str | Path) -> int | None:
    """The step of a run's newest committed checkpoint. Of its name alone: what is in it, the ranks verify."""
    steps = [
        int(found[1])
        for path in Path(run_dir, "checkpoints").glob("step-*")
        if (found := _STEP.fullmatch(path.name)) and (path / "manifest.json").exists()
    ]
    return max(steps, default=None)


def number_of_attempts(events: Sequence[Event]) -> int:
    """How many attempts there were."""
    return max((int(event.get("attempt", 0)) for event in events), default=0)


def finished(events: Sequence[Event]) -> Event | None:
    """The event that ended the job for good, unless it was submitted anew, or started, since."""
    end = None
    for event in events:
        if event["event"] == "finished":
            end = event
        elif event["event"] in ("started", "attempt") or (event["event"] == "submitted" and not event.get("guard_of")):
            end = None
    return end


def handed_over(events: Sequence[Event], job_id: str) -> bool:
    """Whether a job has left the run to another, its successor or guard."""
    ways = [event["how"] for event in events if event["event"] == "requeued" and event["job_id"] == job_id]
    return bool(ways) and ways[-1] in ("sbatch", "guard")


def open_attempt(events: Sequence[Event]) -> Event | None:
    """The last attempt, if nothing says how it ended: its supervisor died."""
    begun = None
    for event in events:
        if event["event"] == "attempt":
            begun = event
        elif event["event"] in ("ended", "finished"):
            begun = None
    return begun


def failures_without_progress(events: Sequence[Event]) -> int:
    """Failures in a row since a checkpoint was last made; what a user submitted anew starts from none.

    Jobs without checkpoints say "progressed". A supervisor that starts and then says nothing has failed as well.
    """
    failures, stops, best, silent = 0, 0, -1, False
    for event in events:
        if event["event"] == "started":
            failures, silent = failures + silent, True
        elif event["event"] != "submitted":
            silent = False
        if event["event"] == "submitted" and not event.get("guard_of"):
            failures, stops = 0, 0
        if event["event"] == "attempt":
            best = max(best, -1 if event.get("from_step") is None else event["from_step"])
        if event["event"] != "ended":
            continue
        made = event.get("checkpoint")
        if event.get("progressed") or (made is not None and made > best):
            best, failures, stops = best if made is None else max(best, made), 0, 0
        elif event.get("cause") in INNOCENT:
            stops += 1
        else:
            failures += 1
    return failures + stops // STOPS_PER_ATTEMPT


def hosts_to_exclude(events: Sequence[Event]) -> list[str]:
    """Hosts that a new job should not be given: lost ones, and those blamed for several failures of ranks.

    A host that computes wrongly weighs as a lost one, unless others are suspected as well; so do hosts that were slow,
    where ``stragglers.exclude`` says so.
    """
    blamed: Counter[str] = Counter()
    for event in events:
        if event["event"] == "attempt":  # also spares that were found dead, for which no attempt ended
            blamed.update(dict.fromkeys(event.get("lost", []), BLAMED_TWICE))
        if event["event"] == "ended" and event.get("cause") not in (*INNOCENT, *FINAL.values()):
            for host in event.get("hosts", []):
                known = event["cause"] == "node_lost" or (event["cause"] == "hardware" and len(event["hosts"]) == 1)
                blamed[host] += BLAMED_TWICE if known else 1
        for host in event.get("slow_hosts", []):
            blamed[host] += BLAMED_TWICE
    return sorted(host for host, times in blamed.items() if times >= BLAMED_TWICE)


def longest_save_s(events: Sequence[Event]) -> float | None:
    """Seconds of the longest save that the ranks have reported, in the newest attempt that reported any."""
    saves = [float(event["save_s"]) for event in events if event.get("save_s") is not None]
    return saves[-1] if saves else None


def report(events: Sequence[Event]) -> str:
    """What befell a job, one line for each attempt: what a user reads when it has given up."""
    lines = []
    for event in events:
        if event["event"] == "ended":
            hosts = f" on {', '.join(event['hosts'])}" if event.get("hosts") else ""
            saved = event.get("checkpoint")
            lines.append(
                f"attempt {event['attempt']} (job {event['job_id']}): {event['cause']}{hosts}: {event['reason']}; "
                f"last step {event.get('last_step')}, newest checkpoint {'none' if saved is None else saved}"
            )
    return "\n".join(lines)
