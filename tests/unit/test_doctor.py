"""The doctor's judgements, from facts that are given. As a user runs it: tests/integration/test_doctor.py."""

import os
import signal
import socket
import stat
import time

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.tiny import DEMO
from uvit_dist.config_cluster import ClusterProfile
from uvit_dist.config_yaml import load_config
from uvit_dist.doctor import cluster, inputs, machine, packages, probes
from uvit_dist.doctor.children import Child, limited
from uvit_dist.doctor.finding import exit_code, of_error, ok, problem, warning
from uvit_dist.doctor.packages import Wanted
from uvit_dist.errors import MissingInputError, UnavailableError
from uvit_dist.forecast import STATE_BYTES, parameters

ASK = Wanted(SpecifierSet(">=3.11"), (Requirement("torch>=2.11"), Requirement("open_clip_torch>=3.3")))
SOUND = {"torch": "2.15.0+cu128", "open-clip-torch": "3.3.0"}


def levels(findings):
    return [finding.level for finding in findings]


def test_what_must_be_mended_first_gives_the_exit_code():
    late, first = problem("a", "b", "", "", 69), problem("a", "b", "", "", 78)
    assert exit_code([ok("a", "b", ""), warning("a", "b", "", "")]) == 0
    assert exit_code([late, ok("a", "b", "")]) == 69
    assert exit_code([late, first]) == exit_code([first, late]) == 78
    assert exit_code([problem("a", "b", "", "", 74), late]) == 69


@pytest.mark.parametrize(
    ("message", "told", "remedy"),
    [
        ("data.index a/b.json: no such file; make it", "a/b.json: no such file", "make it"),
        ("s3://b: refused (status 403; see; x); correct it; or not", "s3://b: refused (status 403; see; x)",
         "correct it; or not"),
        ("two; mistakes\n  one\n  two", "two; mistakes\n  one\n  two", ""),
        ("no remedy", "no remedy", ""),
    ],
)  # fmt: skip
def test_a_mistake_told_elsewhere_is_parted_into_fault_and_remedy(message, told, remedy):
    found = of_error("data", "data.index", MissingInputError(message))
    assert (found.told, found.remedy, found.code) == (told, remedy, 66)


# -- packages --------------------------------------------------------------------------------------------------------


def test_packages_in_their_ranges():
    assert levels(packages.judge_versions(ASK, "3.12.1", SOUND)) == ["ok"]


@pytest.mark.parametrize(
    ("changed", "told", "remedy"),
    [
        ({"torch": "2.1.0"}, "2.1.0; needed: >=2.11", "pip install 'torch>=2.11'"),
        ({"torch": None}, "not installed; needed: torch>=2.11", "pip install 'torch>=2.11'"),
        ({"open-clip-torch": "3.2"}, "3.2; needed: >=3.3", "pip install 'open_clip_torch>=3.3'"),
        ({"torch": "unknown"}, "unknown; needed: >=2.11", "pip install 'torch>=2.11'"),
    ],
)
def test_an_old_or_missing_package_is_named_with_the_command_that_mends_it(changed, told, remedy):
    have = {name: version for name, version in {**SOUND, **changed}.items() if version is not None}
    (found,) = packages.judge_versions(ASK, "3.12.1", have)
    assert (found.level, found.told, found.code) == ("problem", told, 78)
    assert found.remedy.startswith(remedy)


def test_a_development_version_above_the_range_passes():
    assert levels(packages.judge_versions(ASK, "3.12.1", SOUND | {"torch": "2.16.0.dev20261101+cu130"})) == ["ok"]


def test_an_old_python():
    (found,) = packages.judge_versions(ASK, "3.10.4", SOUND)
    assert "3.10.4" in found.told
    assert found.remedy == "make env PYTHON=python3.11"


@pytest.mark.parametrize(
    ("torch", "vision", "needs", "level"),
    [
        ("2.15.0", "0.29.2", "==2.15.0", "ok"),
        ("2.15.0+cu128", "0.29.2+cu128", "==2.15.0", "ok"),
        ("2.15.0+cu128", "0.29.2", "", "ok"),  # of PyPI: it does not say
        ("2.15.0a0+50eac811a6.nv26.09", "0.29.0a0+98f8b375", "", "ok"),  # of a vendor's container
        ("2.15.0+cu128", "0.29.2+cpu", "==2.15.0", "problem"),
        ("2.15.0", "0.29.2+cpu", "==2.15.0", "warning"),
        ("2.15.0+cpu", "0.29.2", "==2.15.0", "warning"),
        ("2.14.0", "0.29.2", "==2.15.0", "problem"),
    ],
)
def test_torch_and_torchvision_must_be_built_for_each_other(torch, vision, needs, level):
    (found,) = packages.judge_builds(torch, vision, SpecifierSet(needs))
    assert found.level == level
    assert torch in found.told
    assert vision in found.told
    if level != "ok":
        assert f"'torch=={torch.split('+')[0]}' torchvision" in found.remedy


