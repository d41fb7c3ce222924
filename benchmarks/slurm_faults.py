"""Seconds that a run loses to each kind of fault, on the rehearsal cluster.

    make bench-slurm

Each fault meets a run of its own, two ranks on two nodes with ZeRO-1, that trains at some steps a second and saves
every so many. Of each: seconds from the fault until it was noticed (the attempt's end), until the first step after it,
and until the first step that had not been made before, which is what is lost; and the steps that were made twice. A
step takes about nothing, so that the seconds are those of noticing, requeueing, starting and resuming; on a cluster
of your own add its time to import and to resume, and the steps since the last save. SLURM's own limits are those of
the rehearsal cluster: a silent node is called DOWN after 15 s (default 300), a requeued job held for 5 s (default 120).
The gate: every run ends done, with the losses of the undisturbed one, bit for bit, or within 1e-5 where fewer ranks go
on. Exit code 1 where it fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.rounds import result
from slurm.rehearsal.cluster import Cluster, missing_programs, needed
from tests.slurm_jobs import EVERY, SLOW, STEPS, SlurmJob
from tests.tiny import losses, tiny_config
from uvit_dist import attempts

AT_STEP = 8
COMMAND = "make bench-slurm"
Fault = Callable[[SlurmJob], None]


def kill_rank(job: SlurmJob) -> None:
    """kill -9 of one rank."""
    job.kill(job.cluster.rank_process(1))


def stop_rank(job: SlurmJob) -> None:
    """SIGSTOP of one rank: it is found by its silence (launch.silence_s 12)."""
    job.kill(job.cluster.rank_process(1), number=signal.SIGSTOP)


def lose_node(job: SlurmJob) -> None:
    """A node without the batch process dies."""
    job.cluster.kill_node(job.of("attempt")[-1]["hosts"][1])


def lose_batch_node(job: SlurmJob) -> None:
    """The node with the batch process dies: SLURM notices, after SlurmdTimeout, and requeues."""
    job.cluster.kill_node(job.of("attempt")[-1]["hosts"][0])


def preempt(job: SlurmJob) -> None:
    """A job of the higher partition takes all nodes for two seconds."""
    job.cluster.preempt(seconds=2)


def signal_job(job: SlurmJob) -> None:
    """scancel --signal=USR2: save and requeue."""
    job.cluster.command("scancel", "--signal=USR2", "--batch", job.job_id)


def kill_supervisor(job: SlurmJob) -> None:
    """kill -9 of the supervisor: the guard goes on."""
    job.kill(job.supervisor())


FAULTS: dict[str, Fault] = {
    "rank killed": kill_rank,
    "rank stopped (SIGSTOP)": stop_rank,
    "node lost": lose_node,
    "node of the batch process lost": lose_batch_node,
    "preemption": preempt,
    "scancel --signal=USR2": signal_job,
    "supervisor killed": kill_supervisor,
    "node lost, with a spare": lose_node,
    "node lost, fewer go on": lose_node,
    "node of the batch process lost, with a spare": lose_batch_node,
}
SHRUNK = ("node lost, fewer go on",)
OPTIONS = {
    "node lost, with a spare": ["launch.spares=1"],
    "node lost, fewer go on": ["launch.min_nodes=1"],
    "node of the batch process lost, with a spare": ["launch.spares=1"],
}


def meet(fault: Fault, job: SlurmJob) -> dict[str, float]:
    """Train until AT_STEP, do the fault, see the run to its end. Returns seconds and steps, as the docstring says."""
    job.launch()
    job.wait_for_step(AT_STEP)
    reached, began = max(losses(job.run_dir)), time.time()
    fault(job)
    end = job.wait_for_end()
    assert end["cause"] == "done", job.told()
    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    second = job.of("attempt")[1]
    before = [line["step"] for line in lines if line["time"] < second["time"]]
    after = [line for line in lines if line["time"] >= second["time"]]
    new = [line for line in after if line["step"] > max(before, default=reached)]
    return {
        "noticed_s": job.of("ended")[0]["time"] - began,
        "first_step_s": after[0]["time"] - began,
        "lost_s": (new or after)[0]["time"] - began,
        "steps_redone": max(before, default=0) - (second["from_step"] or 0),
    }


def measure(directory: Path, rounds: int, chosen: list[str]) -> dict[str, Any]:
    """The record. directory: for the runs and the cluster."""
    data_dir, found = make_data(directory / "data"), dict[str, list[dict[str, float]]]()
    equal = True
    (directory / "whole").mkdir()
    with Cluster(directory / "cluster") as cluster:
        whole = SlurmJob(cluster, data_dir, directory / "whole" / "run", fault="").launch()
        assert whole.wait_for_end()["cause"] == "done", whole.told()
        for number in range(rounds):
            for place, name in enumerate(chosen):
                folder = directory / f"{number}-{place}"
                folder.mkdir()
                job = SlurmJob(cluster, data_dir, folder / "run", *OPTIONS.get(name, []))
                found.setdefault(name, []).append(meet(FAULTS[name], job))
                ours, theirs = losses(job.run_dir), losses(whole.run_dir)
                most = 1e-5 if name in SHRUNK else 0.0
                equal = equal and ours.keys() == theirs.keys()
                equal = equal and all(abs(ours[step] - theirs[step]) <= most * theirs[step] for step in ours)
                print(f"{name:32} {found[name][-1]}", flush=True)
                for node in cluster.nodes:
                    if node not in cluster.living_nodes():
                        cluster.revive_node(node)
                job.wait_for(lambda: not cluster.jobs(), "jobs are left", 60)
        restarts = attempts.read(whole.run_dir / "launch" / "train")
    start = {event["event"]: event["time"] for event in restarts}
    against = {name: [one["lost_s"] for one in several] for name, several in found.items()}
    gates = {"every run ends with the losses of the undisturbed one, bit for bit; of fewer ranks within 1e-5": equal}
    setting = {"ranks": 2, "nodes": 2, "steps": STEPS, "checkpoint_every": EVERY, "slowed": SLOW, "silence_s": 12,
               "SlurmdTimeout_s": 15, "hold_s": 5, "fault_after_step": AT_STEP,
               "undisturbed_start_s": round(start["running"] - start["attempt"], 2)}  # fmt: skip
    return result("slurm_faults", {}, against, gates, {"unit": "seconds; steps", **found}, setting, COMMAND)


def make_data(directory: Path) -> Path:
    """The digits' shards of the tests' tiny system, on this machine."""
    import torch

    from data_tools.precompute_latents import precompute

    precompute(tiny_config(directory, directory, "precompute.batch_size=64"), torch.device("cpu"))
    return directory


def show(record: dict[str, Any]) -> None:
    """Print the table of the docs: medians of the rounds."""
    print("| fault | noticed, s | first step after, s | lost, s | steps made twice |\n|---|---|---|---|---|")
    for name in FAULTS:
        if several := record["rounds"].get(name):
            keys = ("noticed_s", "first_step_s", "lost_s", "steps_redone")
            medians = [statistics.median(one[key] for one in several) for key in keys]
            print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in medians[:3]) + f" | {medians[3]:g} |")
    for gate, held in record["gates"].items():
        print(f"gate: {gate}: {'held' if held else 'BROKEN'}")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each fault (default: 3)")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="these faults alone")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    arguments = parser.parse_args()
    if missing_programs():
        print(f"error: {needed()}")
        return 69
    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        record = measure(Path(name), arguments.rounds, arguments.only)
    show(record)
    (arguments.out / "slurm_faults.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
