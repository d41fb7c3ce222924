"""What a run directory says of its run: jobs, attempts, progress, checkpoints, goodput. Read from its files alone.

**Goodput** is useful time over all time. Useful is the time of the steps that count: those up to the newest line of
``metrics.jsonl``, each once. A line covers the steps since the line before it, and each of them counts as global batch
size over the line's images/s; lines that a restart went back behind do not count, so that work done twice counts once.
All time runs from the first start of the training (of its supervisor, on a cluster; else of the first steps that
count) to its end; to now, where it has not ended for good; to the newest line, where nobody runs it. The queue before
the first start does not count, a queue between two attempts does.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uvit_dist import attempts, health
from uvit_dist.attempts import Event
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import MissingInputError, UserError

METRICS, MANIFEST, PREFLIGHT = "metrics.jsonl", "manifest.json", "preflight.json"
RUNNING, WAITING = ("starting", "running", "restarting"), ("queued", "requeued")
"""States of a job that goes on: in an allocation, and in the queue. The others: finished; "not running"."""
Json = dict[str, Any]


def run_state(run_dir: str | Path, now: float | None = None) -> Json:
    """All that is known of a run, as JSON can hold it; times are Unix seconds.

    "state", "cause": of the training; "training": its progress; "jobs": of each job of the run, with its attempts;
    "findings": of ``health``, and "evaluations": scores, both oldest first. now: the present time. Raises
    ``MissingInputError`` where there is no run.
    """
    directory, now = Path(run_dir), time.time() if now is None else now
    jobs = [job_state(path.parent) for path in sorted(directory.glob(f"launch/*/{attempts.FILE}"))]
    lines = [line for line in json_lines(directory / METRICS) if "images_per_s" in line]  # not those of evaluations
    holder = _holder(directory / ".lock")
    if not jobs and not lines and holder is None and not (directory / "checkpoints").is_dir():
        raise MissingInputError(
            f"{run_dir}: no run is here: neither jobs, nor metrics, nor checkpoints; give its run_dir"
        )
    config = config_of(directory)
    training = next((job for job in jobs if job["name"] == "train"), None)
    state: Json = {"state": "not running", "cause": None} if training is None else training
    total = None if config is None else config.train.steps
    progress = _progress(directory, training, lines, total)
    if holder is not None:  # a job of this machine, by the local launcher or torchrun
        state = {"state": "running", "cause": None}
    elif training is None and total is not None and progress["step"] >= total:
        state = {"state": "finished", "cause": "done"}
    progress |= _goodput(lines, training, state["state"], now)
    if state["state"] != "running" or progress["steps_per_s"] is None or total is None:
        progress["seconds_left"] = None
    else:
        progress["seconds_left"] = (total - progress["step"]) / progress["steps_per_s"]
    return {
        "run_dir": str(directory.absolute()),
        "time": now,
        "state": state["state"],
        "cause": state["cause"],
        "process": holder,
        "last_sign": _last_sign(directory),
        "training": progress,
        "jobs": jobs,
        "preflight": preflight(directory / "launch" / "train"),
        "findings": health.findings(directory),
        "evaluations": json_lines(directory / "evaluation" / "scores.jsonl"),
        "shards": None if config is None or config.data.index is None else os.path.dirname(config.data.index),
    }


def job_state(directory: str | Path) -> Json:
    """One job of a run, of the folder ``RUN_DIR/launch/NAME``."""
    events = attempts.read(directory)
    end = attempts.finished(events)
    newest: Event = events[-1] if events else {}
    begun, outside = _attempts(events)
    return {
        "name": Path(directory).name,
        "state": _state(events),
        "cause": None if end is None else end["cause"],
        "reason": None if end is None else end["reason"],
        "exit_code": None if end is None else end["exit_code"],
        "job_id": next((event["job_id"] for event in reversed(events) if not event.get("guard_of")), None),
        "guard": _guard(events),
        "restart": newest.get("restart", 0),
        "submitted": next((event["time"] for event in events if event["event"] == "submitted"), None),
        "started": next((event["time"] for event in events if event["event"] == "started"), None),
        "finished": None if end is None else end["time"],
        "attempts": begun,
        "other_faults": outside,
        "restarts": max(0, attempts.number_of_attempts(events) - 1),
        "requeues": sum(event["event"] == "requeued" for event in events),
        "failures_without_progress": attempts.failures_without_progress(events),
    }


def _state(events: Sequence[Event]) -> str:
    if attempts.finished(events) is not None:
        return "finished"
    own = [event["event"] for event in events if not event.get("guard_of")]
    return {
        "submitted": "queued",
        "started": "starting",
        "attempt": "starting",
        "running": "running",
        "ended": "restarting",
        "requeued": "requeued",
    }.get(own[-1] if own else "", "not running")


def _guard(events: Sequence[Event]) -> str | None:
    """The job that would go on if the present one died."""
    if attempts.finished(events) is not None:
        return None
    return next((str(event["job_id"]) for event in reversed(events) if event.get("guard_of")), None)


def _attempts(events: Sequence[Event]) -> tuple[list[Json], list[Json]]:
    """The attempts, oldest first: where and from what they began, how and why they ended; and faults outside of them,
    of a pre-flight step, or of a node that was lost before an attempt could begin."""
    found, outside = list[Json](), list[Json]()
    for event in events:
        newest = found[-1] if found and found[-1]["ended"] is None else None
        if event["event"] == "attempt":
            keys = ("attempt", "job_id", "restart", "hosts", "world_size", "from_step")
            placed = {key: event.get(key, []) for key in ("spares", "stand_ins", "left_out")}
            placed["wanted"] = event.get("wanted", event["world_size"])  # those of older runs do not say
            unknown = {"running": None, "ended": None, "cause": None, "last_step": None}
            found.append({**{key: event[key] for key in keys}, **placed, "began": event["time"], **unknown})
        elif event["event"] == "running" and newest is not None:
            newest["running"] = event["time"]
        elif event["event"] == "ended":
            end = {key: event.get(key) for key in ("cause", "reason", "exit_code", "checkpoint", "last_step")}
            end |= {"ended": event["time"], "blamed": event.get("hosts", [])}
            if newest is not None:
                newest |= end
            elif event.get("cause") != "done":
                outside.append({"job_id": event["job_id"], **end})
    return found, outside


# -- progress --------------------------------------------------------------------------------------------------------


def _progress(directory: Path, training: Json | None, lines: Sequence[Json], total: int | None) -> Json:
    """ "step": updates made, by the newest attempt where it has told of any, else where it began."""
    line = lines[-1] if lines else None
    step = 0 if line is None else int(line["step"])
    newest = training["attempts"][-1] if training is not None and training["attempts"] else None
    if newest is not None:
        if line is None or line["time"] < newest["began"]:
            step, line = newest["from_step"] or 0, None
        step = max(step, newest.get("last_step") or 0)
    saved = newest_whole_checkpoint(directory)
    batch = None if line is None else line["samples_seen"] / line["step"]
    return {
        "step": step,
        "total_steps": total,
        "loss": None if line is None else line["loss"],
        "images_per_s": None if line is None else line["images_per_s"],
        "steps_per_s": None if line is None or batch is None else line["images_per_s"] / batch,
        "last_line": lines[-1]["time"] if lines else None,
        "checkpoint": saved,
    }


def newest_whole_checkpoint(run_dir: str | Path) -> Json | None:
    """{"step", "path", "time"} of the newest checkpoint whose files have the sizes that its manifest says, or none."""
    for path in sorted(Path(run_dir, "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads((path / MANIFEST).read_bytes())
            if all((path / file["name"]).stat().st_size == file["size"] for file in manifest["files"]):
                made = (path / MANIFEST).stat().st_mtime
                return {"step": int(manifest["step"]), "path": str(path), "time": made}
    return None


def counted(lines: Sequence[Json], begun: Sequence[Json] = ()) -> list[Json]:
    """The lines of metrics.jsonl that count: without those that a restart went back behind.

    begun: attempts, with "began" and "from_step", oldest first.
    """
    kept, waiting = list[Json](), list(begun)

    def go_back(step: int) -> None:
        while kept and kept[-1]["step"] > step:
            kept.pop()

    for line in lines:
        while waiting and waiting[0]["began"] <= line["time"]:
            go_back(waiting.pop(0)["from_step"] or 0)
        go_back(line["step"] - 1)
        kept.append(line)
    for attempt in waiting:
        go_back(attempt["from_step"] or 0)
    return kept


def useful_seconds(lines: Sequence[Json], begun: Sequence[Json] = ()) -> float:
    """Seconds of the steps that count."""
    before, seconds = 0, 0.0
    for line in counted(lines, begun):
        seconds += (line["step"] - before) * (line["samples_seen"] / line["step"]) / line["images_per_s"]
        before = line["step"]
    return seconds


def _goodput(lines: Sequence[Json], training: Json | None, state: str, now: float) -> Json:
    useful, started = useful_seconds(lines, [] if training is None else training["attempts"]), None
    if training is not None:
        started = training["started"]
    if lines:
        first = lines[0]["time"] - useful_seconds(lines[:1])
        started = first if started is None else min(started, first)
    if started is None:
        return {"useful_s": 0.0, "elapsed_s": None, "goodput": None}
    end = now
    if state == "finished" and training is not None and training["finished"] is not None:
        end = training["finished"]
    elif state not in (*RUNNING, *WAITING) and lines:
        end = lines[-1]["time"]
    elapsed = max(end - started, 1e-9)
    return {"useful_s": useful, "elapsed_s": elapsed, "goodput": min(1.0, useful / elapsed)}


def preflight(directory: str | Path) -> Json | None:
    """What the newest pre-flight step of a job's directory found (``rank_check``), or none.

    "failing" and "slow": host → why.
    """
    try:
        report: Json = json.loads(Path(directory, PREFLIGHT).read_bytes())
    except (OSError, ValueError):
        return None
    return report


# -- files -----------------------------------------------------------------------------------------------------------


def json_lines(path: Path) -> list[Json]:
    """The objects in a file of JSON lines; those cut by a kill are passed over."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    found.append(line)
    return found


