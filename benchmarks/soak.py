"""A training that something always happens to: half an hour of random faults on the rehearsal cluster.

    make soak-cluster

Faults come as a Poisson process of a set mean, whatever the run is doing: kinds in a random order, each as often as the
others. A node that died boots again after some seconds. The run has a spare node. When the time is up it goes on to its
last step without more of them. Checked: it ends done, and its losses are those of the undisturbed run, bit for bit.
Goodput, the share of the time that made steps which lasted, stands beside what ``--dry-run``'s model (Daly 2006) says
for the mean measured time from a fault to the first step after it. Writes soak.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import ROOT, provenance
from benchmarks.slurm_faults import FAULTS, Fault, make_data
from slurm.rehearsal.cluster import Cluster, missing_programs, needed
from tests.slurm_jobs import SlurmJob
from tests.tiny import losses, traces
from uvit_dist import attempts, forecast

COMMAND = "make soak-cluster"
STEP_S, EVERY, NODES, BOOT_S, AGAIN_S = 0.3, 20, 6, 25.0, 3.0
"""Seconds that each step is slowed by; steps between two saves; nodes; seconds until a dead node boots again, and until
another fault is tried in place of one that met nothing."""


def kill_all_ranks(job: SlurmJob) -> None:
    """kill -9 of all ranks at once."""
    job.kill(job.cluster.rank_process(0), job.cluster.rank_process(1))


def kill_all(job: SlurmJob) -> None:
    """kill -9 of the ranks and the supervisor."""
    job.kill(job.supervisor(), job.cluster.rank_process(0), job.cluster.rank_process(1))


def requeue(job: SlurmJob) -> None:
    """An operator's scontrol requeue."""
    job.cluster.command("scontrol", "requeue", job.of("attempt")[-1]["job_id"])


def signal_newest(job: SlurmJob) -> None:
    """scancel --signal=USR2 of the job that runs now: a guard goes on under another id."""
    job.cluster.command("scancel", "--signal=USR2", "--batch", job.of("attempt")[-1]["job_id"])


def kill_in_a_save(job: SlurmJob) -> None:
    """kill -9 of all ranks while a checkpoint is written."""
    deadline = time.monotonic() + 30
    while not list((job.run_dir / "checkpoints").glob(".tmp-step-*")):
        if time.monotonic() > deadline:
            raise LookupError("nothing is saved")
        time.sleep(0.002)
    kill_all_ranks(job)


BLIND = ("node lost, with a spare", "node lost, fewer go on", "node of the batch process lost, with a spare")
"""Kinds that differ from others by what the run may do, not by what befalls it."""
KINDS: dict[str, Fault] = {
    **{name: fault for name, fault in FAULTS.items() if name not in BLIND},
    "scancel --signal=USR2": signal_newest,
    "all ranks killed": kill_all_ranks,
    "all ranks killed in a save": kill_in_a_save,
    "ranks and supervisor killed": kill_all,
    "scontrol requeue": requeue,
}
FEWEST = 20
"""Faults that a soak of half an hour has at least; of a shorter one, in proportion."""


class Nodes:
    """Boots the nodes that died, when their time has come."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._dead = cluster, dict[str, float]()

    def look(self, all_now: bool = False) -> None:
        """Boot those that have been dead for BOOT_S, or all."""
        now, running = time.monotonic(), self._cluster.living_nodes()
        for node in self._cluster.nodes:
            if node not in running:
                self._dead.setdefault(node, now)
        for node, since in list(self._dead.items()):
            if all_now or now - since > BOOT_S:
                del self._dead[node]
                self._cluster.revive_node(node, wait=False)


def is_over(job: SlurmJob) -> bool:
    """Whether the run has ended. Nobody cancels it: what looks so is an operator's requeue that has only begun."""
    end = attempts.finished(job.events)
    return end is not None and end["cause"] != "cancelled"


def soak(job: SlurmJob, seconds: float, mtbf_s: float, draw: random.Random) -> list[dict[str, Any]]:
    """Let faults happen for so long, then let the run end. Returns {"kind", "time", "met"} of each fault."""
    nodes, happened, order, missed = Nodes(job.cluster), list[dict[str, Any]](), list[str](), list[str]()
    end = time.monotonic() + seconds
    due = time.monotonic() + draw.expovariate(1 / mtbf_s)
    while time.monotonic() < end and not is_over(job):
        nodes.look()
        time.sleep(0.5)
        if time.monotonic() < due:
            continue
        due += draw.expovariate(1 / mtbf_s)
        if not order:
            order, missed = [*draw.sample(list(KINDS), len(KINDS)), *missed], []
        kind, at, step = order.pop(), time.time(), max(losses(job.run_dir), default=0)
        try:
            KINDS[kind](job)
        except (LookupError, ValueError, OSError, subprocess.CalledProcessError) as error:
            print(f"{kind}: nothing there to meet ({error})", file=sys.stderr, flush=True)
            missed.append(kind)  # the run starts, or waits in the queue: first in the next order
            due = time.monotonic() + AGAIN_S
            continue
        happened.append({"kind": kind, "time": at, "at_step": step})
        print(f"{len(happened):3} {kind} at step {step}", file=sys.stderr, flush=True)
    nodes.look(all_now=True)
    return happened