def test_a_torch_for_the_cpu_beside_a_gpu():
    (found,) = packages.judge_torch_for_gpus(None, ["NVIDIA H100"])
    assert "1 GPU(s) here (NVIDIA H100), but this torch was built for the CPU alone" in found.told
    assert "both built for CUDA" in found.remedy
    assert packages.judge_torch_for_gpus("12.8", ["NVIDIA H100"]) == packages.judge_torch_for_gpus(None, []) == []


def test_what_is_wanted_is_read_from_pyproject_and_holds_here():
    ask = packages.wanted()
    assert {"torch", "torchvision", "deepspeed", "rich", "jinja2"} <= {need.name for need in ask.packages}
    assert levels(packages.check()) == ["ok", "ok"]


def test_the_version_that_an_import_would_find_counts(tmp_path, monkeypatch):
    folder = tmp_path / "torch-2.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packages.installed()["torch"] == "2.1.0"


# -- machine ---------------------------------------------------------------------------------------------------------


def demo(tmp_path, *more):
    return load_config(DEMO, [f"run_dir={tmp_path}/run", *more])


def test_room_for_the_checkpoints_that_are_kept(tmp_path):
    config = demo(
        tmp_path, "train.steps=2000", "checkpoint.every=250", "checkpoint.keep=3", "checkpoint.keep_every=500"
    )
    each = parameters(config.model) * STATE_BYTES
    (none,), (few,), (enough,) = (machine.judge_room(config, n * each) for n in (1.9, 7.9, 8.1))  # 3 + 4 + one
    assert (none.level, none.code, few.level, enough.level) == ("problem", 73, "warning", "ok")
    assert "run_dir=PATH" in none.remedy


