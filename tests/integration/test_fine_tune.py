"""Fine-tuning from a converted official checkpoint: other classes, another resolution; what cannot be is refused."""

import pytest
import torch

from tests.integration.jobs import train_job
from tests.ranks import run_ranks
from tests.systems import command
from tests.tiny import DEMO, losses, overrides, saved_state, tiny_config
from uvit_dist import convert
from uvit_dist.models.uvit import UViT
from uvit_dist.weights import load_weights

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
OTHER = ["model.img_size=16", "model.num_classes=6", "diffusion.null_label=5"]
"""The system that the released file is of: 8x8 patches, where the digits have 4x4, and five classes."""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file as the official code releases them, converted."""
    directory = tmp_path_factory.mktemp("released")
    config = tiny_config(directory, directory / "run", *OTHER)
    torch.manual_seed(3)
    torch.save(UViT(**config.model.model_dump()).state_dict(), directory / "released.pth")
    arguments = [*overrides(directory, directory / "run"), *OTHER]
    command(convert.main, "from-official", str(directory / "released.pth"), "--config", str(DEMO),
            "--out", str(directory / "released.safetensors"), *arguments)  # fmt: skip
    return directory / "released.safetensors"


def test_other_classes_and_another_resolution(data_dir, tmp_path, released):
    """The first update has rate 0: after it the weights are still those that the run began with."""
    config = tiny_config(data_dir, tmp_path, f"train.init_from={released}", "train.steps=1")
    assert run_ranks(train_job, 2, config) == ["complete"] * 2
    begun, source = saved_state(tmp_path, 1), load_weights(released).tensors
    for name, value in source.items():
        if name not in ("pos_embed", "label_emb.weight"):
            assert torch.equal(begun[f"master/{name}"], value), name
            assert torch.equal(begun[f"ema/{name}"], value), name
    assert torch.equal(begun["master/label_emb.weight"][10], source["label_emb.weight"][5]), "the null label is kept"
    assert not torch.equal(begun["master/label_emb.weight"][:5], source["label_emb.weight"][:5])
    positions, before = begun["master/pos_embed"], source["pos_embed"]
    assert positions.shape == (1, 2 + 16, 32)
    assert torch.equal(positions[:, :2], before[:, :2])
    told = (tmp_path / "logs/rank-00000.log").read_text()
    assert "8x8" in told
    assert "4x4" in told
    assert "starting from the ema weights" in told

    more = tiny_config(data_dir, tmp_path, f"train.init_from={released}", "train.steps=4")
    assert run_ranks(train_job, 2, more) == ["complete"] * 2
    assert list(losses(tmp_path)) == [1, 2, 3, 4]
    log = (tmp_path / "logs/rank-00000.log").read_text()
    assert "resumed from" in log
    assert "released.safetensors is not used: the run has a checkpoint" in log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.depth=4", "in_blocks.1"),
        ("model.embed_dim=64", "embed_dim"),
        ("model.patch_size=4", "patch_embed.proj.weight"),
        ("diffusion.schedule=vpsde", "trained with diffusion.schedule discrete_sd"),
    ],
)
def test_what_cannot_be_is_refused(data_dir, tmp_path, released, change, message):
    config = tiny_config(data_dir, tmp_path, f"train.init_from={released}", change)
    (told,) = set(run_ranks(train_job, 2, config))
    assert told.startswith("DataError 65")
    assert message in told
    assert not (tmp_path / "checkpoints").exists()


def test_a_raw_official_file_is_refused_with_the_remedy(data_dir, tmp_path, released):
    config = tiny_config(data_dir, tmp_path, f"train.init_from={released.with_suffix('.pth')}")
    (told,) = set(run_ranks(train_job, 2, config))
    assert told.startswith("DataError 65")
    assert "python -m uvit_dist.convert from-official" in told
