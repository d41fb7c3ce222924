"""What newcomers get wrong: each real command ends with the value, the rule and the remedy; no traceback.

Data that are damaged or contradict each other in rarer ways are in test_mistakes.py.
"""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.integration.jobs import train_job
from tests.ranks import rank_environment, run_ranks
from tests.tiny import DEMO, ROOT, overrides, tiny_config
from tests.unit.test_help import COMMANDS
from uvit_dist.config_yaml import dump_config
from uvit_dist.export_weights import export_weights

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
AUTOENCODER = ROOT / "data_tools" / "digits_autoencoder.safetensors"
NO_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN")


def told(*command, code, **environment):
    """What a command that fails with this code says on stderr. A variable that is None is unset."""
    given = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, cwd=ROOT, timeout=400, env=given
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr


def launch(data_dir, run_dir, *more, code, config=DEMO, options=("--local", "1"), **environment):
    arguments = ["--config", config, *options, *overrides(data_dir, run_dir, *more)]
    return told("uvit_dist.launch", *arguments, code=code, **environment)


def test_a_wrong_path_of_the_configuration(tmp_path):
    message = told("uvit_dist.launch", "--config", "configs/digit_demo.yaml", code=78)
    assert "--config configs/digit_demo.yaml: cannot be read" in message
    assert "No such file or directory" in message
    assert "give the path of a YAML file" in message


def test_a_misspelt_key(tmp_path):
    message = launch(tmp_path, tmp_path / "run", "train.step=5", "trian.steps=5", code=78)
    assert "train.step: no such key; did you mean train.steps?" in message
    assert "trian: no such key; did you mean train?" in message


def test_a_batch_and_a_number_of_ranks_that_do_not_divide(tmp_path):
    message = launch(tmp_path, tmp_path / "run", "train.global_batch_size=25", code=78, options=("--local", "5"))
    assert "train.global_batch_size 25 must be divisible by data.lanes 12" in message
    assert "5 ranks must divide data.lanes 12; valid numbers of ranks: [1, 2, 3, 4, 6, 12]" in message


def test_no_slurm_on_this_machine(tmp_path):
    empty = tmp_path / "no commands"
    empty.mkdir()
    message = launch(tmp_path, tmp_path / "run", "launch.target=slurm", code=78, options=(), PATH=str(empty))
    assert "launch.target slurm: sbatch is not on this machine" in message
    assert "login node" in message
    assert "--local N" in message


def test_a_wrong_path_of_the_index(tmp_path):
    message = launch(tmp_path / "no_data", tmp_path / "run", code=66)
    assert f"data.index {tmp_path}/no_data/index.json: no such file; make the shards first" in message


def test_no_s3_credentials(tmp_path):
    unset = dict.fromkeys(NO_CREDENTIALS)
    message = launch(
        tmp_path, tmp_path / "run", "data.index=s3://bucket/index.json", "storage.endpoint=http://127.0.0.1:9", code=66,
        AWS_EC2_METADATA_DISABLED="true", AWS_CONFIG_FILE="/dev/null", AWS_SHARED_CREDENTIALS_FILE="/dev/null", **unset,
    )  # fmt: skip
    assert "s3://bucket" in message
    assert "no AWS credentials" in message
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile, or storage.anonymous true" in message


def test_another_autoencoder_than_that_of_the_shards(data_dir, tmp_path):
    other = tmp_path / "other.safetensors"
    with safe_open(AUTOENCODER, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "encoder.conv_in.bias": tensors["encoder.conv_in.bias"] + 0.01}, other, metadata)
    message = launch(data_dir, tmp_path / "run", f"autoencoder.encoder={other}", code=65)
    assert "autoencoder.encoder (hash): the configuration says " in message
    assert "Correct the configuration, or make the shards again" in message


def test_a_port_in_use(data_dir, tmp_path):
    """Ranks started by torchrun, or by hand."""
    config = tmp_path / "resolved.yaml"
    config.write_text(dump_config(tiny_config(data_dir, tmp_path / "run", "launch.processes_per_node=1")))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ["--config", config, "--job", "train"]
        message = told("uvit_dist.worker", *arguments, code=69, **rank_environment(0, 1, port))
    assert f"rank 0 cannot listen on MASTER_PORT {port}: another process does" in message
    assert "--master-port" in message


def test_variables_of_ranks_that_are_half_set(data_dir, tmp_path):
    config = tmp_path / "resolved.yaml"
    config.write_text(dump_config(tiny_config(data_dir, tmp_path / "run", "launch.processes_per_node=1")))
    message = told("uvit_dist.worker", "--config", config, "--job", "train", code=78, WORLD_SIZE="2", RANK="0")
    assert "RANK, WORLD_SIZE set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not; set all or none" in message


def other_versions(directory, **versions):
    """A folder in which packages of other versions seem to be installed."""
    for name, version in versions.items():
        folder = directory / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(directory)