def test_a_run_directory_is_tried_and_nothing_is_left(tmp_path):
    assert levels(machine.check_run_dir(demo(tmp_path))) == ["ok"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").write_text("a file")
    (found,) = machine.check_run_dir(demo(tmp_path, f"run_dir={tmp_path}/run/below"))
    assert (found.level, found.code) == ("problem", 73)
    assert f"{tmp_path}/run/below: cannot be written (Not a directory)" in found.told


def test_more_ranks_than_gpus(tmp_path):
    (found,) = machine.judge_ranks(demo(tmp_path, "launch.processes_per_node=4"), 2)
    assert (found.level, found.code) == ("problem", 78)
    assert "--local 2" in found.remedy
    assert machine.judge_ranks(demo(tmp_path), 0) == machine.judge_ranks(demo(tmp_path), 2) == []


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (found,) = machine.check_port(port)
    assert (found.level, found.code, found.told) == ("problem", 69, f"port {port}: another process listens on it")
    assert "--master-port" in found.remedy
    assert levels(machine.check_port(port)) == ["ok"]
    assert levels(machine.check_port("http")) == levels(machine.check_port("70000")) == ["problem"]


@pytest.mark.parametrize(
    ("value", "certain", "expected"),
    [
        ("eth0", True, ["ok"]),
        ("eth", True, ["ok"]),
        ("=eth0,ib0", True, ["ok"]),
        ("ib0", True, ["problem"]),
        ("ib0", False, ["warning"]),
        ("^docker", True, []),
        ("", True, []),
    ],
)
def test_network_interfaces_that_are_named_must_be_there(value, certain, expected):
    variables = {"NCCL_SOCKET_IFNAME": value}
    found = machine.judge_interfaces(variables, ["lo", "eth0"], "environment", certain)
    assert levels(found) == expected
    assert all("lo, eth0" in one.told for one in found)


def test_little_shared_memory_and_few_open_files():
    assert levels(machine.judge_shared_memory(64e6)) == ["warning"]
    assert levels(machine.judge_shared_memory(8e9)) == ["ok"]
    (found,) = machine.judge_open_files(256, 4096)
    assert (found.level, found.remedy) == ("warning", "ulimit -n 4096")
    assert levels(machine.judge_open_files(1024, 4096)) == levels(machine.judge_open_files(-1, -1)) == ["ok"]


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    (found,) = machine.check_compiler()
    assert found.level == "warning"
    assert "no-such-compiler" in found.told


# -- SLURM -----------------------------------------------------------------------------------------------------------


def commands(directory, **scripts):
    """A folder of commands that say and do what is given."""
    directory.mkdir()
    for name, script in scripts.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(stat.S_IRWXU)
    return f"{directory}{os.pathsep}/usr/bin{os.pathsep}/bin"


def test_without_slurm_a_cluster_job_is_a_problem_and_a_local_one_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm = demo(tmp_path, "launch.target=slurm")
    (found,) = cluster.check(slurm, ClusterProfile())
    assert (found.level, found.code) == ("problem", 78)
    assert "login node" in found.remedy
    assert levels(cluster.check(demo(tmp_path), None)) == levels(cluster.check(None, None)) == ["ok"]


def test_a_partition_and_an_account_that_do_not_exist(tmp_path, monkeypatch):
    tells = "echo slurm 24.11.5"
    found_here = {"sbatch": tells, "scontrol": tells, "srun": tells, "sinfo": "echo cpu; echo gpu",
                  "sacctmgr": "echo physics"}  # fmt: skip
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", **found_here))
    config = demo(tmp_path, "launch.target=slurm")
    found = cluster.check(config, ClusterProfile(partition="gpu", account="physics"))
    assert levels(found) == ["ok", "ok", "ok"]
    assert "slurm 24.11.5" in found[0].told
    found = cluster.check(config, ClusterProfile(partition="gpus", account="chemistry"))
    assert levels(found) == ["ok", "problem", "problem"]
    assert "partition gpus: there is none; there are: cpu, gpu" in found[1].told
    monkeypatch.setenv("PATH", commands(tmp_path / "without", **{**found_here, "sacctmgr": "exit 1"}))
    assert levels(cluster.check(config, ClusterProfile(account="physics"))) == ["ok", "warning"]


def test_spares_that_the_partition_does_not_have(tmp_path, monkeypatch):
    tells = "echo slurm 24.11.5"
    nodes = "echo 'n0 idle'; echo 'n1 alloc'; echo 'n2 down*'; echo 'n3 mix'"
    monkeypatch.setenv("PATH", commands(tmp_path / "bin", sbatch=tells, scontrol=tells, srun=tells, sinfo=nodes))
    config = demo(tmp_path, "launch.target=slurm", "launch.nodes=2", "launch.processes_per_node=1", "launch.spares=1")
    assert levels(cluster.check(config, ClusterProfile())) == ["ok", "ok"]
    told = cluster.check(config, ClusterProfile(exclude=("n3",)))[1]
    assert (told.level, told.told) == ("warning", "2 can be used; training asks for 2 and 1 spare(s)")
    assert "lower launch.spares" in told.remedy


# -- devices, weights, children --------------------------------------------------------------------------------------


def test_gpus():
    told = probes.judge_gpu(0, "NVIDIA H100", (9, 0), 80_000_000_000, 79_000_000_000)
    assert (told.level, told.told) == ("ok", "NVIDIA H100, 80 GB, 79 GB free, capability 9.0, bf16")
    assert probes.judge_gpu(0, "Tesla V100", (7, 0), 1, 1).level == "warning"
    assert probes.judge_gpu(0, "NVIDIA H100", (9, 0), 80, 8).remedy.startswith("other processes")
    assert levels(probes.judge_no_gpus([], False)) == ["ok"]
    assert levels(probes.judge_no_gpus(["NVIDIA H100"], True)) == ["problem"]
    assert probes.judge_no_gpus(["NVIDIA H100"], False) == []


def test_weights_are_hashed_and_missing_ones_are_named_with_their_source(tmp_path):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"some weights")
    found = inputs.check_weights("autoencoder.encoder", str(weights), None, "autoencoder")
    assert (found.level, found.section) == ("ok", "weights")
    assert "sha256 a0c76a31f14d6cbe" in found.told
    found = inputs.check_weights("autoencoder.encoder", str(weights), "0" * 64, "autoencoder")
    assert (found.level, found.code) == ("problem", 65)
    found = inputs.check_weights("evaluate.inception", f"{tmp_path}/none.pth", None, "inception")
    assert found.code == 66
    assert found.told == f"{tmp_path}/none.pth: no such file or folder"
    assert "about 91 MB" in found.remedy
    assert "pytorch-fid" in found.remedy
    found = inputs.check_weights("evaluate.inception", "https://example.org/a.pth", "0" * 64, "inception")
    assert found.level == "warning"
    assert "not fetched yet" in found.told