def judged(job: SlurmJob, whole: SlurmJob, faults: list[dict[str, Any]], began: float, ended: float) -> dict[str, Any]:
    """What became of the run. began, ended: of the time with faults."""
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    within = [line for line in lines if began <= line["time"] <= ended]
    step_s = statistics.median(b["time"] - a["time"] for a, b in pairwise(within)
                               if b["step"] == a["step"] + 1)  # fmt: skip
    for number, fault in enumerate(faults):
        after = faults[number + 1]["time"] if number + 1 < len(faults) else float("inf")
        ends = [event["time"] for event in job.of("ended") if event["time"] >= fault["time"]]
        first = [line["time"] for line in lines if ends and line["time"] > ends[0]]
        if first and first[0] < after:  # no other fault between
            fault["restart_s"] = first[0] - fault["time"]
    restarts = [fault["restart_s"] for fault in faults if "restart_s" in fault]
    lasting = max(line["step"] for line in within)
    mean = (ended - began) / len(faults)
    restart_s = statistics.mean(restarts) if restarts else math.nan
    return {
        "faults": len(faults),
        "kinds": dict(Counter(fault["kind"] for fault in faults)),
        "minutes": (ended - began) / 60,
        "mtbf_s": mean,
        "attempts": len(job.of("attempt")),
        "causes": dict(Counter(job.causes)),
        "steps": max(losses(job.run_dir)),
        "step_s": step_s,
        "restart_s": restart_s,
        "restarts_by_kind": {
            kind: statistics.median(found)
            for kind in KINDS
            if (found := [fault["restart_s"] for fault in faults if fault["kind"] == kind and "restart_s" in fault])
        },
        "goodput": lasting * step_s / (ended - began),
        "goodput_of_the_model": forecast.goodput(EVERY * step_s, 0.0, restart_s, mean),
        "gates": {
            "the run ends done": job.causes[-1] == "done",
            "its losses are those of the undisturbed run, bit for bit": losses(job.run_dir) == losses(whole.run_dir),
            "and its samples": traces(job.run_dir) == traces(whole.run_dir),
            "enough faults": len(faults) * 30 >= FEWEST * (ended - began) / 60,
        },
    }


def run(directory: Path, minutes: float, mtbf_s: float, seed: int, steps: int) -> dict[str, Any]:
    """The soak and its undisturbed twin. directory: for runs, data and cluster."""
    data_dir, changes = make_data(directory / "data"), [
        f"train.steps={steps}", f"checkpoint.every={EVERY}", "launch.spares=1", "launch.attempts=50",
    ]  # fmt: skip
    for name in ("whole", "soak"):
        (directory / name).mkdir()
    with Cluster(directory / "cluster", nodes=NODES) as cluster:
        whole = SlurmJob(cluster, data_dir, directory / "whole" / "run", *changes, fault="")
        whole.launch()
        whole.wait_for(lambda: attempts.finished(whole.events), "the undisturbed run does not end", 3600)
        job = SlurmJob(cluster, data_dir, directory / "soak" / "run", *changes,
                       fault=f"sleep{STEP_S}@all,progress:training#*").launch()  # fmt: skip
        job.wait_for_step(1)
        began = time.time()
        faults = soak(job, 60 * minutes, mtbf_s, random.Random(seed))
        ended = time.time()
        job.wait_for(lambda: is_over(job), "it does not end", 3600)
        return {"seed": seed, **judged(job, whole, faults, began, ended), "told": faults}


def main() -> int:
    """Returns the exit code: 1 where the run came out otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="with faults (default: 30)")
    parser.add_argument("--mtbf", type=float, default=50, help="mean seconds between two faults (default: 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults' times and kinds")
    parser.add_argument("--steps", type=int, default=3000, help="of the run; more than fit in the time (default: 3000)")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    arguments = parser.parse_args()
    if missing_programs():
        print(f"error: {needed()}", file=sys.stderr)
        return 69
    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        found = run(Path(name), arguments.minutes, arguments.mtbf, arguments.seed, arguments.steps)
    record = {"id": "soak", "command": COMMAND, **found, **provenance()}
    (arguments.out / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    print("| fault | times | first step after it, s |\n|---|---|---|")
    for kind, times in sorted(found["kinds"].items()):
        after = found["restarts_by_kind"].get(kind)
        print(f"| {kind} | {times} | {'' if after is None else f'{after:.0f}'} |")
    print(f"{found['faults']} faults in {found['minutes']:.1f} minutes, one in {found['mtbf_s']:.0f} s; "
          f"{found['attempts']} attempts; {found['restart_s']:.0f} s to the first step after one\n"
          f"goodput {found['goodput']:.2f}; by the model {found['goodput_of_the_model']:.2f}")  # fmt: skip
    for gate, held in found["gates"].items():
        print(f"gate: {gate}: {'held' if held else 'BROKEN'}")
    return 0 if all(found["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
