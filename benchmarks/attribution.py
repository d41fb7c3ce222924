"""What it costs to know whose fault a step was: checksums of gradients, a replay, a comparison of weights, of times.

    make bench-attribution

Two ranks of one thread each, over gloo, with a U-ViT of 6M parameters on latents of 32 x 32, fp32, ZeRO-1. Sides take
turns in each process: a step as it is, and one whose gradients have checksums; then each of the other acts by
itself, in shares of a step. The gate: losses with all of it on equal those without, bit for bit. Times are rank 0's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ROOT, provenance
from uvit_dist import dist
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.batch import Batch
from uvit_dist.engine import Engine
from uvit_dist.loss import Objective
from uvit_dist.models.uvit import UViT

RANKS, BATCH, WARM_UPS = 2, 4, 2
SMALL = ["model.img_size=32", "model.embed_dim=256", "model.depth=6", "model.num_heads=4", "zero.stage=1",
         "train.precision=fp32", f"train.global_batch_size={RANKS * BATCH}", f"train.micro_batch_size={BATCH}",
         "train.deterministic=true", "data.lanes=4", f"launch.processes_per_node={RANKS}"]  # fmt: skip


def configuration(run_dir: str) -> Config:
    """The demo's, with a larger network."""
    return load_config(ROOT / "configs" / "digits_demo.yaml", [*SMALL, f"run_dir={run_dir}"])


def batch_of(number: int, rank: int) -> Batch:
    """A rank's samples of a step: moments (BATCH, 8, 32, 32) and labels, the same whenever they are asked for."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.arange(BATCH) + BATCH * (RANKS * number + rank)
    return Batch(number, 0, ids, ids % 10, torch.randn(BATCH, 8, 32, 32, generator=draw))


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(run_dir: str, count: int) -> dict[str, Any]:
    """Medians over ``count`` rounds, on this rank. A collective call."""
    ranks, config = dist.ranks_from_environment(), configuration(run_dir)
    torch.set_num_threads(1)
    dist.start(ranks, 60)
    objective, engines = Objective(config), list[Engine]()
    for _ in range(2):
        torch.manual_seed(1)
        engines.append(Engine(UViT(**config.model.model_dump()), config, ranks))
    plain, watched = engines
    watched.checks.watch()

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        return watched.checks.note(objective.losses(net, objective.example(batch)).mean())

    def plain_loss_of(net: nn.Module, batch: Batch) -> Tensor:
        return objective.losses(net, objective.example(batch)).mean()

    def replay() -> None:
        def passes(net: nn.Module) -> Iterator[Tensor]:
            yield plain_loss_of(net, batch_of(watched.step, ranks.rank))

        watched.replay(passes)
        watched.checks.take()

    losses: dict[str, list[float]] = {"plain": [], "watched": []}

    def step(engine: Engine, name: str, loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        result = engine.train_step([batch_of(engine.step, ranks.rank)], loss, lambda loss, norm: True)
        losses[name].append(result.loss)

    acts: dict[str, Callable[[], Any]] = {
        "step": lambda: step(plain, "plain", plain_loss_of),
        "step_with_checksums": lambda: step(watched, "watched", loss_of),
        "replay": replay,
        "compare_weights": lambda: dist.gather(watched.checks.weight_sums()),
        "compare_times": lambda: dist.gather_number(watched.clock.take(), ranks.device),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(WARM_UPS + count):
        for name, act in acts.items():
            dist.barrier()
            took = seconds(act)
            if number >= WARM_UPS:
                found[name].append(took)
    parameters = sum(shape.numel() for shape in plain.shapes.values())
    dist.stop()
    pairs = zip(found["step_with_checksums"], found["step"], strict=True)
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "parameters": parameters,
        "seconds": middle,
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
        "of_a_step": {name: middle[name] / middle["step"] for name in acts if name != "step"}
        | {"checksums": statistics.median(a / b for a, b in pairs) - 1},
        "gates": {"losses equal, bit for bit": losses["plain"] == losses["watched"]},
        "rounds": count,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "attribution.json")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        told = measure(arguments.rank_of, arguments.rounds)
        if os.environ["RANK"] == "0":
            Path(arguments.rank_of, "told.json").write_text(json.dumps(told))
        return 0
    with tempfile.TemporaryDirectory() as run_dir, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        common = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                  "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.attribution", "--rank-of", run_dir,
                   "--rounds", str(arguments.rounds)]  # fmt: skip
        processes = [
            subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(RANKS)
        ]
        if any([process.wait() for process in processes]):
            return 1
        record = {
            **provenance(),
            "command": "make bench-attribution",
            **json.loads(Path(run_dir, "told.json").read_text()),
        }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0 if all(record["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
