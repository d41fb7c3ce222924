"""Pretrained networks must fit the system, and what is made of one must not meet what is made of another."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data_tools import pack_images, precompute_latents
from tests.systems import command, make_cifar10
from tests.tiny import DEMO, ROOT, tiny_config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.latents import Provenance, check_same_text_encoder
from uvit_dist.data.shards import read_index
from uvit_dist.errors import ConfigError, DataError, MissingInputError, OutputError
from uvit_dist.evaluation.point import directory_of
from uvit_dist.preflight import check_provenance
from uvit_dist.pretrained import load_decoder, load_extractor
from uvit_dist.weights import Weights, check_same_noise, check_trained_as

CPU = torch.device("cpu")


def autoencoder(path, channels, levels):
    """A narrow autoencoder of so many latent channels and of factor 2^(levels - 1)."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[4] * levels, norm_num_groups=2, layers_per_block=1, latent_channels=channels,
        mid_block_add_attention=False,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_other_channels_and_factors_work_by_configuration_alone(tmp_path):
    """16 channels and a factor of 32, from images to a decoded latent."""
    path = autoencoder(tmp_path / "vae", channels=16, levels=6)
    config = tiny_config(
        tmp_path, tmp_path / "run", f"autoencoder.encoder={path}", f"autoencoder.decoder={path}", "model.in_chans=16",
        "model.img_size=2", "model.patch_size=1", "data.image_size=64", "data.format=folder", "data.crop=adm",
        f"data.source={tmp_path}/images", f"data.index={tmp_path}/shards/index.json", "model.num_classes=3",
        "diffusion.null_label=2",
    )  # fmt: skip
    for label in range(2):
        (tmp_path / f"images/{label}").mkdir(parents=True)
        Image.fromarray(np.full((70, 80, 3), 50 * label, np.uint8)).save(tmp_path / f"images/{label}/a.png")
    (record,) = precompute_latents.precompute(config, CPU)
    made = json.loads((tmp_path / "shards/index.json").read_text())["provenance"]
    assert made["shape"] == [32, 2, 2]
    assert record.samples == 2
    decoder = load_decoder(config)
    assert decoder.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("channels", "levels"), [(16, 3), (4, 4)])
def test_a_decoder_of_other_latents_is_refused(tmp_path, channels, levels):
    path = autoencoder(tmp_path / "vae", channels, levels)
    config = tiny_config(tmp_path, tmp_path / "run", f"autoencoder.decoder={path}")
    with pytest.raises(ConfigError, match=rf"latents of {channels} channels, .* model\.in_chans is 4 and .* 32"):
        load_decoder(config)


def test_shards_that_would_not_fit_the_network_are_not_made(tmp_path):
    for change, told in (
        ("model.img_size=16", r"the configuration says \(8, 16, 16\), the shards \(8, 8, 8\)"),
        ("model.num_classes=12", r"the configuration says 12, the shards 10"),
    ):
        more = ["diffusion.null_label=null", "sample.cfg_scale=0", "diffusion.label_dropout=0"]
        config = tiny_config(tmp_path / "shards", tmp_path / "run", change, *(more if "num" in change else []))
        with pytest.raises(ConfigError, match=told):
            precompute_latents.precompute(config, CPU)
    assert not (tmp_path / "shards").exists()


