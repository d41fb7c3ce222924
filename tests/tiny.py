"""A tiny system on 120 real digits: what the tests of whole jobs train, sample and score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "digits_demo.yaml"
SMALL = [
    "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
    "data.lanes=12", "data.block_size=4", "data.samples_per_shard=32",
    "precompute.batch_size=4", "precompute.decode_processes=0",
    "train.global_batch_size=24", "train.micro_batch_size=6", "train.steps=10", "train.log_every=1", "train.trace=true",
    "checkpoint.every=5", "optimizer.warmup_steps=3", "launch.timeout_s=60", "storage.retry_s=30",
    "sample.steps=4", "evaluate.samples=60", "evaluate.sub_batch_size=8", "evaluate.chunk_size=16",
    "evaluate.grid_rows=2",
    f"autoencoder.encoder={ROOT}/data_tools/digits_autoencoder.safetensors",
    f"autoencoder.decoder={ROOT}/data_tools/digits_autoencoder.safetensors",
]  # fmt: skip


def overrides(data_dir: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"run_dir={run_dir}", f"data.index={data_dir}/index.json",
            f"evaluate.reference={data_dir}/reference.npz", *more]  # fmt: skip


def tiny_config(data_dir: Path, run_dir: Path, *more: str) -> Config:
    run_dir.mkdir(parents=True, exist_ok=True)
    return load_config(DEMO, overrides(data_dir, run_dir, *more))


def records(run_dir: Path, name: str) -> dict[int, dict[str, Any]]:
    """Step → the last record of it, of metrics.jsonl (evaluations apart) or trace.jsonl."""
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return {line["step"]: line for line in lines if "evaluation" not in line}


def losses(run_dir: Path) -> dict[int, float]:
    return {step: record["loss"] for step, record in records(run_dir, "metrics.jsonl").items()}


def traces(run_dir: Path) -> dict[int, Any]:
    return {step: record["samples"] for step, record in records(run_dir, "trace.jsonl").items()}


def saved_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    from uvit_dist.checkpoint import CheckpointReader
    from uvit_dist.engine import KINDS

    reader = CheckpointReader(run_dir / "checkpoints" / f"step-{step:08d}")
    return {f"{kind}/{name}": value for kind in KINDS for name, value in reader.full(kind).items()}


def same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
