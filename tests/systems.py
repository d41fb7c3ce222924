"""The ten published systems at tiny size: their data, weights and jobs, all made in the test from real photographs.

Only width, depth, steps, batch and the numbers of images and classes are smaller than published, by overrides; image
size, patches, heads, tokens, channels, schedule, objective, solver, guidance, crop and format are as the configuration
says.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from tests.tiny import ROOT
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.models.autoencoder import to_official_keys
from uvit_dist.models.inception import _network

PIXELS = ("uvit_s_cifar10", "uvit_s_celeba64", "uvit_m_imagenet64", "uvit_l_imagenet64")
LATENTS = ("uvit_l_imagenet256", "uvit_h_imagenet256", "uvit_l_imagenet512", "uvit_h_imagenet512")
TEXT = ("uvit_s_mscoco", "uvit_s_deep_mscoco")
INCEPTION = "uvit_h_imagenet256"
"""Scored as published: FID in Inception features, here of random weights."""

IMAGES, CLASSES = 20, 7
SMALL = [
    "model.embed_dim=96", "model.depth=2", "train.steps=4", "train.global_batch_size=8", "train.micro_batch_size=4",
    "train.log_every=1", "train.trace=true", "train.precision=fp32", "optimizer.warmup_steps=2", "checkpoint.every=2",
    "data.lanes=4", "data.block_size=2", "data.samples_per_shard=9",
    "precompute.batch_size=3", "precompute.decode_processes=0",
    "sample.steps=3", "evaluate.samples=10", "evaluate.sub_batch_size=5", "evaluate.chunk_size=5",
    "evaluate.grid_rows=1", "evaluate.neighbours=2", "evaluate.features=pixels_8x8",
    "validation.samples=5", "validation.every=2", "validation.batch_size=2",
    "launch.target=local", "launch.nodes=1", "launch.processes_per_node=1", "launch.timeout_s=60", "storage.retry_s=30",
]  # fmt: skip


def photographs(count: int, height: int, width: int, seed: int) -> list[Image.Image]:
    """Pieces of scikit-learn's two photographs, (height, width) each."""
    random = np.random.default_rng(seed)
    whole = [Image.fromarray(image).resize((3 * width, 3 * height)) for image in load_sample_images().images]
    places = random.integers(0, (2 * width, 2 * height), (count, 2))
    return [whole[n % 2].crop((x, y, x + width, y + height)) for n, (x, y) in enumerate(places.tolist())]


def make_cifar10(root: Path) -> None:
    root.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        images = photographs(IMAGES // 5 if name != "test_batch" else 6, 32, 32, seed=number)
        planes = [np.asarray(image).transpose(2, 0, 1).tobytes() for image in images]
        (root / f"{name}.bin").write_bytes(b"".join(bytes([n % 10]) + plane for n, plane in enumerate(planes)))


def make_celeba(root: Path) -> None:
    (root / "img_align_celeba").mkdir(parents=True)
    parts = [0] * IMAGES + [1, 1, 2]
    lines = []
    for number, (image, part) in enumerate(zip(photographs(len(parts), 218, 178, seed=7), parts, strict=True), 1):
        image.save(root / "img_align_celeba" / f"{number:06d}.jpg", quality=95)
        lines.append(f"{number:06d}.jpg {part}\n")
    (root / "list_eval_partition.txt").write_text("".join(lines))


def make_imagenet(root: Path) -> None:
    for number, image in enumerate(photographs(IMAGES, 530, 600, seed=8)):
        folder = root / f"n{number % CLASSES:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")


def make_coco(root: Path) -> None:
    for part, count in (("train", IMAGES), ("val", 12)):
        folder = root / f"{part}2014"
        folder.mkdir(parents=True)
        images, annotations = [], []
        for number, image in enumerate(photographs(count, 270, 300, seed=9 + count)):
            image.save(folder / f"{number}.jpg", quality=95)
            images.append({"id": 100 + number, "file_name": f"{number}.jpg"})
            for k in range(1 + number % 3):
                caption = f"Photograph {number} of {part}, said in {k + 1} words."
                annotations.append({"id": 10 * number + k, "image_id": 100 + number, "caption": caption})
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations}
        (root / "annotations" / f"captions_{part}2014.json").write_text(json.dumps(content))


