"""The published systems: every configuration builds exactly what golden/presets.json records of the official code."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.golden_values import GOLDEN
from tests.tiny import ROOT
from uvit_dist.config_yaml import load_config
from uvit_dist.models.uvit import UViT

PRESETS = json.loads((GOLDEN / "presets.json").read_text())
SYSTEMS = {
    "uvit_s_cifar10": "cifar10_uvit_small",
    "uvit_s_celeba64": "celeba64_uvit_small",
    "uvit_m_imagenet64": "imagenet64_uvit_mid",
    "uvit_l_imagenet64": "imagenet64_uvit_large",
    "uvit_l_imagenet256": "imagenet256_uvit_large",
    "uvit_h_imagenet256": "imagenet256_uvit_huge",
    "uvit_l_imagenet512": "imagenet512_uvit_large",
    "uvit_h_imagenet512": "imagenet512_uvit_huge",
    "uvit_s_mscoco": "mscoco_uvit_small",
    "uvit_s_deep_mscoco": "mscoco_uvit_small_deep",
}
FID = {
    "uvit_s_cifar10": 3.11, "uvit_s_celeba64": 2.87, "uvit_m_imagenet64": 5.85, "uvit_l_imagenet64": 4.26,
    "uvit_l_imagenet256": 3.40, "uvit_h_imagenet256": 2.29, "uvit_l_imagenet512": 4.67, "uvit_h_imagenet512": 4.05,
    "uvit_s_mscoco": 5.95, "uvit_s_deep_mscoco": 5.48,
}  # fmt: skip
STATISTICS = {
    "uvit_s_cifar10": "cifar10_train_pytorch", "uvit_s_celeba64": "celeba64_train_50000_ddim",
    "uvit_m_imagenet64": "imagenet64_guided_diffusion", "uvit_l_imagenet64": "imagenet64_guided_diffusion",
    "uvit_l_imagenet256": "imagenet256_guided_diffusion", "uvit_h_imagenet256": "imagenet256_guided_diffusion",
    "uvit_l_imagenet512": "imagenet512_guided_diffusion", "uvit_h_imagenet512": "imagenet512_guided_diffusion",
    "uvit_s_mscoco": "mscoco256_val", "uvit_s_deep_mscoco": "mscoco256_val",
}  # fmt: skip
each = pytest.mark.parametrize("name", SYSTEMS)


def load(name):
    return load_config(ROOT / "configs" / f"{name}.yaml")


def test_all_ten_are_here():
    assert set(SYSTEMS.values()) == set(PRESETS)
    assert {path.stem for path in (ROOT / "configs").glob("uvit_*.yaml")} == set(SYSTEMS)


@each
def test_the_network_is_the_published_one(name):
    """golden/presets.json: every key of the state dict in its order, every shape, the number of parameters."""
    with torch.device("meta"):
        net = UViT(**load(name).model.model_dump())
    preset = PRESETS[SYSTEMS[name]]
    shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert shapes == preset["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == preset["params"]


@each
def test_every_hyper_parameter_is_the_published_one(name):
    """golden/presets.json: all that the official configuration sets, and what its code leaves at a default."""
    ours, official = load(name), PRESETS[SYSTEMS[name]]["config"]
    nnet, sample, dataset = official["nnet"], official["sample"], official["dataset"]
    model = ours.model.model_dump()
    assert {key: model[key] for key in nnet if key != "name"} == {k: v for k, v in nnet.items() if k != "name"}
    assert ours.model.use_checkpoint == nnet.get("use_checkpoint", False)

    optimizer = official["optimizer"]
    assert optimizer["name"] == "adamw"
    assert ours.optimizer.lr == optimizer["lr"]
    assert list(ours.optimizer.betas) == optimizer["betas"]
    assert ours.optimizer.weight_decay == optimizer["weight_decay"]
    assert ours.optimizer.eps == 1e-8
    assert ours.optimizer.clip_grad_norm is None
    assert ours.optimizer.warmup_steps == official["lr_scheduler"]["warmup_steps"]
    assert (ours.ema.decay, ours.ema.warmup) == (0.9999, False)
    assert ours.seed == official["seed"]
    assert ours.train.steps == official["train"]["n_steps"]
    assert ours.train.global_batch_size == official["train"]["batch_size"]
    assert ours.train.precision == "bf16_autocast"

    pixels = "z_shape" not in official
    assert (ours.data.space == "pixels") == pixels == (ours.autoencoder is None)
    if not pixels:
        settings = official["autoencoder"]
        assert [ours.model.in_chans, ours.model.img_size, ours.model.img_size] == official["z_shape"]
        assert ours.autoencoder.decoder == settings["pretrained_path"]
        assert ours.autoencoder.encoder == "assets/stable-diffusion/autoencoder_kl.pth"
        assert ours.autoencoder.scale_factor == settings.get("scale_factor", 0.18215)
    text = nnet["name"] == "uvit_t2i"
    assert ours.data.mirror == (not text)
    assert ours.data.image_size == dataset.get("resolution", {"cifar10": 32, "celeba": 64}.get(dataset["name"], 0)) or (
        f"{ours.data.image_size}_features" in dataset["name"]
    )

    form = {"cifar10": ("cifar10", "none"), "celeba": ("celeba", "celeba"), "mscoco256_features": ("coco", "coco")}
    assert (ours.data.format, ours.data.crop) == form.get(dataset["name"], ("folder", "adm"))
    assert ours.evaluate.reference == f"assets/fid_stats/fid_stats_{STATISTICS[name]}.npz"
    assert ours.validation is not None
    assert ours.validation.index != ours.data.index

    assert ours.diffusion.label_dropout == dataset.get("p_uncond", 0.0)
    guided = nnet.get("num_classes", -1) > 0 and sample.get("cfg", False)
    assert ours.diffusion.null_label == (nnet["num_classes"] - 1 if guided else None)
    continuous = pixels or "large" in SYSTEMS[name]
    assert ours.diffusion.schedule == ("vpsde" if continuous else "discrete_sd")
    algorithm = sample.get("algorithm", "dpm_solver")
    if algorithm == "dpm_solver" and not continuous:
        algorithm = "dpm_solver_pp"  # what the discrete scripts call by this name
    assert ours.sample.solver == algorithm
    assert ours.sample.steps == sample["sample_steps"]
    assert ours.sample.cfg_scale == (sample["scale"] if sample.get("cfg") else 0.0)
    assert ours.sample.precision == "bf16_autocast"
    assert ours.evaluate.samples == sample["n_samples"]
    assert ours.evaluate.sub_batch_size == sample["mini_batch_size"]
    assert ours.evaluate.labels == ("frequency" if dataset["name"] == "imagenet" else "uniform")
    assert (ours.evaluate.features, ours.evaluate.weights) == ("inception", "ema")
    assert ours.evaluate.samples == (30_000 if text else 50_000)
    assert ours.evaluate.captions == ("data/coco256_val/index.json" if text else None)
    rounds = ours.evaluate.samples / ours.evaluate.chunk_size / ours.world_size
    assert rounds / math.ceil(rounds) > 0.96, "the last round of chunks keeps nearly all workers busy"
    assert (ours.launch.target, ours.zero.stage) == ("slurm", 1)


@each
def test_the_header_is_a_lab_note(name):
    """The paper's row and FID, the commands as they are typed, hardware, cost, and what was not measured."""
    path = ROOT / "configs" / f"{name}.yaml"
    header = "\n".join(line for line in path.read_text().split("\nrun_dir:")[0].splitlines())
    assert f"Published FID {FID[name]:.2f}" in header
    assert f"{PRESETS[SYSTEMS[name]]['params']:,} parameters" in header
    assert "not measured" in header
    assert "GPUs" in header
    commands = re.findall(r"python -m (\S+) --config (\S+)", header)
    assert {module for module, _ in commands} >= {"uvit_dist.launch"}
    assert len(commands) == 4
    assert {config for _, config in commands} == {f"configs/{name}.yaml"}
    for line in header.replace("\\\n#", "").splitlines():
        found = re.match(r"#\s+python -m \S+ --config (\S+)(.*)", line)
        if found:
            overrides = [word for word in found[2].split() if "=" in word]
            load_config(ROOT / found[1], overrides)
    for module, _ in commands:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


@each
def test_every_number_of_gpus_up_to_the_lanes_is_valid(name):
    config = load(name)
    sizes = [n for n in range(1, config.data.lanes + 1) if config.data.lanes % n == 0]
    assert config.world_size in sizes
    for size in sizes:
        micro = config.train.global_batch_size // max(size, config.world_size)
        load_config(
            ROOT / "configs" / f"{name}.yaml",
            ["launch.target=local", "launch.nodes=1", f"launch.processes_per_node={size}",
             f"train.micro_batch_size={micro}"],
        )  # fmt: skip


@pytest.mark.slow
def test_the_main_command_reads_its_configuration_and_says_what_is_missing():
    command = [sys.executable, "-m", "uvit_dist.launch", "--config", "configs/uvit_h_imagenet512.yaml"]
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable)}  # a machine without SLURM
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 78
    assert "launch.target slurm" in done.stderr
    assert "Traceback" not in done.stderr
