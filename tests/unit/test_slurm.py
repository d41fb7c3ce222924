"""What is known of SLURM without a cluster."""

import signal
import subprocess
import sys

import pytest

from tests.tiny import ROOT
from uvit_dist import faults, slurm
from uvit_dist.errors import ConfigError, UnavailableError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("n0", ["n0"]),
        ("n[0-2,7],m", ["n0", "n1", "n2", "n7", "m"]),
        ("gpu-[08-11]", ["gpu-08", "gpu-09", "gpu-10", "gpu-11"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1,3]b,c[05]d-x", ["a1b", "a3b", "c05d-x"]),
    ],
)
def test_host_lists_are_written_out(text, hosts):
    assert slurm.expand(text) == hosts


def test_commands_that_are_not_there_or_do_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm, "PAUSE_S", 0.05)
    assert not slurm.available()
    with pytest.raises(UnavailableError, match="SLURM does not answer"):
        slurm.job_state("1", patience_s=0.2)
    assert slurm.end_time("1") is None
    assert not slurm.probe("n0")
    slurm.signal_step("1.0", "KILL")
    with pytest.raises(UnavailableError, match="scontrol"):
        slurm.require_scontrol()


POINT = "from uvit_dist import faults\nfor _ in range(3): faults.point('progress:training')\nprint('alive')"


@pytest.mark.parametrize(
    ("fault", "attempt", "code", "told"),
    [
        ("sigkill@rank1,progress:training#3", "1", -signal.SIGKILL, ""),
        ("sigkill@rank1,progress:training#3/2", "1", 0, "alive"),
        ("sigkill@rank1,progress:training#3/2", "2", -signal.SIGKILL, ""),
        ("sigkill@rank0,progress:training", "1", 0, "alive"),
        ("raise@all,progress:training#2", "1", 1, "RuntimeError: UVIT_FAULT: asked for at progress:training"),
        ("sleep0.01@all,progress:training#*", "1", 0, "alive"),
    ],
)
def test_faults_come_where_they_are_asked_for(fault, attempt, code, told):
    environment = {"UVIT_FAULT": fault, "UVIT_DIST_ATTEMPT": attempt, "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", POINT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert told in done.stdout + done.stderr


def test_a_fault_that_cannot_be_read_is_refused(monkeypatch):
    monkeypatch.setenv("UVIT_FAULT", "explode@rank1,save:voted")
    with pytest.raises(ConfigError, match="not ACTION@rankN,POINT"):
        faults.point("save:voted")
