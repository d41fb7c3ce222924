"""C3, C4 and C10: the training step and the EMA against the official code, and the bytes that ZeRO-1 moves.

    git clone https://github.com/baofff/U-ViT DIR && git -C DIR checkout ce55170
    .venv/bin/pip install --constraint constraints.txt --editable '.[dev,parity]'
    make bench-step OFFICIAL=DIR     DIR: that checkout

C3: one whole step in fp32 on the shape of U-ViT-S/2 with labels, 16 samples: draws, forward, backward, AdamW, EMA. The
official side is its own train state, loss, optimizer, rate and EMA, imported as they are, with its activation
checkpointing (the setting of its M, L and H) and without. Ours is the Engine under DeepSpeed at stage 0, with the draws
by sample id. Each side has a process of its own, as its users have it: in one, each finds the heap as the others left
it, and zeroed pages from the kernel took up to 2 of 8 s of a step. The gate is that of benchmarks.official_parity:
twenty steps, and controls that must fail it. C4: the EMA of 44.8 million weights against the official loop, and against
what it cannot do without: reading both sets of weights, as a dot product does. C10: what a rank of two sends over
loopback in a step at ZeRO-1, headers too, against 2 (N - 1)/N times the weights' bytes: the gradients' sums, and the
weights. Exit code 1 below "pass" or where a gate fails.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ROOT, official_parity
from benchmarks.rounds import AT_LEAST, Apart, Side, keep, ratios, result, rounds, show, timed
from uvit_dist import dist
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.data.batch import Batch
from uvit_dist.ema import ema_update_
from uvit_dist.engine import Engine
from uvit_dist.errors import UserError
from uvit_dist.guard import Guard
from uvit_dist.host_memory import keep_memory, use_huge_pages
from uvit_dist.loss import Objective
from uvit_dist.models.uvit import UViT

COMMAND = "make bench-step OFFICIAL=DIR"
BATCH, RATE, DECAY = 16, 2e-4, 0.9999
FEWEST_C4 = 5 * AT_LEAST
"""Rounds of C4, whatever was asked: one takes half a second, and the memory gives a tenth more or less from one to the
next."""
S2: dict[str, Any] = {"img_size": 32, "patch_size": 2, "in_chans": 4, "embed_dim": 512, "depth": 12, "num_heads": 8,
                      "num_classes": 1001}  # fmt: skip
LIMITS = {
    "C3": {"vs_official_checkpointed": (1.3, 1.5), "vs_official_plain": (0.98, 1.05)},
    "C4": {"vs_official": (3.5, 5), "vs_official_sharded_8": (15, 15)},
    "C10": {"bytes_vs_theory": (1.02, 1.02)},
}
"""Of each ratio, pass and stretch; that of C10 is from above."""


def configuration(*more: str) -> Config:
    """Ours, for U-ViT-S/2 with labels and latents of 32 x 32."""
    network = [f"model.{key}={value}" for key, value in S2.items()]
    return load_config(
        ROOT / "configs" / "digits_demo.yaml",
        [
            *network, "diffusion.null_label=1000", "diffusion.label_dropout=0.1", "data.image_size=256",
            f"optimizer.lr={RATE}", "optimizer.weight_decay=0.03", "optimizer.warmup_steps=0", f"ema.decay={DECAY}",
            "ema.warmup=false", "train.precision=fp32", f"train.global_batch_size={BATCH}", "data.lanes=2",
            f"train.micro_batch_size={BATCH}", "launch.processes_per_node=1", "zero.stage=0", *more,
        ],
    )  # fmt: skip


def batch_of(number: int, count: int = BATCH) -> Batch:
    """Drawn moments (count, 8, 32, 32) float16 and labels of one step."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.arange(number * count, (number + 1) * count)
    moments = torch.randn(count, 8, 32, 32, generator=draw).half()
    return Batch(number, 0, ids, torch.randint(1000, (count,), generator=draw), moments)


# -- C3 ----------------------------------------------------------------------------------------------------------------


def official_side(use_checkpoint: bool) -> Side:
    """Steps in a second of the official code in the folder OFFICIAL."""
    modules = official_parity.official_modules(official_parity.official_directory())
    net = {**S2, "use_checkpoint": use_checkpoint}
    case = replace(official_parity.LABELS, net=net)
    utils, settings = modules["utils"], modules[f"configs.{case.system}"].get_config()
    settings.nnet = {"name": "uvit", **net}
    utils.set_seed(1)
    state = utils.initialize_train_state(settings, torch.device("cpu"))
    state.nnet.train()
    loss_of, _ = official_parity.official_loss(case, modules, state.nnet)
    number = 0

    def step() -> int:
        nonlocal number
        batch = batch_of(number)
        mean, logvar = batch.data.float().chunk(2, dim=1)  # as the official autoencoder's sample(), which needs weights
        latents = 0.18215 * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean))
        state.optimizer.zero_grad()
        loss = loss_of(latents, y=batch.labels).mean()
        loss.backward()
        state.optimizer.step()
        state.lr_scheduler.step()
        state.ema_update(DECAY)
        number += 1
        return 1

    return lambda: timed(step)


