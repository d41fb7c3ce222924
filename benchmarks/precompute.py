"""C8: images to moments of latents, all but the encoder's own time, against the official writer.

    make bench-precompute OFFICIAL=DIR     DIR: a checkout of https://github.com/baofff/U-ViT

IMAGES photographs, of ImageNet's sizes and in its folders, at 256 and at 512 pixels. Both sides have the same encoder:
for the gates, the mean of each 8 x 8 pixels, so that all of them count; where time counts, one of each, which takes
none. Theirs: the official dataset, imported as it is, and the loop of its script, with the
script's DataLoader of 8 processes. Its writer fails on numpy 2; files are object arrays of (moments, label), float32
as there. Ours: ``precompute`` as its command calls it, from listing the images to the index. Sides take turns, all
images in each round; a ratio is the median over rounds; vs_official is that at HEADLINE pixels.
The gates run first. Exit code 1 below "pass" or where a gate fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks import ROOT, commit_of
from benchmarks.rounds import Side, keep, ratios, result, rounds, show, timed

IMAGES, CLASSES, SIZES, HEADLINE = 2000, 10, (256, 512), 512
"""HEADLINE: the side of images whose ratio is vs_official."""
PER_SHARD, BATCH = 500, 16
LEASE_S = 3.0
KILL_AFTER = (1, 2)
"""Done units after which, at the earliest, our job is killed: drawn from this range."""
OFFICIAL_BATCH, OFFICIAL_PROCESSES = 256, 8
LIMITS = {"vs_official": (3.0, 6.0)}
COMMAND = "make bench-precompute OFFICIAL=DIR"


Encoder = Callable[[Tensor], Tensor]


def averages(x0: Tensor) -> Tensor:
    """(B, 8, H/8, W/8) of images (B, 3, H, W): means of 8 x 8 pixels."""
    return _eight(avg_pool2d(x0.contiguous(), 8))


def samples(x0: Tensor) -> Tensor:
    """(B, 8, H/8, W/8) of images (B, 3, H, W): one of 8 x 8 pixels."""
    return _eight(x0[:, :, 4::8, 4::8])


def _eight(planes: Tensor) -> Tensor:
    given = planes.numpy()  # not torch.cat: threads that wait for each other would cost more than all else
    return torch.from_numpy(np.concatenate([given, given, given[:, :2]], axis=1))


class Stub:
    """What our side takes for an autoencoder."""

    latent_channels, factor, encoder_fingerprint = 4, 8, "0" * 64

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode_moments(self, x0: Tensor, bf16: bool = False) -> Tensor:
        """Moments (B, 8, H/8, W/8) of images (B, 3, H, W)."""
        assert not bf16
        return self._encoder(x0)


# -- images ------------------------------------------------------------------------------------------------------------


def photograph(number: int, photographs: list[Any]) -> Any:
    """A part of a photograph, of another colour and with noise; one in seven is larger than ImageNet's 500 x 375."""
    from PIL import Image

    draw = np.random.default_rng([8, number])
    kind, short = draw.random(), int(draw.integers(330, 381))
    width, height = (500, short) if kind < 0.65 else (short, 500)
    if kind > 0.85:
        width = int(draw.integers(600, 1801))
        height = int(width * draw.uniform(0.65, 1.0))
    source = photographs[number % len(photographs)]
    high = min(source.height, source.width * height / width) * draw.uniform(0.55, 1.0)
    wide = high * width / height
    left, top = draw.uniform(0, source.width - wide), draw.uniform(0, source.height - high)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
    pixels = np.asarray(image).astype(np.float32) * draw.uniform(0.8, 1.2, 3) + draw.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_images(directory: Path) -> None:
    """train/CLASS/CLASS_NUMBER.JPEG."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for number in range(IMAGES):
        name = f"n{number % CLASSES:08d}"
        folder = directory / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        photograph(number, photographs).save(folder / f"{name}_{number}.JPEG", quality=90)


# -- sides -------------------------------------------------------------------------------------------------------------


def official_dataset(official: Path, images: Path, size: int) -> tuple[Any, list[str]]:
    """The dataset that the official script reads, and the files in its order."""
    spec = importlib.util.spec_from_file_location("official_datasets", official / "datasets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["official_datasets"] = module
    spec.loader.exec_module(module)
    dataset = module.ImageNet(path=str(images), resolution=size, random_flip=False)
    return dataset.get_split(split="train", labeled=True), dataset.train.image_paths


def theirs(official: Path, images: Path, size: int, out: Path, encoder: Encoder) -> int:
    """The official script's work. Returns how many images."""
    from torch.utils.data import DataLoader

    out.mkdir()
    dataset, _ = official_dataset(official, images, size)
    loader = DataLoader(dataset, batch_size=OFFICIAL_BATCH, shuffle=False, drop_last=False,
                        num_workers=OFFICIAL_PROCESSES, pin_memory=True, persistent_workers=True)  # fmt: skip
    count = 0
    for img, label in loader:
        img = torch.cat([img, img.flip(dims=[-1])], dim=0)
        moments = encoder(img).detach().cpu().numpy()
        labels = torch.cat([label, label], dim=0).detach().cpu().numpy()
        for moment, lb in zip(moments, labels, strict=True):
            pair = np.empty(2, dtype=object)
            pair[:] = [moment, lb]
            np.save(out / f"{count}.npy", pair, allow_pickle=True)
            count += 1
    return count // 2