def test_a_file_that_cannot_be_read_hides_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    file = tmp_path / "reference.npz"
    file.write_bytes(b"x")
    monkeypatch.setattr(inputs, "described", refuse)
    for found in (
        inputs.check_reference("evaluate.reference", str(file)),
        inputs.check_weights("autoencoder.encoder", str(file), None, "autoencoder"),
    ):
        assert (found.level, found.code, found.told) == ("problem", 66, f"{file}: Permission denied")
        assert "mend its permissions" in found.remedy


def test_a_server_of_references_that_does_not_answer_is_told(monkeypatch):
    def silent(key, path):
        raise UnavailableError(f"{path}: nothing came; see to the network")

    monkeypatch.setattr(inputs.reference, "require_there", silent)
    found = inputs.check_reference("evaluate.reference", "s3://bucket/reference.npz")
    assert (found.level, found.code, found.remedy) == ("problem", 69, "see to the network")


def test_the_originals_are_needed_until_the_shards_are_there(tmp_path):
    config = demo(tmp_path, "data.format=folder", f"data.source={tmp_path}/images", f"data.index={tmp_path}/index.json")
    keys = {key: check for key, check in inputs.named(config) if key.startswith("data.")}
    assert [*keys] == ["data.source"]
    gone = keys["data.source"]()
    assert (gone.level, gone.code) == ("problem", 66)
    assert gone.told == f"{tmp_path}/images: not there"
    (tmp_path / "index.json").write_text("{}")
    unneeded = keys["data.source"]()
    assert unneeded.level == "warning"
    assert "it is not needed" in unneeded.remedy
    (tmp_path / "images").mkdir()
    assert "nothing in it" in keys["data.source"]().told
    for name in "abcde":
        (tmp_path / "images" / f"{name}.png").touch()
    assert keys["data.source"]().level == "ok"


@pytest.fixture
def child_that(tmp_path):
    """A child whose probe is replaced by a script, before anything else is imported."""

    def start(script):
        (tmp_path / "sitecustomize.py").write_text(script)
        return Child("GPUs", ["devices"], environment={"PYTHONPATH": str(tmp_path)})

    return start


BEGINS = "import json, os, signal, sys, time\nprint(json.dumps({'begins': 'NCCL'}), flush=True)\n"
FOUND = BEGINS + f"print(json.dumps({ok('GPUs', 'GPU 0', 'there').__dict__!r}), flush=True)\n"


@pytest.mark.slow
def test_a_probe_that_hangs_is_ended_and_named_and_what_it_found_is_kept(child_that):
    child = child_that(FOUND + "time.sleep(3600)")
    kept, late = child.wait(3.0)
    assert child._process.poll() == -signal.SIGKILL
    assert kept == ok("GPUs", "GPU 0", "there")
    assert (late.subject, late.told, late.code) == ("NCCL", "no answer within 3 s", 69)


def test_a_limit_counts_from_the_start_of_a_probe_so_that_those_of_many_gpus_do_not_add_up(child_that):
    early = child_that(BEGINS + "time.sleep(2); os._exit(0)")
    early._began -= 100  # another one was waited for meanwhile
    (late,) = early.wait(30.0)
    assert late.told == "no answer within 30 s"


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("sys.stderr.write('driver is gone'); sys.stderr.flush(); os._exit(3)", "(exit code 3): driver is gone"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "(SIGSEGV): no message"),
    ],
)
def test_a_probe_that_dies_is_told_with_its_last_words(child_that, end, told):
    kept, died = child_that(FOUND + end).wait(30.0)
    assert kept.level == "ok"
    assert (died.level, died.subject) == ("problem", "NCCL")
    assert told in died.told


def test_a_check_of_this_process_that_hangs_is_a_warning():
    (found,) = limited("machine", "disk", lambda: time.sleep(5) or [], 0.1)
    assert (found.level, found.told) == ("warning", "no answer within 0.1 s")
    assert limited("machine", "disk", lambda: [ok("machine", "disk", "fine")], 5.0) == [ok("machine", "disk", "fine")]
