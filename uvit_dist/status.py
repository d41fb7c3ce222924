"""How a run stands, read from its directory alone: on any machine that sees it, with or without SLURM.

    python -m uvit_dist.status runs/digits_demo
    python -m uvit_dist.status runs/digits_demo --json
    python -m uvit_dist.status runs/digits_demo --watch 10

State, step, rate and time left; the newest whole checkpoint; goodput (useful time over all time since the first start:
``uvit_dist.run_state`` says exactly what counts); every attempt with its hosts and why it ended; evaluations. What
precompute jobs have written is told by python -m data_tools.status, of the folder of the shards.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from uvit_dist.errors import explained_exit
from uvit_dist.run_state import RUNNING, displaced, run_state, world

SILENT_S = 120.0
"""A running job whose files have not been written to for so long is said to be silent."""
ATTEMPTS, FINDINGS = 10, 5
"""Attempts, and findings on hosts and data, that are listed; --json has them all."""


def describe(state: Mapping[str, Any]) -> str:
    """Some lines on a run. state: as ``run_state`` gives it."""
    training, lines = state["training"], [f"{state['run_dir']}: {_told(state)}"]
    if training["total_steps"] is not None or training["step"]:
        lines.append("  " + _progress(training))
        saved = training["checkpoint"]
        age = "none" if saved is None else f"step {saved['step']:,}, {_time(state['time'] - saved['time'])} old"
        lines.append(f"  newest whole checkpoint: {age}")
    if training["goodput"] is not None:
        useful, elapsed = _time(training["useful_s"]), _time(training["elapsed_s"])
        lines.append(
            f"  goodput {training['goodput']:.1%}: {useful} of useful steps in {elapsed} since the first start"
        )
    if state["preflight"] is not None:
        lines.append("  " + _preflight(state["preflight"]))
    lines += _findings(state["findings"])
    for job in state["jobs"]:
        lines += _job(job)
    for scores in state["evaluations"][-3:]:
        told = ", ".join(f"{key} {value:.4g}" for key, value in scores.items() if isinstance(value, float))
        lines.append(f"  evaluation of step {scores.get('step', '?')}: {told}")
    if any(job["name"].startswith("precompute") for job in state["jobs"]) and state["shards"]:
        lines.append(f"  shards: python -m data_tools.status {state['shards']}")
    return "\n".join(lines)


def _told(state: Mapping[str, Any]) -> str:
    text = state["state"] if state["cause"] is None else f"{state['state']}: {state['cause']}"
    if state["process"] is not None:
        text += f", here, by process {state['process']}"
    sign = state["last_sign"]
    if state["state"] in RUNNING and sign is not None and state["time"] - sign > SILENT_S:
        text += f", but its files have been silent for {_time(state['time'] - sign)}"
    return text


def _progress(training: Mapping[str, Any]) -> str:
    step, total = training["step"], training["total_steps"]
    parts = [f"step {step:,}" if total is None else f"step {step:,} of {total:,} ({step / total:.1%})"]
    if training["loss"] is not None:
        parts += [f"loss {training['loss']:.4f}", f"{training['images_per_s']:,.0f} images/s"]
    if training["seconds_left"] is not None:
        parts.append(f"{_time(training['seconds_left'])} left")
    return ", ".join(parts)


def _job(job: Mapping[str, Any]) -> list[str]:
    what = job["state"] if job["cause"] is None else f"{_why(job)} (exit code {job['exit_code']})"
    where = f", {world(job)}" if job["state"] in RUNNING and job["attempts"] else ""
    guard = f", guarded by job {job['guard']}" if job["guard"] else ""
    head = f"  {job['name']}: job {job['job_id']}, {what}{where}{guard}"
    counts = [f"{job[key]} {key if job[key] != 1 else key[:-1]}" for key in ("restarts", "requeues") if job[key]]
    lines = [head + (f"; {', '.join(counts)}" if counts else "")]
    if len(job["attempts"]) > ATTEMPTS:
        lines.append(f"    … {len(job['attempts']) - ATTEMPTS} earlier attempts: --json")
    told = [(one["began"], _attempt(one, job["name"] == "train")) for one in job["attempts"][-ATTEMPTS:]]
    for one in job["other_faults"][-ATTEMPTS:]:
        told.append((one["ended"], f"        {_date(one['ended'])}  {one['cause']}: {one['reason']}"))
    return lines + [line for _, line in sorted(told)]


def _attempt(one: Mapping[str, Any], trains: bool) -> str:
    origin = "the beginning" if one["from_step"] is None else f"step {one['from_step']}"
    text = f"    {one['attempt']:>2}  {_date(one['began'])}  job {one['job_id']} on {_hosts(one['hosts'])}"
    text += f" ({told})" if (told := displaced(one)) else ""
    text += f", from {origin}: " if trains else ": "
    if one["ended"] is None:
        return text + ("starting" if one["running"] is None else "running")
    reached = f" at step {one['last_step']}" if trains and one["last_step"] is not None else ""
    text += f"{one['cause']}{reached}, after {_time(one['ended'] - one['began'])}"
    return text if one["reason"] == one["cause"] else f"{text}: {one['reason']}"


def _why(end: Mapping[str, Any]) -> str:
    return end["cause"] if end["reason"] == end["cause"] else f"{end['cause']}: {end['reason']}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _preflight(report: Mapping[str, Any]) -> str:
    text = f"pre-flight {'passed' if report['passed'] else 'failed'} on {_date(report['time'])}"
    told = [f"{name}: {why}" for kind in ("failing", "slow") for name, why in report.get(kind, {}).items()]
    if report["passed"]:
        text += f", all-reduce {report['all_reduce_gbytes_per_s']:.2f} GB/s"
    return "; ".join([text, *told])


def _findings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"  {_date(one['time'])}  {one['kind']} at step {one['step']}: {one['told']}" for one in found[-FINDINGS:]]
    if len(found) > FINDINGS:
        lines.insert(0, f"  … {len(found) - FINDINGS} earlier findings on hosts and data: --json")
    return lines


def _hosts(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="the run's directory")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="tell again and again, until it has finished")
    args = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    with explained_exit():
        while True:
            state = run_state(args.run_dir)
            print(json.dumps(state, indent=1) if args.json else describe(state), flush=True)
            if args.watch is None or state["state"] == "finished":
                return
            time.sleep(args.watch)


if __name__ == "__main__":
    main()
