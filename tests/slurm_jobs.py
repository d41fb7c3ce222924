"""A training on the rehearsal cluster, launched as a user does, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurm.rehearsal.cluster import Cluster
from tests.status_truth import assert_status_tells
from tests.tiny import DEMO, ROOT, losses, overrides, same_tensors, saved_state, traces
from uvit_dist import attempts

STEPS, EVERY = 24, 6
"""Updates of a run, and between its checkpoints."""
SLOW = "sleep0.3@all,progress:training#*"
"""So that a fault meets a run that still trains."""
LIMIT_S = 400


class SlurmJob:
    """One run. environment: variables of its processes; profile: more keys of the cluster's profile."""

    def __init__(
        self,
        cluster: Cluster,
        data_dir: Path,
        run_dir: Path,
        *changes: str,
        fault: str = SLOW,
        environment: Mapping[str, str] | None = None,
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        self.cluster, self.run_dir, self.job_id = cluster, run_dir, ""
        self.profile = run_dir.with_name(f"{run_dir.name}-cluster.yaml")
        variables = {"DS_ACCELERATOR": "cpu", "UVIT_FAULT": fault, **(environment or {})}
        keys = {"partition": "low", "time_limit_min": 9, "gpus_per_node": 0, **(profile or {})}
        lines = [f"{key}: {json.dumps(value)}" for key, value in keys.items()]
        lines += ["environment:", *(f'  {name}: "{value}"' for name, value in variables.items())]
        self.profile.write_text("\n".join(lines) + "\n")
        self.changes = [
            "launch.target=slurm", "launch.nodes=2", "launch.processes_per_node=1", f"launch.cluster={self.profile}",
            "launch.silence_s=12", "launch.hang_s=60", "launch.start_s=300", f"train.steps={STEPS}",
            f"checkpoint.every={EVERY}", "zero.stage=1",
            *changes,
        ]  # fmt: skip
        self.arguments = ["--config", str(DEMO), *overrides(data_dir, run_dir, *self.changes)]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What attempts.jsonl says."""
        return attempts.read(self.run_dir / "launch" / "train")

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of that kind."""
        return [found for found in self.events if found["event"] == event]

    @property
    def causes(self) -> list[str]:
        """How the attempts ended."""
        return [event["cause"] for event in self.of("ended")]

    def launch(self, expected: int = 0) -> SlurmJob:
        """Submit it with the command that users type."""
        done = subprocess.run(
            [sys.executable, "-m", "uvit_dist.launch", *self.arguments],
            cwd=ROOT, env=self.cluster.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == expected, done.stdout + done.stderr
        if expected == 0:
            self.job_id = [event for event in self.of("submitted") if not event.get("guard_of")][-1]["job_id"]
        return self

    def wait_for(self, condition: Any, what: str, limit_s: float = LIMIT_S) -> None:
        """Wait until it holds, or fail with all that is known."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.told()}"
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Wait until so many updates have been made."""

        def reached() -> bool:
            assert attempts.finished(self.events) is None, self.told()
            return (self.run_dir / "metrics.jsonl").exists() and max(losses(self.run_dir), default=0) >= step

        self.wait_for(reached, f"step {step} is not reached")

    def wait_for_end(self) -> dict[str, Any]:
        """Wait until it has finished. Returns that event."""
        self.wait_for(lambda: attempts.finished(self.events), "it does not finish")
        (end,) = self.of("finished")
        return end

    def told(self) -> str:
        """What is known of it: events and logs."""
        logs = [*self.run_dir.glob("launch/train/submitit/*log*"), *self.run_dir.glob("logs/*.log")]
        texts = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(logs))
        jobs = self.cluster.command("squeue", check=False)
        return "\n".join([*map(str, self.events), jobs, texts])

    def log(self, rank: int) -> str:
        """What a rank has logged."""
        return (self.run_dir / "logs" / f"rank-{rank:05d}.log").read_text(errors="replace")

    def supervisor(self) -> int:
        """The process of the supervisor."""
        (pid,) = self.cluster.processes(containing="submitit.core._submit")
        return pid

    def kill(self, *pids: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to processes of the job."""
        for pid in pids:
            os.kill(pid, number)


def assert_as_if_undisturbed(job: SlurmJob, whole: SlurmJob) -> None:
    """It is done, and equals the undisturbed run: ids, losses and final state, bit for bit."""
    end = job.wait_for_end()
    assert (end["cause"], end["exit_code"]) == ("done", 0), job.told()
    assert traces(job.run_dir) == traces(whole.run_dir)
    assert losses(job.run_dir) == losses(whole.run_dir)
    assert same_tensors(saved_state(job.run_dir, STEPS), saved_state(whole.run_dir, STEPS))
    assert not list((job.run_dir / "checkpoints").glob(".tmp-*")), "nothing is left of dead attempts"
    assert (job.run_dir / "ema.safetensors").exists()
    job.wait_for(lambda: not job.cluster.jobs(), "no job and no guard is left in the queue", 60)
    assert job.cluster.processes(containing="uvit_dist.worker") == []
    assert_status_tells(
        job.run_dir, state="finished", cause="done", causes=job.causes, step=STEPS, checkpoint=STEPS,
        requeues=len(job.of("requeued")),
    )  # fmt: skip