def make_autoencoders(root: Path) -> None:
    """Random autoencoders of factor 8: official files that share an encoder, and a narrow one in diffusers' form."""
    root.mkdir(parents=True)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
              "layers_per_block": 1, "latent_channels": 4}  # fmt: skip
    torch.manual_seed(1)
    official = AutoencoderKL(**levels, block_out_channels=[32] * 4)
    torch.save(to_official_keys(official.state_dict()), root / "autoencoder_kl.pth")
    for parameter in official.decoder.parameters():
        parameter.data *= 0.9
    torch.save(to_official_keys(official.state_dict()), root / "autoencoder_kl_ema.pth")
    narrow = AutoencoderKL(**levels, block_out_channels=[8] * 4, norm_num_groups=4, mid_block_add_attention=False)
    narrow.save_pretrained(root / "narrow")


def make_text_tower(path: Path) -> None:
    """A random text tower of ViT-L/14's width, one layer deep, in open_clip's keys."""
    torch.manual_seed(2)
    width = 768
    shapes = {
        "token_embedding.weight": (49408, width), "positional_embedding": (77, width),
        "text_projection": (width, width),
        "ln_final.weight": (width,), "ln_final.bias": (width,),
    }  # fmt: skip
    block = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    shapes |= {f"transformer.resblocks.0.{name}": shape for name, shape in block.items()}
    norms = {name for name in shapes if "ln_" in name and name.endswith("weight")}
    tensors = {name: 0.05 * torch.randn(shape) + (name in norms) for name, shape in shapes.items()}
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)


def make_inception(path: Path) -> None:
    """Random weights of the FID network, in the form of its published file."""
    network = _network().to_empty(device="cpu")
    drawn = torch.Generator().manual_seed(3)
    for name, value in network.state_dict().items():
        if value.ndim == 4:
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=drawn)
        else:
            value.fill_(float(name.endswith(("running_var", "bn.weight"))))
    torch.save(network.state_dict(), path)


def make_official_reference(ours: Path, official: Path) -> None:
    """A file as the official one is: the mean and covariance of a reference of ours, and nothing else."""
    with np.load(ours) as archive:
        np.savez(official, mu=archive["mu"], sigma=archive["sigma"])


def make_everything(root: Path) -> None:
    make_cifar10(root / "cifar10")
    make_celeba(root / "celeba")
    make_imagenet(root / "imagenet")
    make_coco(root / "coco")
    make_autoencoders(root / "autoencoders")
    make_text_tower(root / "text.safetensors")
    make_inception(root / "inception.pth")


def tiny_overrides(name: str, root: Path, run_dir: Path) -> list[str]:
    """Overrides of a published configuration: tiny, on the data below ``root``."""
    out = [*SMALL, f"run_dir={run_dir}", f"data.index={run_dir}/shards/index.json",
           f"evaluate.reference={run_dir}/reference.npz", f"validation.index={run_dir}/held_out/index.json",
           f"evaluate.captions={run_dir}/held_out/index.json"]  # fmt: skip
    if name == "uvit_s_cifar10":
        out += [f"data.source={root}/cifar10"]
    elif name == "uvit_s_celeba64":
        out += [f"data.source={root}/celeba"]
    elif name in TEXT:
        out += [f"data.source={root}/coco/train2014", f"data.captions={root}/coco/annotations/captions_train2014.json",
                f"text.encoder={root}/text.safetensors", "evaluate.save_samples=true"]  # fmt: skip
    else:
        guided = name in LATENTS
        out += [f"data.source={root}/imagenet", f"model.num_classes={CLASSES + guided}"]
        out += [f"diffusion.null_label={CLASSES}"] if guided else []
    if name not in PIXELS:
        official = name == "uvit_h_imagenet256"
        files = ("autoencoder_kl.pth", "autoencoder_kl_ema.pth") if official else ("narrow", "narrow")
        out += [f"autoencoder.encoder={root}/autoencoders/{files[0]}",
                f"autoencoder.decoder={root}/autoencoders/{files[1]}"]  # fmt: skip
    if name == INCEPTION:
        out += ["evaluate.features=inception", f"evaluate.inception={root}/inception.pth"]
    return out