def test_an_old_torch_is_told_where_a_job_fails_because_of_it(data_dir, tmp_path):
    """Its torchvision does not fit it either, and fails as it does then."""
    path = other_versions(tmp_path / "site", torch="2.1.0", torchvision="0.29.2+cpu")
    (tmp_path / "site" / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    message = launch(
        data_dir, tmp_path / "run", code=78, PYTHONPATH=path, options=("--local", "1", "--job", "evaluate")
    )
    assert "operator torchvision::nms does not exist" in message
    assert "torch 2.1.0; needed: >=2.11: pip install 'torch>=2.11'" in message


@pytest.mark.parametrize(("torch", "torchvision", "command"), [
    ("2.15.0", "0.30.0+cpu", ["uvit_dist.sample", "--checkpoint", "none", "--grid", "a.png"]),
    ("2.15.0+cpu", "0.30.0", ["data_tools.fid_reference", "--config", "configs/uvit_s_cifar10.yaml"]),
    ("2.15.0", "0.30.0+cpu", ["data_tools.precompute_text", "--config", "configs/uvit_s_mscoco.yaml"]),
])  # fmt: skip
def test_torch_and_torchvision_of_different_builds(tmp_path, torch, torchvision, command):
    """One for CUDA, the other for the CPU alone: both versions are in their ranges, and the operators do not load."""
    path = other_versions(tmp_path, torch=torch, torchvision=torchvision)
    fails = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(fails)
    message = told(*command, code=78, PYTHONPATH=path)
    assert f"torch {torch} and torchvision {torchvision} do not fit each other" in message
    assert "operator torchvision::nms does not exist" in message
    assert "pip install --force-reinstall 'torch==2.15.0' torchvision" in message
    assert "https://pytorch.org/get-started/locally" in message


def test_an_old_torch_is_told_where_a_command_cannot_even_be_imported(tmp_path):
    path = other_versions(tmp_path, torch="1.13.1")
    (tmp_path / "torch.py").write_text("Tensor = object\n")
    message = told("uvit_dist.sample", "--checkpoint", "none", "--grid", "a.png", code=78, PYTHONPATH=path)
    assert re.search(r"\(\w+Error: .*, at /.*\.py:\d+\)", message), "for a fault that has another cause"
    assert "torch 1.13.1; needed: >=2.11: pip install 'torch>=2.11'" in message


def test_no_command_needs_the_environment_to_say_that_it_is_not_active():
    """An interpreter without this program's packages: how to get them, whatever was typed."""
    modules = [name for name, _ in COMMANDS if name != "slurm.rehearsal"]  # which needs no package
    assert {"uvit_dist.launch", "uvit_dist.status", "uvit_dist.doctor", "data_tools.precompute_latents"} <= {*modules}
    started = {
        module: subprocess.Popen(
            [sys.executable, "-S", "-m", module], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for module in modules
    }
    for module, process in started.items():
        out, message = process.communicate(timeout=400)
        assert process.returncode == 78, f"{module}: {out}{message}"
        assert message.startswith(f"error: {sys.executable} is not the environment of uvit_dist: it has no module ")
        assert "make env, then . .venv/bin/activate; or, in an environment of your own: pip install ." in message
        assert len(message.splitlines()) == 1


def test_an_import_that_fails_in_our_own_code_keeps_its_traceback(tmp_path):
    copy = shutil.copytree(ROOT / "uvit_dist", tmp_path / "uvit_dist")
    (copy / "run_state.py").write_text("from uvit_dist import of_no_such_name\n")
    done = subprocess.run(
        [sys.executable, "-m", "uvit_dist.status"], capture_output=True, text=True, cwd=tmp_path, timeout=400
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "of_no_such_name" in done.stderr.splitlines()[-1]


def test_a_run_directory_that_cannot_be_written(data_dir, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    message = launch(data_dir, tmp_path / "file" / "run", code=73)
    assert f"{tmp_path}/file/run: cannot be written (Not a directory); choose another directory" in message


def test_weights_of_another_shape(data_dir, tmp_path):
    one = "launch.processes_per_node=1"
    assert run_ranks(train_job, 1, tiny_config(data_dir, tmp_path / "wide", "model.embed_dim=64", one, "train.steps=1"))
    export_weights(tmp_path / "wide", tmp_path / "wide.safetensors", "ema")
    message = launch(data_dir, tmp_path / "run", f"train.init_from={tmp_path}/wide.safetensors", code=65)
    assert "this network cannot start from these weights" in message
    assert "pos_embed: (1, 18, 64) there, (1, 18, 32) in this network" in message
    assert "set the model section as it was there" in message


def test_a_job_without_a_reference(data_dir, tmp_path):
    one = "launch.processes_per_node=1"
    assert run_ranks(train_job, 1, tiny_config(data_dir, tmp_path / "run", one, "train.steps=1"))
    more = ("evaluate.reference=nowhere.npz", "evaluate.samples=20")
    message = launch(data_dir, tmp_path / "run", *more, code=66, options=("--local", "1", "--job", "evaluate"))
    assert "evaluate.reference nowhere.npz: no such file" in message
    assert "make it: python -m data_tools.fid_reference" in message
