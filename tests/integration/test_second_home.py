"""Checkpoints copied to a real S3 server through faults, and brought back by a machine that never saw the run."""

import time

import numpy as np
import pytest
import torch

from tests.fault_proxy import ALL_KINDS
from tests.integration.s3_fixtures import BUCKET, credentials, proxy, s3_server  # noqa: F401 - fixtures
from uvit_dist import checkpoint, second_home, storage
from uvit_dist.config import StorageConfig
from uvit_dist.copier import Copier
from uvit_dist.errors import CheckpointError, UnavailableError
from uvit_dist.export_weights import export_weights
from uvit_dist.safetensors_stream import write_flat

pytestmark = [
    pytest.mark.s3,
    pytest.mark.slow,
    # connections that the proxy has broken are left to the garbage collector, in its thread and in s3fs's
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FAST = {"retry_s": 20.0, "stall_s": 0.7, "region": "us-east-1"}
RANKS, NUMEL = 3, 9 << 20  # 36 MiB of each rank: uploaded in three parts, read by five requests


@pytest.fixture
def through_proxy(proxy, credentials):  # noqa: F811
    storage.configure(StorageConfig(endpoint=proxy.endpoint, **FAST))
    return proxy


def make(run_dir, step, numel=NUMEL):
    """A committed checkpoint of several ranks."""
    directory = checkpoint.checkpoints_dir(run_dir) / f"step-{step:08d}"
    directory.mkdir(parents=True)
    numbers, files = np.random.default_rng(step), []
    for rank in range(RANKS):
        name = f"rank-{rank:05d}.safetensors"
        values = torch.from_numpy(numbers.standard_normal(numel, dtype=np.float32))
        size, xxh3 = write_flat(directory / name, [(f"ema/w/{numel * rank}", numel)], values)
        files.append({"name": name, "size": size, "xxh3": xxh3})
    manifest = {
        "version": checkpoint.VERSION,
        "step": step,
        "shapes": {"w": [RANKS, numel]},
        "config": {"model": {}},
        "files": files,
    }
    (directory / "manifest.json").write_bytes(checkpoint.sealed(manifest))
    return directory


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_through_faults_of_every_kind_the_bytes_are_the_same_elsewhere(through_proxy, tmp_path):
    through_proxy.rate = 0.05
    home = f"s3://{BUCKET}/home/faults"
    copier = Copier(home, lambda names: names[:2])
    for step in (5, 10, 15):
        copier.submit(make(tmp_path / "a", step))
        while copier.last_error is None and f"step-{step:08d}" not in second_home.names_at(home):
            time.sleep(0.05)
    assert copier.close()
    assert copier.last_error is None
    assert second_home.names_at(home) == ["step-00000015", "step-00000010"]
    runs = 0
    while runs < 3 or len(through_proxy.counts) < len(ALL_KINDS) - 2:
        runs += 1
        assert runs < 30, through_proxy.counts
        brought = second_home.bring_back(home, tmp_path / f"b{runs}")
        assert content(brought) == content(tmp_path / "a/checkpoints/step-00000015")
        storage.remove_tree(tmp_path / f"b{runs}")


def test_a_byte_changed_on_the_way_back_is_no_damage_but_one_changed_there_is(
    through_proxy, s3_server, tmp_path, caplog  # noqa: F811
):  # fmt: skip
    home = f"s3://{BUCKET}/home/flips"
    through_proxy.kinds, through_proxy.rate = ("flip",), 0.05
    directories = {step: make(tmp_path / "a", step) for step in (5, 10)}
    for directory in directories.values():
        second_home.copy_out(directory, home)
    runs = 0
    while runs == 0 or through_proxy.counts["flip"] < 3:
        runs += 1
        brought = second_home.bring_back(home, tmp_path / f"b{runs}")
        assert content(brought) == content(directories[10])
        storage.remove_tree(tmp_path / f"b{runs}")
    through_proxy.rate = 0.0
    name = "rank-00001.safetensors"
    data = bytearray((directories[10] / name).read_bytes())
    data[NUMEL] ^= 1
    s3_server.client().pipe_file(f"{BUCKET}/home/flips/step-00000010/{name}", bytes(data))
    with pytest.raises(CheckpointError, match=rf"step-00000010: {name} differs from its hash .*; use the one before"):
        second_home.fetch(home, "step-00000010", tmp_path / "b")
    assert content(second_home.bring_back(home, tmp_path / "b")) == content(directories[5])
    second_home.retain(home, {"step-00000005"})
    assert second_home.names_at(home) == ["step-00000005"]


def test_a_server_that_is_away_is_told_and_changes_nothing(through_proxy, tmp_path):
    home = f"s3://{BUCKET}/home/away"
    first, second = make(tmp_path / "a", 5, 1000), make(tmp_path / "a", 10, 1000)
    second_home.copy_out(first, home)
    storage.configure(StorageConfig(endpoint=through_proxy.endpoint, **{**FAST, "retry_s": 1.0}))
    through_proxy.down = True
    copier = Copier(home)
    copier.submit(second)
    assert copier.close()
    assert isinstance(copier.last_error, UnavailableError)
    with pytest.raises(UnavailableError):
        second_home.bring_back(home, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    through_proxy.down = False
    assert second_home.bring_back(home, tmp_path / "b").name == "step-00000005"


def test_weights_are_exported_to_the_server(through_proxy, tmp_path):
    directory = make(tmp_path / "a", 5, 1000)
    url = f"s3://{BUCKET}/exports/ema.safetensors"
    assert export_weights(tmp_path / "a", url, "ema") == 5
    export_weights(tmp_path / "a", tmp_path / "ema.safetensors", "ema")
    assert storage.read_bytes(url) == (tmp_path / "ema.safetensors").read_bytes()
    assert directory.exists()
