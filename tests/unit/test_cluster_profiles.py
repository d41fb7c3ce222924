"""Cluster profiles and orders: what is read, what is refused, and what becomes of them for sbatch and srun."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.tiny import ROOT
from uvit_dist import submit
from uvit_dist.config_cluster import ClusterProfile, ContainerConfig, Order, read_order, read_profile, write_order
from uvit_dist.errors import ConfigError, DataError

PROFILES = sorted((ROOT / "slurm").rglob("*.yaml"))


def order(directory, profile=None, **changes):
    profile = profile or ClusterProfile()
    values = {
        "job": "train", "name": "train", "run_dir": f"{directory}/run", "directory": f"{directory}/run/launch/train",
        "config": f"{directory}/config.yaml", "code": f"{directory}/code", "python_path": f"{directory}/code:/more",
        "workdir": str(directory), "python": "/usr/bin/python3", "nodes": 4, "processes_per_node": 8,
        "profile": profile, "signal_lead_s": profile.lead_s(None), **changes,
    }  # fmt: skip
    return Order(**values)


def sbatch_options(text):
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return dict(shlex.split(line)[0].partition("=")[::2] for line in lines)


@pytest.mark.parametrize("path", PROFILES, ids=[path.stem for path in PROFILES])
def test_every_profile_of_the_repository_is_valid_and_makes_a_script(path, tmp_path):
    made = order(tmp_path, read_profile(path))
    subprocess.run(["bash", "-n"], input=submit.script(made), text=True, check=True)
    assert made.srun_options()
    assert made.rank_command()


def test_the_script_says_what_the_order_and_the_profile_say(tmp_path):
    profile = ClusterProfile(
        partition="gpu", account="a", qos="q", constraint="h100", exclude=("n1", "n2"), exclusive=True,
        time_limit_min=90, cpus_per_task=12, memory_gb=0, gpu_type="h100", modules=("cuda/12.8",),
        environment={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NOTE": "it's $HOME"}, setup=("ulimit -l unlimited",),
        sbatch={"gres_flags": "enforce-binding", "no-kill": False, "overcommit": True},
    )  # fmt: skip
    text = submit.script(order(tmp_path, profile))
    options = sbatch_options(text)
    for name, value in {
        "partition": "gpu", "account": "a", "qos": "q", "constraint": "h100", "exclude": "n1,n2", "exclusive": "",
        "time": "90", "cpus-per-task": "12", "mem": "0", "gpus-per-node": "h100:8", "gres-flags": "enforce-binding",
        "overcommit": "", "signal": "B:USR2@120", "requeue": "", "nodes": "4", "ntasks-per-node": "8",
        "chdir": str(tmp_path), "job-name": "run:train", "open-mode": "append",
    }.items():  # fmt: skip
        assert options[name] == value, name
    assert "no-kill" not in options
    assert "wckey" not in options
    for spares, shrinks_to, nodes, no_kill in ((2, (), "6", True), (0, (2, 1), "4", True), (0, (), "4", False)):
        options = sbatch_options(submit.script(order(tmp_path, profile, spares=spares, shrinks_to=shrinks_to)))
        assert (options["nodes"], "no-kill" in options) == (nodes, no_kill)
    lines = text.strip().splitlines()
    assert "module load cuda/12.8 || exit 78" in lines
    assert f"export NOTE={shlex.quote(profile.environment['NOTE'])}" in lines
    assert f"export PYTHONPATH={tmp_path}/code:/more" in lines
    assert lines.index("ulimit -l unlimited") < lines.index(f"export PYTHONPATH={tmp_path}/code:/more")
    assert lines[-1].startswith("exec /usr/bin/python3 ")  # in place of the shell, which a signal would end


def test_the_environment_reaches_a_process_as_it_was_written(tmp_path):
    profile = ClusterProfile(environment={"NOTE": """it's "$HOME" \\ `x`"""})
    lines = submit.setup("/code", profile)
    command = "\n".join([*lines, 'printf %s "$NOTE|$PYTHONPATH|$PYTHONSAFEPATH"'])
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert said == f"{profile.environment['NOTE']}|/code|1"


def test_a_guard_depends_on_its_job_and_leaves_out_more_hosts(tmp_path):
    made = order(tmp_path, ClusterProfile(exclude=("n1",)))
    parameters = submit.parameters(made, after="12_3")["additional_parameters"]
    assert parameters["dependency"] == "afternotok:12_3"
    assert parameters["kill-on-invalid-dep"] == "yes"
    assert "dependency" not in submit.parameters(made)["additional_parameters"]


def test_clusters_without_gpus_are_asked_for_none(tmp_path):
    assert "gpus-per-node" not in sbatch_options(submit.script(order(tmp_path, ClusterProfile(gpus_per_node=0))))