def our_side() -> Side:
    """Steps in a second of ours, in a process as a training's worker sets it up."""
    dist.start(dist.Ranks(), 60)
    keep_memory()
    config = configuration()
    torch.manual_seed(1)
    engine, objective = Engine(UViT(**config.model.model_dump()), config, dist.Ranks()), Objective(config)
    guard = Guard(config.guard)

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        return objective.losses(net, objective.example(batch)).mean()

    def step() -> int:
        assert engine.train_step([batch_of(engine.step)], loss_of, guard.admits).applied
        return 1

    return lambda: timed(step)


def measure_c3(modules: official_parity.Modules, official: Path, count: int) -> dict[str, Any]:
    """The result of C3."""
    rows = list(official_parity.judge_all(modules))
    gates = {f"parity: {row['name']}": bool(row["right"]) for row in rows}
    sides = {"ours": Apart(our_side), "official_plain": Apart(official_side, False),
             "official_checkpointed": Apart(official_side, True)}  # fmt: skip
    found = rounds(sides, count)
    for side in sides.values():
        side.close()
    against = {f"vs_{name}": ratios(found["ours"], found[name]) for name in sides if name != "ours"}
    setting = {**S2, "batch": BATCH, "precision": "fp32", "threads": torch.get_num_threads()}
    return result("C3", LIMITS["C3"], against, gates, {"unit": "steps/s", **found}, setting, COMMAND,
                  official=official_parity.commit_of(official))  # fmt: skip


# -- C4 ----------------------------------------------------------------------------------------------------------------


