"""The doctor as a user runs it: where all is well, where everything is wrong, and against an S3 server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.s3_fixtures import credentials, s3_server, upload  # noqa: F401 - fixtures
from tests.integration.test_newcomers import NO_CREDENTIALS, other_versions
from tests.ranks import run_ranks
from tests.tiny import DEMO, ROOT, overrides
from uvit_dist.doctor import probes

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def doctor(*arguments, **environment):
    given = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-m", "uvit_dist.doctor", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=given)
    assert done.stderr == ""
    return done


def findings(done):
    return {(one["section"], one["subject"]): one for one in json.loads(done.stdout)}


def probes_of(pid):
    """The process ids of a doctor's probes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def libraries_of(pid):
    """Whether a process has begun to load torch: it is past its start."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_all_is_well(data_dir, tmp_path):
    done = doctor("--config", DEMO, "--json", *overrides(data_dir, tmp_path / "run"))
    found = findings(done)
    problems = [one for one in found.values() if one["level"] == "problem"]
    assert (done.returncode, problems) == (0, [])
    assert "120 samples in 4 shards" in found["data", "data.index"]["told"]
    assert "sha256 " in found["weights", "autoencoder.encoder"]["told"]
    assert "sha256 " in found["references", "evaluate.reference"]["told"]
    assert "torch " in found["packages", "versions"]["told"]
    assert "DeepSpeed ops" in {subject for _, subject in found}
    assert {section for section, _ in found} >= {
        "packages",
        "GPUs",
        "machine",
        "SLURM",
        "data",
        "weights",
        "references",
    }
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_without_a_configuration():
    done = doctor()
    assert done.returncode == 0, done.stdout
    assert "C compiler" in done.stdout
    assert "data.index" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_all_is_wrong_and_all_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = doctor(
            "--config", DEMO, "--json", *overrides(tmp_path / "no_data", tmp_path / "file" / "run"),
            "evaluate.features=inception", "evaluate.scores=[fid]", "autoencoder.decoder=gone.safetensors",
            PYTHONPATH=other_versions(tmp_path / "site", torch="2.1.0"), MASTER_PORT=port, WORLD_SIZE="2", CC="no-cc",
            NCCL_SOCKET_IFNAME="ib7",
        )  # fmt: skip
    found = findings(done)
    assert done.returncode == 78
    codes = {
        ("packages", "torch"): 78,
        ("packages", "torchvision"): 78,
        ("machine", "run_dir"): 73,
        ("machine", "MASTER_PORT"): 69,
        ("machine", "NCCL_SOCKET_IFNAME"): 78,
        ("machine", "ranks"): 78,
        ("data", "data.index"): 66,
        ("weights", "autoencoder.decoder"): 66,
        ("weights", "evaluate.inception"): 78,
        ("references", "evaluate.reference"): 66,
    }
    assert {key: one["code"] for key, one in found.items() if one["level"] == "problem"} == codes
    assert found["machine", "C compiler"]["level"] == "warning"
    assert [one for one in found.values() if one["level"] != "ok" and not one["remedy"]] == []
    assert f"python -m data_tools.fid_reference --config {DEMO}" in found["references", "evaluate.reference"]["remedy"]


def test_a_mistake_in_the_configuration_does_not_hide_the_rest():
    done = doctor("--config", DEMO, "train.step=5")
    assert done.returncode == 78
    assert "did you mean train.steps?" in done.stdout
    assert "C compiler" in done.stdout


def test_a_cluster_job_without_slurm(data_dir, tmp_path):
    more = ("launch.target=slurm", "launch.processes_per_node=1")
    done = doctor("--config", DEMO, "--problems", *overrides(data_dir, tmp_path / "run", *more), PATH=str(tmp_path))
    assert done.returncode == 78
    assert "sbatch, scontrol, srun: not on this machine" in done.stdout
    assert "login node" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_doctor_that_is_ended_leaves_no_probe_behind(number):
    started = subprocess.Popen(
        [sys.executable, "-m", "uvit_dist.doctor"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who is started in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not (probe := probes_of(started.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    (pid,) = probe
    while not libraries_of(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(number)
    _, told = started.communicate(timeout=400)
    assert "Traceback" not in told
    assert started.returncode == (75 if number == signal.SIGINT else -signal.SIGKILL)
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.s3
def test_a_server_its_credentials_and_its_speed(s3_server, credentials, data_dir, tmp_path):  # noqa: F811
    url = upload(s3_server, data_dir, "doctor")
    arguments = ["--config", DEMO, "--json", *overrides(data_dir, tmp_path / "run", f"data.index={url}/index.json"),
                 f"storage.endpoint={s3_server.endpoint}"]  # fmt: skip
    done = doctor(*arguments)
    found = findings(done)
    assert done.returncode == 0, done.stdout
    assert f"from env, for {s3_server.endpoint}" in found["S3", "credentials"]["told"]
    assert s3_server.secret_key not in done.stdout
    assert "MB/s" in done.stdout
    none = dict.fromkeys(NO_CREDENTIALS)
    done = doctor(*arguments, **none, AWS_EC2_METADATA_DISABLED="true", AWS_SHARED_CREDENTIALS_FILE="/dev/null",
                  AWS_CONFIG_FILE="/dev/null")  # fmt: skip
    assert done.returncode == 66
    assert findings(done)["S3", "credentials"]["remedy"].startswith("set AWS_ACCESS_KEY_ID")


def ring_on_rank():
    said = []
    probes.ring(said.append)
    return [finding.told for finding in said if not isinstance(finding, dict)]


def test_an_all_reduce_between_the_ranks_of_this_machine():
    """By gloo, where the real one has NCCL."""
    first, second = run_ranks(ring_on_rank, 2)
    assert first[0].startswith("right on 2 rank(s), ")
    assert second == []


@pytest.mark.slurm
def test_a_real_cluster_and_a_partition_that_it_does_not_have(cluster, data_dir, tmp_path):
    profile = tmp_path / "profile.yaml"
    more = ("launch.target=slurm", "launch.processes_per_node=1", f"launch.cluster={profile}")
    arguments = ["--config", DEMO, "--json", *overrides(data_dir, tmp_path / "run", *more)]
    profile.write_text("partition: low\ngpus_per_node: 0\n")
    done = doctor(*arguments, **cluster.environment)
    found = findings(done)
    assert done.returncode == 0, done.stdout
    assert found["SLURM", "commands"]["told"].startswith("slurm")
    assert found["SLURM", "partition"]["told"] == "low exists"
    profile.write_text("partition: gpus\naccount: physics\ngpus_per_node: 0\n")
    done = doctor(*arguments, **cluster.environment)
    found = findings(done)
    assert done.returncode == 78
    assert "partition gpus: there is none; there are: " in found["SLURM", "partition"]["told"]
    assert found["SLURM", "account"]["level"] == "warning", "there is no accounting to ask"