def tiny_system(name: str, root: Path, run_dir: Path, *more: str) -> Config:
    run_dir.mkdir(parents=True, exist_ok=True)
    return load_config(ROOT / "configs" / f"{name}.yaml", [*tiny_overrides(name, root, run_dir), *more])


def command(main: Any, *arguments: str) -> str:
    """A command line's ``main`` with these arguments, in this process. Returns what it printed."""
    printed = io.StringIO()
    with patch.object(sys, "argv", ["command", *arguments]), contextlib.redirect_stdout(printed):
        main()
    return printed.getvalue()


def make_shards(name: str, root: Path, run_dir: Path) -> None:
    """The shards of a system, by the commands in its configuration's header."""
    from data_tools import pack_images, precompute_latents, precompute_text

    tool = pack_images if name in PIXELS else precompute_text if name in TEXT else precompute_latents
    run_dir.mkdir(parents=True, exist_ok=True)
    common = ["--config", str(ROOT / "configs" / f"{name}.yaml"), *tiny_overrides(name, root, run_dir)]
    command(tool.main, *common)
    held_out = ["data.mirror=false"]
    if name in ("uvit_s_cifar10", "uvit_s_celeba64"):
        held_out = ["data.split=test" if name == "uvit_s_cifar10" else "data.split=validation"]
    elif name in TEXT:
        held_out = [f"data.source={root}/coco/val2014",
                    f"data.captions={root}/coco/annotations/captions_val2014.json"]  # fmt: skip
    command(tool.main, *common, *held_out, f"data.index={run_dir}/held_out/index.json")


def connect_nowhere(self: socket.socket, address: Any) -> None:
    raise AssertionError(f"reaches out to {address}")


def whole_system(name: str, root: Path, run_dir: Path) -> dict[str, Any]:
    """Pack or precompute, train, sample and score one system, in this process. Returns its scores.

    Nothing but the loopback of the process group may be reached: there is no hub.
    """
    with patch.object(socket.socket, "connect", connect_nowhere):
        return _whole_system(name, root, run_dir)


def _whole_system(name: str, root: Path, run_dir: Path) -> dict[str, Any]:
    from data_tools import fid_reference
    from uvit_dist import dist, sample
    from uvit_dist.evaluate import evaluate
    from uvit_dist.preemption import StopFlag
    from uvit_dist.train import train

    make_shards(name, root, run_dir)
    config = tiny_system(name, root, run_dir)
    arguments = ["--config", str(ROOT / "configs" / f"{name}.yaml"), *tiny_overrides(name, root, run_dir)]
    command(fid_reference.main, *arguments)
    ranks = dist.ranks_from_environment()
    dist.start(ranks, 60)
    assert train(config, ranks, StopFlag())
    scores = evaluate(config, ranks)
    if name == INCEPTION:
        official = run_dir / "official.npz"
        make_official_reference(run_dir / "reference.npz", official)
        again = evaluate(tiny_system(name, root, run_dir, f"evaluate.reference={official}"), ranks)
        scores["scores of the official file"] = again
    dist.stop()
    grids = [str(run_dir / f"{n}.png") for n in range(3)]
    asked = {"uncond": ["--count", "2"], "class": ["--labels", "2,5", "--count", "1"],
             "text": ["--prompt", "A green train.", "--prompt", "", "--count", "1"]}  # fmt: skip
    kind = "text" if name in TEXT else "class" if config.model.num_classes > 0 else "uncond"
    for seed, grid in zip(("0", "0", "1"), grids, strict=True):
        command(sample.main, "--checkpoint", str(run_dir), *asked[kind], "--seed", seed, "--grid", grid,
                "--batch-size", "2")  # fmt: skip
    pictures = [np.asarray(Image.open(grid)) for grid in grids]
    same, other = (np.array_equal(pictures[0], picture) for picture in pictures[1:])
    return {**scores, "same_seed_same_picture": bool(same), "other_seed_same_picture": bool(other),
            "picture": pictures[0].shape}  # fmt: skip