def ours(images: Path, size: int, out: Path, encoder: Encoder) -> int:
    """The work of our command. Returns how many images."""
    from data_tools import precompute_latents
    from uvit_dist.config_yaml import load_config

    precompute_latents.open_encoder = lambda config, device: Stub(encoder)  # type: ignore[assignment, return-value]
    config = load_config(ROOT / "configs" / f"uvit_h_imagenet{size}.yaml", [
        f"run_dir={out}", f"data.source={images}/train", f"data.index={out}/index.json", "data.format=folder",
        f"data.samples_per_shard={PER_SHARD}", f"precompute.batch_size={BATCH}", f"precompute.lease_s={LEASE_S}",
        f"model.num_classes={CLASSES + 1}", f"diffusion.null_label={CLASSES}", "precompute.contact_sheet=0",
        "autoencoder.encoder_sha256=null", "autoencoder.encoder_fingerprint=null",
    ])  # fmt: skip
    records = precompute_latents.precompute(config, torch.device("cpu"))
    return sum(record.samples for record in records) // 2


# -- gates -------------------------------------------------------------------------------------------------------------


def samples_in(directory: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Key, label and moments of all samples of our shards."""
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            label = -1
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".cls"):
                    label = int(file.read())
                else:
                    yield member.name.removesuffix(".npy"), label, np.load(io.BytesIO(file.read()))


def same_moments(official: Path, images: Path, size: int, npy: Path, shards: Path) -> tuple[bool, bool]:
    """Whether all samples are equal, cast to float16, with their labels; and whether each is there once."""
    _, files = official_dataset(official, images, size)
    expected: dict[str, int] = {}
    number = 0
    for first in range(0, len(files), OFFICIAL_BATCH):
        batch = [os.path.relpath(path, images / "train").removesuffix(".JPEG")
                 for path in files[first : first + OFFICIAL_BATCH]]  # fmt: skip
        for key in [*batch, *(f"{key}_m" for key in batch)]:
            expected[key] = number
            number += 1
    keys, equal = [], True
    for key, label, moments in samples_in(shards):
        keys.append(key)
        pair = np.load(npy / f"{expected[key]}.npy", allow_pickle=True)
        bits = pair[0].astype(np.float16)
        equal = equal and moments.dtype == bits.dtype and np.array_equal(moments, bits) and label == int(pair[1])
    return equal, len(keys) == len(set(keys)) == 2 * IMAGES


def finished(directory: Path) -> dict[str, int]:
    """Tar → time of its change, of shards whose last file is there."""
    return {path.name: path.with_suffix(".tar").stat().st_mtime_ns for path in directory.glob("latents-*.json")
            if not path.name.endswith(".tmp")}  # fmt: skip


def content(directory: Path) -> dict[str, bytes]:
    """What training reads: the index, shards and tables."""
    names = [*directory.glob("*.tar"), *directory.glob("*.npy"), directory / "index.json"]
    return {path.name: path.read_bytes() for path in names}


def images_begun(directory: Path, size: int) -> int:
    """Images in shards that are written in part: each once, though an original and its mirror image are two samples."""
    moments = 8 * (size // 8) ** 2 * 2
    each = 512 + 512 + 512 + -(-(128 + moments) // 512) * 512
    begun: dict[int, int] = {}
    for path in directory.glob("latents-*.tar.tmp-*"):
        unit = int(path.name.split(".")[0].split("-")[1]) % (IMAGES // PER_SHARD)
        begun[unit] = max(begun.get(unit, 0), path.stat().st_size // each)
    return sum(begun.values())


def survives_kill(images: Path, size: int, whole: Path, out: Path) -> tuple[bool, dict[str, Any]]:
    """Kill our job at a moment by chance, start it again: what was finished stays, and the end is that of ``whole``."""
    command = [sys.executable, "-m", "benchmarks.precompute", "--ours", str(images), str(size), str(out)]
    out.mkdir()
    draw = random.Random()
    least, delay = 2 * draw.randint(*KILL_AFTER), draw.uniform(0.0, 0.4)
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while len(finished(out)) < least and first.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    running = first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before, lost = finished(out), images_begun(out, size)
    subprocess.run(command, cwd=ROOT, check=True)
    after = finished(out)
    kept = all(after[name] == when for name, when in before.items())
    told = {"finished_at_kill": len(before), "shards": len(after), "size": size, "killed_while_running": running,
            "images_lost": lost, "images_in_a_shard": PER_SHARD}  # fmt: skip
    return running and kept and lost <= PER_SHARD and content(out) == content(whole), told


def gates(official: Path, images: Path, scratch: Path) -> tuple[dict[str, bool], dict[str, Any]]:
    """What must hold before any time counts, and what the kill met."""
    equal, once, kill, told = True, True, True, {}
    for size in SIZES:
        npy, shards, again = scratch / "npy", scratch / "shards", scratch / "again"
        theirs(official, images, size, npy, averages)
        ours(images, size, shards, averages)
        same, complete = same_moments(official, images, size, npy, shards)
        equal, once = equal and same, once and complete
        held, told[str(size)] = survives_kill(images, size, shards, again)
        kill = kill and held
        for directory in (npy, shards, again):
            shutil.rmtree(directory)
    return {"moments equal, cast to float16, originals and mirror images": equal, "each sample once": once,
            "a kill: finished shards untouched, output equal, at most one shard's images lost": kill}, told  # fmt: skip


def sides(official: Path, images: Path, scratch: Path) -> dict[str, Side]:
    """Images in a second of each."""

    def side(who: str, size: int) -> float:
        out = scratch / f"{who}-{size}"
        work = (
            (lambda: ours(images, size, out, samples))
            if who == "ours"
            else (lambda: theirs(official, images, size, out, samples))
        )
        done = timed(work)
        shutil.rmtree(out)
        return done

    return {
        f"{who}_{size}": (lambda who=who, size=size: side(who, size)) for size in SIZES for who in ("ours", "official")
    }


def measure(official: Path, directory: Path, count: int) -> dict[str, Any]:
    """The result of C8."""
    images, scratch = directory / "images", directory / "scratch"
    write_images(images)
    scratch.mkdir()
    held, told = gates(official, images, scratch)
    found = rounds(sides(official, images, scratch), count)
    named = {HEADLINE: "vs_official"}
    against = {
        named.get(size, f"vs_official_{size}"): ratios(found[f"ours_{size}"], found[f"official_{size}"])
        for size in SIZES
    }
    setting = {"images": IMAGES, "sizes": SIZES, "samples_per_shard": PER_SHARD, "batch_size": BATCH, "mirror": True,
               "encoder": "one of 8 x 8 pixels", "official": {"batch": OFFICIAL_BATCH, "processes": OFFICIAL_PROCESSES},
               "bytes_of_images": sum(path.stat().st_size for path in images.rglob("*.JPEG"))}  # fmt: skip
    return result("C8", LIMITS, against, held, {"unit": "images/s", **found}, setting, COMMAND, kill=told,
                  official=commit_of(official))  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", default="", help="checkout of the official code")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--ours", nargs=3, metavar=("IMAGES", "SIZE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        images, size, out = arguments.ours
        ours(Path(images), int(size), Path(out), averages)
        return 0
    if not arguments.official or not Path(arguments.official, "datasets.py").is_file():
        print(f"OFFICIAL={arguments.official}: no official code there; git clone https://github.com/baofff/U-ViT DIR, "
              "then make bench-precompute OFFICIAL=DIR", file=sys.stderr)  # fmt: skip
        return 2
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
    with tempfile.TemporaryDirectory() as name:
        record = measure(Path(arguments.official).resolve(), Path(name), arguments.rounds)
    show(record)
    keep(record, arguments.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
