"""What a user can get wrong, or a disk can: a message to act on, the right exit code, no traceback, nothing lost.

The commands are run as a user types them. Wrong keys, types and batches are in tests/unit/test_config.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import DEMO, ROOT, overrides, saved_state, tiny_config
from uvit_dist.checkpoint import newest_whole
from uvit_dist.data.shards import read_index
from uvit_dist.models.autoencoder import load_autoencoder
from uvit_dist.preflight import make_plan

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def launch(*arguments):
    command = [sys.executable, "-m", "uvit_dist.launch", "--config", str(DEMO), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def data(data_dir, tmp_path):
    """A copy of the shards to damage."""
    return shutil.copytree(data_dir, tmp_path / "data")


def test_a_missing_index(data, tmp_path):
    done = launch(*overrides(data, tmp_path / "run", "data.index=nowhere/index.json", "launch.processes_per_node=1"))
    assert done.returncode == 66
    assert "error: data.index nowhere/index.json: no such file; make the shards first" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unwritable_run_directory(data, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    done = launch(*overrides(data, tmp_path / "file" / "run"))
    assert done.returncode == 73
    assert f"{tmp_path}/file/run: cannot be written (Not a directory); choose another directory" in done.stderr
    assert "Traceback" not in done.stderr


def damage_sample(config, sample):
    """Flip one bit of a sample's moments."""
    index = read_index(config.data.index)
    shard = int(np.searchsorted(index.starts, sample, side="right")) - 1
    row = index.rows(shard)[sample - index.starts[shard]]
    path = Path(index.shard_path(shard))
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) + 11] ^= 2
    path.write_bytes(content)
    return path


def test_a_damaged_sample_is_told_once_by_the_rank_that_reads_it_and_the_checkpoint_stays(data, tmp_path):
    """The damage shows in the middle of a run, to rank 1 alone."""
    run_dir = tmp_path / "run"
    config = tiny_config(data, run_dir, "train.steps=5", "data.prefetch_blocks=0")
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    saved = files(run_dir / "checkpoints")
    plan = make_plan(config, read_index(config.data.index))
    shard = damage_sample(config, int(plan.sample_ids(9, rank=1, world_size=2)[-1]))
    done = launch(*overrides(data, run_dir, "train.steps=15", "checkpoint.every=100", "data.prefetch_blocks=0"))
    assert done.returncode == 65, done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    assert "1 of 4 shards are damaged, more than data.quarantine_limit 0.01 allows (0):" in done.stderr
    assert f"{shard.name}: the sample at byte " in done.stderr
    assert "differs from its hash in the index\nMake or copy these again (python -m data_tools.verify_" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(run_dir / "checkpoints") == saved


def test_a_truncated_shard(data, tmp_path):
    shard = data / "latents-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-20_000])
    done = launch(*overrides(data, tmp_path / "run", "launch.processes_per_node=1"))
    assert done.returncode == 65
    assert "error: 1 file(s) of 4 shards are not as" in done.stderr
    assert f"{shard}: {shard.stat().st_size} bytes, the index says" in done.stderr
    assert "truncated or replaced" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_index_of_another_autoencoder(data, tmp_path):
    index = json.loads((data / "index.json").read_text())
    fingerprint = index["provenance"]["encoder_fingerprint"]
    assert fingerprint == load_autoencoder(ROOT / "data_tools/digits_autoencoder.safetensors").encoder_fingerprint
    index["provenance"] |= {"encoder_fingerprint": "0" * 64, "scale_factor": 0.18215}
    (data / "index.json").write_text(json.dumps(index))
    done = launch(*overrides(data, tmp_path / "run", "launch.processes_per_node=1"))
    assert done.returncode == 65
    assert f"autoencoder.encoder (hash): the configuration says {fingerprint}, the shards {'0' * 64}" in done.stderr
    assert "autoencoder.scale_factor: the configuration says 1.0, the shards 0.18215" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def refused(config):
    """What every rank says; all ranks say the same."""
    told = run_ranks(train_job, 2, config)
    assert told[0] == told[1]
    assert not (ROOT / config.run_dir / "checkpoints").exists()
    return told[0]


def test_shards_of_another_shape_and_number_of_classes_are_refused(data, tmp_path):
    config = tiny_config(data, tmp_path / "run", "model.img_size=16", "model.num_classes=12", "diffusion.null_label=11")
    told = refused(config)
    assert "the configuration says (8, 16, 16), the shards (8, 8, 8)" in told
    assert "classes (model.num_classes without the null label): the configuration says 11, the shards 10" in told


def test_a_run_is_not_resumed_as_another(data, tmp_path):
    run_dir = tmp_path / "run"
    assert run_ranks(train_job, 1, one(data, run_dir, "train.steps=5")) == ["complete"]
    saved = files(run_dir / "checkpoints")
    (told,) = run_ranks(train_job, 1, one(data, run_dir, "seed=77", "model.depth=4"))
    assert told.startswith("DataError 65")
    assert "seed: the checkpoint says 1234, this run 77" in told
    assert "'depth': 2" in told
    assert "'depth': 4" in told
    (told,) = run_ranks(train_job, 1, one(data, run_dir, "diffusion.label_dropout=0.5"))
    assert "'label_dropout': 0.1" in told
    assert "seed: 1234" in (run_dir / "config.yaml").read_text(), "the record of the run is not that of the refused"
    assert files(run_dir / "checkpoints") == saved

    for file in (run_dir / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    (told,) = run_ranks(train_job, 1, one(data, run_dir))
    assert told.startswith("CheckpointError 65")
    assert "1 checkpoint(s), none of them whole" in told


def one(data, run_dir, *more):
    return tiny_config(data, run_dir, "launch.processes_per_node=1", *more)


def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(data, tmp_path):
    told = run_ranks(train_job, 2, tiny_config(data, tmp_path / "run", "optimizer.lr=1e30", "checkpoint.every=2"))
    assert told[0] == told[1]
    assert told[0].startswith("NumericalError 70: step ")
    assert "the update was not made" in told[0]
    last = newest_whole(str(tmp_path / "run"))
    state = saved_state(tmp_path / "run", int(last.name.split("-")[1]))
    assert all(torch.isfinite(value).all() for value in state.values())