def test_an_array_has_a_folder_of_its_own(tmp_path):
    made = order(tmp_path, job="precompute", name="precompute-0", nodes=1, array_task=0)
    text = submit.script(made, 5)
    assert sbatch_options(text)["array"] == "0-4%5"
    assert "/run/launch/precompute-array/submitit/%A_%a_0_log.out" in text
    assert submit.batch_log(made, "12_3").name == "12_3_0_log.out"
    assert submit.batch_log(made, "12").parent == tmp_path / "run/launch/train/submitit"


def test_ranks_in_containers(tmp_path):
    mounts = f"{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data:/data,/a:/b"
    box = ContainerConfig(kind="pyxis", image="img", mounts=("/data", "/a:/b"), options=("--no-container-mount-home",))
    pyxis = order(tmp_path, ClusterProfile(container=box, cpus_per_task=3, srun=("--cpu-bind=none",)))
    assert pyxis.srun_options() == [
        "--cpus-per-task=3", "--cpu-bind=none", "--container-image=img", f"--container-mounts={mounts}",
        f"--container-workdir={tmp_path}", "--no-container-mount-home",
    ]  # fmt: skip
    assert pyxis.rank_command() == ["python3"]

    box = box.model_copy(update={"kind": "apptainer", "options": ("--cleanenv",)})
    apptainer = order(tmp_path, ClusterProfile(container=box))
    assert apptainer.srun_options() == ["--cpus-per-task=1"]
    command = apptainer.rank_command()
    assert command[:3] == ["apptainer", "exec", "--nv"]
    assert [command[n + 1] for n, word in enumerate(command) if word == "--bind"] == mounts.split(",")
    assert command[-5:] == ["--pwd", str(tmp_path), "--cleanenv", "img", "python3"]
    assert "--nv" not in order(tmp_path, ClusterProfile(container=box, gpus_per_node=0)).rank_command()
    assert order(tmp_path).rank_command() == ["/usr/bin/python3"]


def test_the_lead_follows_the_save_time_and_leaves_time_to_train():
    day = ClusterProfile(time_limit_min=1440)
    assert day.lead_s(None) == 120  # three of the profile's 30 s, and 30 s
    assert day.lead_s(1.0) == 60
    assert day.lead_s(200.0) == 630
    assert ClusterProfile(time_limit_min=1).lead_s(200.0) == 15
    assert ClusterProfile(time_limit_min=60, signal_lead_s=300).lead_s(1.0) == 300


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partitoin: gpu", r"partitoin: no such key; did you mean partition\?"),
        ("time_limit_min: 0", "time_limit_min: 0"),
        ("time_limit_min: 2\nsignal_lead_s: 120", "signal_lead_s 120 must be less than time_limit_min, 120 s"),
        ("sbatch: {signal: USR1, dependency: x}", "sbatch: dependency, signal: the launcher sets this itself"),
        ("environment: {NCCL-DEBUG: INFO}", "environment: names of variables"),
        ("container: {kind: docker, image: x}", "container.kind: 'docker'"),
        ("gpus_per_node: [8", "not valid YAML"),
        ("- a", "holds list, not a mapping"),
    ],
)
def test_mistakes_in_a_profile_are_named(tmp_path, text, told):
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as refused:
        read_profile(path)
    assert str(path) in str(refused.value)


def test_a_profile_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(ConfigError, match=r"launch.cluster .*nothing.yaml: cannot be read"):
        read_profile(tmp_path / "nothing.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_profile(tmp_path / "empty.yaml") == read_profile(None) == ClusterProfile()


def test_every_key_of_a_profile_is_described():
    for section in (ClusterProfile, ContainerConfig):
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_an_order_comes_back_as_it_was_written(tmp_path):
    box = ContainerConfig(kind="pyxis", image="img", mounts=("/data",))
    written = order(tmp_path, ClusterProfile(container=box, environment={"A": "b"}), then=("evaluate",), array_task=3)
    path = write_order(written)
    assert read_order(path) == written
    assert written.world_size == 32
    (tmp_path / "half.json").write_text(Path(path).read_text()[:40])
    with pytest.raises(DataError, match="no order of a job"):
        read_order(tmp_path / "half.json")


def test_a_submission_from_inside_a_job_hands_on_the_users_variables_alone(monkeypatch):
    job = {"SLURM_JOB_ID": "12", "SUBMITIT_FOLDER": "x", "RANK": "0", "PYTHONPATH": "/code", "PYTHONSAFEPATH": "1"}
    user = {"SLURM_CONF": "/etc/other.conf", "SBATCH_ACCOUNT": "mine", "NCCL_DEBUG": "INFO"}
    for name, value in {**job, **user}.items():
        monkeypatch.setenv(name, value)
    with submit._environment_of_a_submission():
        assert {name: os.environ.get(name) for name in user} == user
        assert not set(job) & set(os.environ)
    assert {name: os.environ.get(name) for name in {**job, **user}} == {**job, **user}