def config_of(directory: Path) -> Config | None:
    """The configuration of the newest launch of the training, or of another job."""
    ours = [directory / "launch" / "train" / "config.yaml", directory / ".launch-train.yaml"]
    others = [*directory.glob("launch/*/config.yaml"), *directory.glob(".launch-*.yaml")]
    for paths in (ours, others):
        for path in sorted((path for path in paths if path.exists()), key=os.path.getmtime, reverse=True):
            with contextlib.suppress(UserError):
                return load_config(path)
    return None


def _holder(lock: Path) -> int | None:
    """The process of this machine that holds a run directory's lock, or none. Linux; elsewhere nobody is seen."""
    with contextlib.suppress(OSError):
        inode = lock.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                return int(words[4])
    return None


def _last_sign(directory: Path) -> float | None:
    """When a file that live jobs write to was last written to."""
    paths = [directory / METRICS, *directory.glob(f"launch/*/{attempts.FILE}"), *directory.glob("logs/**/*.log")]
    times = []
    for path in paths:
        with contextlib.suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times, default=None)


def world(job: Mapping[str, Any]) -> str:
    """Where a job's newest attempt ran."""
    newest = job["attempts"][-1] if job["attempts"] else None
    if newest is None:
        return ""
    spares = f", spare: {', '.join(newest['spares'])}" if newest["spares"] else ""
    return f"{newest['world_size']} ranks on {', '.join(newest['hosts'])}{spares}"


def displaced(attempt: Mapping[str, Any]) -> str:
    """What is not as it was ordered in where an attempt ran: spares that stand in, hosts that lack; or nothing."""
    told = [f"spare {', '.join(attempt['stand_ins'])}"] if attempt["stand_ins"] else []
    if attempt["world_size"] < attempt["wanted"]:
        told.append(f"{attempt['world_size']} of {attempt['wanted']} ranks")
    if told and attempt["left_out"]:
        told.append(f"without {', '.join(attempt['left_out'])}")
    return ", ".join(told)