def test_two_indexes_cannot_share_a_directory(tmp_path):
    """Their shards would have the same names."""
    common = ["--config", str(DEMO), "data.space=pixels", "autoencoder=null", "model.in_chans=3", "model.img_size=32"]
    command(pack_images.main, *common, f"data.index={tmp_path}/train.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as left:
        command(pack_images.main, *common, f"data.index={tmp_path}/val.json", "seed=5")
    assert left.value.code == OutputError.exit_code
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    command(pack_images.main, *common, f"data.index={tmp_path}/train.json")


def test_shards_of_one_part_are_not_replaced_by_those_of_another(tmp_path):
    """Who forgets data.index for the held-out part must not lose the training part, nor train on the other."""
    make_cifar10(tmp_path / "cifar10")
    common = ["--config", str(ROOT / "configs/uvit_s_cifar10.yaml"), f"data.source={tmp_path}/cifar10",
              f"data.index={tmp_path}/shards/index.json"]  # fmt: skip
    command(pack_images.main, *common)
    before = (tmp_path / "shards/index.json").read_bytes()
    with pytest.raises(SystemExit) as left:
        command(pack_images.main, *common, "data.split=test")
    assert left.value.code == OutputError.exit_code
    assert (tmp_path / "shards/index.json").read_bytes() == before
    config = load_config(common[1], [*common[2:], "data.split=test"])
    with pytest.raises(DataError, match=r"data\.split: the configuration says test, the shards train"):
        check_provenance(config, read_index(config.data.index))


def test_contexts_of_two_encoders_do_not_meet():
    check_same_text_encoder({"data.index": "a" * 64, "training": None, "features": "unknown"})
    check_same_text_encoder({"data.index": "a" * 64, "validation.index": "a" * 64})
    with pytest.raises(DataError, match=r"data\.index: aaaaaaaaaaaaaaaa…\n  evaluate\.captions: bbbbbbbbbbbbbbbb…"):
        check_same_text_encoder({"data.index": "a" * 64, "evaluate.captions": "b" * 64})


def test_missing_inception_weights_are_named_with_their_key(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run", "evaluate.features=inception")
    with pytest.raises(ConfigError, match=r"evaluate\.inception: missing; .*pt_inception-2015-12-05-6726825d\.pth"):
        load_extractor(config.evaluate, CPU)
    config = tiny_config(tmp_path, tmp_path / "run", "evaluate.features=inception", "evaluate.inception=none.pth")
    with pytest.raises(MissingInputError, match=r"evaluate\.inception none\.pth: no such file .*mseitzer/pytorch-fid"):
        load_extractor(config.evaluate, CPU)


def weights_of(config):
    tree = config.model_dump(mode="json")
    return Weights({}, tree, tree["model"], 5, "ema", "there", "f")


def test_weights_are_used_as_they_were_trained(tmp_path):
    config = tiny_config(tmp_path, tmp_path / "run")
    weights = weights_of(config)
    check_trained_as(weights, tiny_config(tmp_path, tmp_path / "run", "model.use_checkpoint=true"))
    for change, told in (
        ("model.depth=4", "model.depth: trained with 2, the configuration says 4"),
        ("diffusion.schedule=vpsde", "diffusion.schedule: trained with discrete_sd, the configuration says vpsde"),
        ("autoencoder.scale_factor=0.5", r"autoencoder\.scale_factor: trained with 1\.0, the configuration says 0\.5"),
    ):
        with pytest.raises(DataError, match=told):
            check_trained_as(weights, tiny_config(tmp_path, tmp_path / "run", change))


def test_fine_tuning_keeps_the_meaning_of_time(tmp_path, caplog):
    weights = weights_of(tiny_config(tmp_path, tmp_path / "run"))
    with pytest.raises(DataError, match=r"trained with diffusion\.schedule discrete_sd, .* set diffusion\.schedule"):
        check_same_noise(weights, tiny_config(tmp_path, tmp_path / "run", "diffusion.schedule=vpsde"))
    check_same_noise(weights, tiny_config(tmp_path, tmp_path / "run", "autoencoder.scale_factor=0.5"))
    assert "trained with autoencoder.scale_factor 1.0, this run has 0.5" in caplog.text


def test_an_evaluation_is_redone_for_what_changes_an_image_and_for_nothing_else(tmp_path):
    def directory(*changes, identity=("weights", "decoder", "features", "")):
        return directory_of(tiny_config(tmp_path, tmp_path / "run", *changes), 5, identity)

    same = ["evaluate.reference=other.npz", "evaluate.neighbours=7", "model.use_checkpoint=true",
            "autoencoder.encoder=other.pth", "diffusion.label_dropout=0.2", "evaluate.checkpoint=there",
            "evaluate.samples=64", "evaluate.small_samples=20", "evaluate.save_samples=true",
            "evaluate.lease_s=3"]  # fmt: skip
    assert {directory(change) for change in same} == {directory()}
    other = ["sample.steps=5", "sample.cfg_scale=0.1", "sample.solver=dpm_solver", "evaluate.seed=1",
             "evaluate.sub_batch_size=4", "evaluate.features=pixels_8x8", "sample.precision=bf16_autocast",
             "autoencoder.scale_factor=2.0"]  # fmt: skip
    found = {directory(change) for change in other} | {
        directory(identity=("weights", "decoder", "other features", "")),
        directory(identity=("weights", "other decoder", "features", "")),
    }
    assert len(found) == len(other) + 2
    assert directory() not in found


def test_provenance_that_is_none_is_no_traceback():
    with pytest.raises(DataError, match="version None of the shard format"):
        Provenance.from_dict(None, "index.json")  # type: ignore[arg-type]