def measure_c4(modules: official_parity.Modules, official: Path, count: int) -> dict[str, Any]:
    """The result of C4."""
    utils = modules["utils"]
    source, target = (utils.get_nnet("uvit", **S2) for _ in range(2))
    start = [p.detach().clone().flatten() for p in target.parameters()]
    weights = [p.detach().clone().flatten() for p in source.parameters()]
    utils.ema(target, source, DECAY)
    ours = [p.clone() for p in start]
    ema_update_(ours, weights, DECAY)
    exact = [a.double() * DECAY + b.double() * (1 - DECAY) for a, b in zip(start, weights, strict=True)]
    theirs = [p.detach().flatten() for p in target.parameters()]
    off, apart, their_off = (
        max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in zip(values, others, strict=True))
        for values, others in ((ours, exact), (ours, theirs), (theirs, exact))
    )  # fmt: skip
    numel = sum(p.numel() for p in weights)
    flat, eighth = ([torch.cat(tensors)[: numel // n] for tensors in (ours, weights)] for n in (1, 8))
    use_huge_pages(flat)  # as the Engine does
    repeats = 4

    def official_loop() -> int:
        for _ in range(repeats):
            utils.ema(target, source, DECAY)
        return repeats

    def of(tensors: list[Tensor], times: int) -> Callable[[], int]:
        def work() -> int:
            for _ in range(times):
                ema_update_(tensors[:1], tensors[1:], DECAY)
            return times

        return work

    def reading() -> int:
        for _ in range(repeats):
            torch.dot(*flat)
        return repeats

    sides = {"official": lambda: timed(official_loop), "ours": lambda: timed(of(flat, repeats)),
             "ours_sharded_8": lambda: timed(of(eighth, 8 * repeats)), "reading": lambda: timed(reading)}  # fmt: skip
    found = rounds(sides, max(count, FEWEST_C4))
    against = {"vs_official": ratios(found["ours"], found["official"]),
               "vs_official_sharded_8": ratios(found["ours_sharded_8"], found["official"]),
               "vs_reading": ratios(found["ours"], found["reading"]),
               "reading_vs_official": ratios(found["reading"], found["official"])}  # fmt: skip
    gates = {
        "within 1e-7 of float64": off <= 1e-7,
        "within 1e-7 of the official loop, but for its own rounding": apart <= 1e-7 + their_off,
    }
    setting = {"weights": numel, "layout": "as the Engine holds it: one flat tensor; a rank's eighth of it",
               "largest_difference": {"ours of float64": off, "theirs of float64": their_off, "ours of theirs": apart},
               "threads": torch.get_num_threads()}  # fmt: skip
    return result("C4", LIMITS["C4"], against, gates, {"unit": "updates/s", **found}, setting, COMMAND,
                  official=official_parity.commit_of(official))  # fmt: skip


# -- C10 ---------------------------------------------------------------------------------------------------------------

RANKS, C10_BATCH, C10_STEPS = 2, 4, 3


def wire_bytes() -> int:
    """Bytes sent over loopback so far in this network namespace, headers too."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def rank_of_c10(rank: int, world_size: int, port: int, out: str, more: list[str]) -> None:
    """One rank: losses, elements of the EMA that it holds, bytes of each step. more: of the configuration."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    ranks = dist.ranks_from_environment()
    dist.start(ranks, 300)
    config = configuration(
        f"train.global_batch_size={C10_BATCH}", f"train.micro_batch_size={C10_BATCH // world_size}",
        f"launch.processes_per_node={world_size}", "zero.stage=1", *more,
    )  # fmt: skip
    torch.manual_seed(1)
    engine, objective = Engine(UViT(**config.model.model_dump()), config, ranks), Objective(config)
    guard = Guard(config.guard)

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        return objective.losses(net, objective.example(batch)).mean()

    each, rows = C10_BATCH // world_size, []
    for number in range(1 + C10_STEPS):
        batch = batch_of(number, C10_BATCH).to(torch.device("cpu"), slice(rank * each, (rank + 1) * each))
        dist.barrier()
        before = wire_bytes()
        dist.barrier()
        loss = engine.train_step([batch], loss_of, guard.admits).loss
        dist.barrier()
        rows.append({"loss": loss, "wire": (wire_bytes() - before) / world_size})
    weights = sum(math.prod(shape) for shape in engine.shapes.values())
    ema = sum(value.numel() for key, value in engine.local_state().items() if key.startswith("ema/"))
    Path(f"{out}-{world_size}-{rank}.json").write_text(json.dumps({"rows": rows, "weights": weights, "ema": ema}))
    dist.stop()


def ranks_of_c10(out: str, more: list[str]) -> None:
    """One rank, then two, each a process of its own."""
    for world_size in (1, RANKS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        processes = [
            spawn.Process(target=rank_of_c10, args=(rank, world_size, port, out, more)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert all(process.exitcode == 0 for process in processes)


def measure_c10(directory: Path) -> dict[str, Any]:
    """The result of C10. Needs unshare and ip, for a loopback of its own whose bytes can be read."""
    out = str(directory / "rank")
    ours = f"ip link set lo up && exec {sys.executable} -m benchmarks.step --ranks-of-c10 {out}"
    subprocess.run(["unshare", "--net", "sh", "-c", ours], cwd=ROOT, check=True)
    found = {(n, rank): json.loads(Path(f"{out}-{n}-{rank}.json").read_text()) for n in (1, RANKS) for rank in range(n)}
    weights = found[1, 0]["weights"]
    theory = 2 * (RANKS - 1) / RANKS * 4 * weights
    pairs = zip(found[1, 0]["rows"], found[RANKS, 0]["rows"], strict=True)
    off = max(abs(one["loss"] - two["loss"]) / abs(one["loss"]) for one, two in pairs)
    held = [found[RANKS, rank]["ema"] for rank in range(RANKS)]
    gates = {"losses as with one rank, within 1e-5": off <= 1e-5,
             "the EMA is sharded": max(held) <= 1.01 * weights / RANKS and sum(held) == weights}  # fmt: skip
    rows = [found[RANKS, rank]["rows"][1 + step] for rank in range(RANKS) for step in range(C10_STEPS)]
    against = {"bytes_vs_theory": [row["wire"] / theory for row in rows]}
    setting = {**S2, "weights": weights, "ranks": RANKS, "batch": C10_BATCH, "precision": "fp32",
               "theory_bytes": theory, "loss_difference": off, "ema_elements": held}  # fmt: skip
    return result("C10", LIMITS["C10"], against, gates, {"unit": "bytes of a rank and step", "rows": rows}, setting,
                  COMMAND, at_most=LIMITS["C10"])  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", default="", help="checkout of the official code")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--only", choices=sorted(LIMITS), help="one of the three")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--ranks-of-c10", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks_of_c10:
        ranks_of_c10(arguments.ranks_of_c10, arguments.overrides)
        return 0
    records = []
    if arguments.only in (None, "C10"):
        with tempfile.TemporaryDirectory() as name:
            records.append(measure_c10(Path(name)))
    if arguments.only != "C10":
        os.environ["OFFICIAL"] = arguments.official
        try:
            official = official_parity.official_directory()
            modules = official_parity.official_modules(official)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        dist.start(dist.Ranks(), 60)
        if arguments.only in (None, "C4"):
            records.append(measure_c4(modules, official, arguments.rounds))
        if arguments.only in (None, "C3"):
            records.append(measure_c3(modules, official, arguments.rounds))
        dist.stop()
    for record in records:
        show(record)
        keep(record, arguments.out)
    return 0 if all(record["passed"] for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
