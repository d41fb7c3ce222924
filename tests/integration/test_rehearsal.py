"""The rehearsal cluster: a real SLURM that users start, break and stop, and that leaves nothing behind."""

import os
import subprocess
import sys
import time

import pytest

from slurm.rehearsal import cluster as rehearsal
from slurm.rehearsal.processes import command_of
from tests.tiny import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def call(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "slurm.rehearsal", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def processes_of(directory):
    """All processes on this machine that have to do with the directory."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [command_of(pid) for pid in pids if str(directory) in command_of(pid)]


def test_it_is_started_broken_and_stopped_by_commands(slurm_cluster, tmp_path):
    """Beside another one: slurm_cluster."""
    directory = tmp_path / "cluster"
    where = ["--dir", str(directory)]
    assert "start one" in call("status", *where, code=69)
    assert f"export SLURM_CONF={directory}/slurm.conf" in call("start", *where).splitlines()
    try:
        environment = {**slurm_cluster.environment, "SLURM_CONF": f"{directory}/slurm.conf"}

        def slurm(*arguments):
            done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=400, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout.split()

        assert sorted(slurm("srun", "-N4", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")) == sorted(
            [*slurm_cluster.nodes] * 2
        )
        assert f"export SLURM_CONF={directory}/slurm.conf" in call("start", *where), "it is running already"
        job = call("preempt", *where, "--seconds", "600").split()[1]
        assert f" {job} " in call("status", *where)
        slurm("scancel", job)
        assert "n2 is dead" in call("kill-node", "n2", *where)
        assert len([line for line in processes_of(directory) if line.startswith("slurmd ")]) == 3
        assert "n2 is idle" in call("revive-node", "n2", *where)
        assert "no such node" in call("kill-node", "n7", *where, code=69)
        call("kill-node", *where, code=2)
    finally:
        call("stop", *where)
    assert processes_of(directory) == []
    assert not directory.exists()
    assert slurm_cluster.is_running, "only its own processes are ended"


def test_a_node_loses_power_with_all_that_runs_there(cluster):
    job = cluster.command(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", f"--output={cluster.directory}/out.txt",
        "--wrap=srun sleep 300",
    ).strip()  # fmt: skip
    cluster.wait_state(job, "RUNNING")
    deadline = time.monotonic() + 120
    while len(cluster.processes(containing="sleep 300")) < 3:  # and the batch script
        assert time.monotonic() < deadline
        time.sleep(0.1)
    other = next(node for node in cluster.nodes if cluster.processes(node, "sleep") and node != "n0")
    cluster.kill_node(other)
    assert cluster.processes(other) == []
    assert other not in cluster.living_nodes()
    assert cluster.processes("n0"), "no other node is touched"
    cluster.wait_state(job, "PENDING", limit_s=90)
    cluster.wait_state(job, "RUNNING", limit_s=90)
    assert other not in cluster.job(job)["NodeList"]


def test_the_daemons_die_with_who_started_them(tmp_path):
    """Also with a test run that is killed."""
    script = (
        "import sys, time; from slurm.rehearsal.cluster import Cluster\n"
        "cluster = Cluster(sys.argv[1]); cluster.start(); print('started', flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    with starter:
        assert starter.stdout.readline() == b"started\n"
        daemons = [line for line in processes_of(tmp_path) if line.startswith(("slurmd ", "slurmctld "))]
        assert len(daemons) == 5
        starter.kill()
    deadline = time.monotonic() + 120
    while processes_of(tmp_path):
        assert time.monotonic() < deadline, processes_of(tmp_path)
        time.sleep(0.1)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    assert rehearsal.missing_programs() == list(rehearsal.PROGRAMS)
    assert "apt-get install --no-install-recommends slurm-wlm" in call("start", code=69)


def test_a_path_without_scontrol_has_all_else(cluster):
    path = cluster.path_without("scontrol")
    environment = {**cluster.environment, "PATH": path}
    told = subprocess.run(
        ["sinfo", "--noheader"], env=environment, capture_output=True, text=True, timeout=400, check=True
    )
    assert "idle" in told.stdout
    missing = subprocess.run(["sh", "-c", "command -v scontrol"], env=environment, timeout=400, check=False)
    assert missing.returncode != 0
