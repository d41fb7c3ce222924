"""What the parts of ``benchmarks.gpu`` share: sizes, targets, clocks and the table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.gpu_official import Official
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGETS = {
    "G1 share of G0's product rate": (0.50, 0.57),
    "G3 peak memory at B=128, of official without checkpointing": (0.8, 0.8),
    "G4 throughput at B=16, of the best batch's": (0.85, 0.92), "G5 waiting for data, of the step": (0.005, 0.001),
    "G2 against the official defaults": (2.0, 2.6), "G2 against the official best": (1.3, 1.6),
    "G6 minutes for 50,000 samples": (65, 50), "G6 against official": (2.0, 2.0),
    "G7 decode": (2.0, 2.0), "G7 encode": (1.5, 1.5),
    "G8 milliseconds of stall for 1/8 of the state": (50, 20),
}  # fmt: skip
"""Of each figure, pass and stretch."""


@dataclass(frozen=True)
class Size:
    """How large everything is. decoder: sides of an image; micro_batches: that are tried."""

    network: dict[str, Any]
    product: int
    attention: tuple[int, int, int, int]
    gemm_rows: int
    micro_batches: tuple[int, ...]
    small_batch: int
    memory_batch: int
    repeat: int
    shards: tuple[int, int]
    images: int
    sub_batch: int
    solver_steps: int
    levels: tuple[int, ...]


FULL = Size({"img_size": 64, "patch_size": 4, "in_chans": 4, "embed_dim": 1152, "depth": 28, "num_heads": 16,
             "num_classes": 1001, "conv": False}, 8192, (64, 16, 258, 72), 66_048, (256, 128, 64), 16, 128, 8, (4, 512),
            256, 64, 50, (128, 256, 512, 512))  # fmt: skip
TINY = Size({"img_size": 16, "patch_size": 4, "in_chans": 4, "embed_dim": 64, "depth": 2, "num_heads": 2,
             "num_classes": 11, "conv": False}, 64, (2, 2, 18, 32), 36, (4, 2), 2, 4, 2, (2, 16),
            4, 2, 2, (32, 32))  # fmt: skip


@dataclass
class Session:
    """What the parts share. rates: FLOP/s of the large product, and so on, as they are found."""

    size: Size
    directory: Path
    official: Official | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def tell(self, name: str, value: float, **extra: Any) -> None:
        """Note a figure and print it."""
        limits = TARGETS.get(name)
        self.rows.append({"name": name, "value": value, "pass": limits[0] if limits else None,
                          "stretch": limits[1] if limits else None, **extra})  # fmt: skip
        told = f"{limits[0]:>8g} {limits[1]:>8g}" if limits else " " * 17
        print(f"{name:58} {told} {value:>12.4g}  {json.dumps(extra) if extra else ''}", flush=True)


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeat: int, warm_ups: int = 2) -> float:
    """The median of so many repetitions."""
    times = []
    for number in range(warm_ups + repeat):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        if number >= warm_ups:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_gb(work: Callable[[], Any]) -> float:
    """10^9 bytes that were allocated at most; 0 without a GPU."""
    if DEVICE.type != "cuda":
        work()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def forward_flop(net: dict[str, Any]) -> float:
    """FLOP of the network's forward pass for one image: products alone, a multiplication and an addition each."""
    dim, depth, patch = net["embed_dim"], net["depth"], net["patch_size"]
    patches = (net["img_size"] // patch) ** 2
    tokens = patches + 1 + (net.get("num_classes", -1) > 0)
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    skips = depth // 2 * tokens * 2 * dim * dim
    ends = 2 * patches * dim * patch * patch * net["in_chans"]
    return 2.0 * ((depth + 1) * block + skips + ends)


def configuration(session: Session, batch: int, *more: str) -> Config:
    """The published configuration of ImageNet 512 at this size, on one GPU. more: overrides."""
    options = [f"model.{key}={str(value).lower()}" for key, value in session.size.network.items()]
    options += [
        f"train.global_batch_size={batch}", "optimizer.warmup_steps=10",
        f"train.micro_batch_size={batch}", "data.lanes=2", f"data.image_size={8 * session.size.network['img_size']}",
        f"diffusion.null_label={session.size.network['num_classes'] - 1}", "launch.nodes=1",
        "launch.processes_per_node=1", "launch.target=local", "zero.stage=1", f"run_dir={session.directory}/run",
        f"sample.steps={session.size.solver_steps}", *more,
    ]  # fmt: skip
    return load_config(ROOT / "configs" / "uvit_h_imagenet512.yaml", options)
