"""The validation loss: a fixed question to the network, the same on any ranks, that changes nothing in training."""

import numpy as np
import pytest
import torch

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.tiny import losses, records, same_tensors, saved_state, tiny_config, traces
from uvit_dist.data.plan import held_out_ids
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import read_index
from uvit_dist.loss import Objective
from uvit_dist.models.uvit import UViT

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
SAMPLES = 23
"""In batches of 6, four: not a multiple of three ranks, and the last one is short."""


def settings(data_dir, ranks, stage):
    return [f"validation.index={data_dir}/index.json", f"validation.samples={SAMPLES}", "validation.batch_size=6",
            "validation.every=5", f"zero.stage={stage}", f"launch.processes_per_node={ranks}",
            "train.micro_batch_size=4", "ema.decay=0.9", "train.timestep_bins=4"]  # fmt: skip


def told(run_dir):
    return {step: r for step, r in records(run_dir, "metrics.jsonl").items() if "validation_loss" in r}


@pytest.fixture(scope="module")
def one_rank(data_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one")
    config = tiny_config(data_dir, run_dir, *settings(data_dir, 1, 0))
    assert run_ranks(train_job, 1, config) == ["complete"]
    return run_dir


def test_it_is_the_loss_of_the_ema_on_those_samples_at_those_times(data_dir, one_rank):
    """Asked again of a plain network with the weights of the checkpoint, sample by sample."""
    config = tiny_config(data_dir, one_rank, *settings(data_dir, 1, 0))
    index = read_index(f"{data_dir}/index.json")
    ids = held_out_ids(120, SAMPLES, config.seed)
    assert len(set(ids.tolist())) == SAMPLES
    objective = Objective(config)
    batch = SampleReader(index, config.seed).read_ids(ids)
    example = objective.example(batch, held_out=True)
    state = saved_state(one_rank, 10)
    for kind, key in (("ema", "validation_loss"), ("master", "validation_loss_weights")):
        net = UViT(**config.model.model_dump()).eval()
        net.load_state_dict({k.removeprefix(f"{kind}/"): v for k, v in state.items() if k.startswith(f"{kind}/")})
        with torch.inference_mode():
            each = objective.losses(net, example)
        assert told(one_rank)[10][key] == pytest.approx(each.double().mean().item(), rel=1e-6)
        if kind == "ema":
            place = ((example.time - 1) * 4 // 1000).numpy()
            bins = [each.double().numpy()[place == n].mean() for n in range(4)]
            assert told(one_rank)[10]["validation_loss_by_timestep"] == pytest.approx(bins, rel=1e-6)
    log = (one_rank / "logs/rank-00000.log").read_text()
    assert f"validation on {SAMPLES} of the 120 samples" in log
    assert "holds the images of data.index: its loss is that of training samples" in log
    record = told(one_rank)[10]
    assert record["validation_loss"] != record["validation_loss_weights"]


@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (3, 3)])
def test_ranks_and_stages_change_neither_it_nor_the_training(data_dir, tmp_path, one_rank, ranks, stage):
    config = tiny_config(data_dir, tmp_path / "with", *settings(data_dir, ranks, stage))
    assert run_ranks(train_job, ranks, config) == ["complete"] * ranks
    ours, theirs = told(tmp_path / "with"), told(one_rank)
    assert list(ours) == list(theirs) == [5, 10]
    for key in ("validation_loss", "validation_loss_weights", "validation_loss_by_timestep"):
        assert np.allclose([ours[s][key] for s in ours], [theirs[s][key] for s in theirs], rtol=1e-5), key
    everywhere = [records(run, "metrics.jsonl") for run in (tmp_path / "with", one_rank)]
    for step in range(1, 11):
        by_time = [run[step]["loss_by_timestep"] for run in everywhere]
        assert by_time[0] == pytest.approx(by_time[1], rel=1e-5), "the loss by timestep is that of all ranks"

    without = tiny_config(data_dir, tmp_path / "without", *settings(data_dir, ranks, stage), "validation=null")
    assert run_ranks(train_job, ranks, without) == ["complete"] * ranks
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert traces(tmp_path / "with") == traces(tmp_path / "without")
    assert same_tensors(saved_state(tmp_path / "with", 10), saved_state(tmp_path / "without", 10))
    assert told(tmp_path / "without") == {}
