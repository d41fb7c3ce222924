"""C9: how long training stands still for a checkpoint, and how much slower its steps are while it is written.

    make bench-checkpoint

One rank with 500 MB of state in memory, as 1,200 tensors. The stall: what ``Saver.begin`` and every ``after_step``
take, against ``torch.save`` of the same tensors and fsync; sides take turns. A step is a product of matrices on one
thread, so that the other core is the writer's, as on a machine whose steps run on GPUs; its time while a checkpoint is
written is compared with its time before. The gates: the checkpoint holds the bits of the moment when it began, though
the tensors change while it is written; a process that is killed in the middle of a save leaves the one before.
Exit code 1 above "pass" or where a gate fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.rounds import AT_LEAST, WARM_UPS, keep, result, show
from uvit_dist import checkpoint, dist
from uvit_dist.config import CheckpointConfig
from uvit_dist.dist import Ranks
from uvit_dist.saving import Saver

TENSORS, NUMEL, SIDE = 300, 104_167, 900
"""Tensors of each of four kinds, elements of each: 500 MB. SIDE: of the matrices of a step."""
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
STEPS_BEFORE = 40
FEWEST = 3 * AT_LEAST
"""Rounds, whatever was asked: one takes seconds, and its slowdown scatters by a tenth."""
LIMITS = {"stall_ratio": (0.12, 0.07), "step_slowdown": (1.10, 1.10)}
COMMAND = "make bench-checkpoint"
ALONE = Ranks()
SHAPES = {f"blocks.{n}.weight": [NUMEL] for n in range(TENSORS)}


def make_state(seed: int) -> dict[str, Tensor]:
    """Random tensors, (NUMEL,) float32 each."""
    draw = torch.Generator().manual_seed(seed)
    return {f"{kind}/{name}/0": torch.randn(NUMEL, generator=draw) for kind in KINDS for name in SHAPES}


def manifest_of(step: int) -> dict[str, Any]:
    """What the manifest of a step needs to say here."""
    return {"step": step, "shapes": SHAPES, "config": {}}


def training_step(left: Tensor, right: Tensor) -> float:
    """Seconds of a step: the product of two matrices (SIDE, SIDE)."""
    began = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - began


def save_and_step(
    saver: Saver, state: dict[str, Tensor], step: int, data: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Seconds that training stands still for one checkpoint, and how much slower its steps are until it is there."""
    before = [training_step(*data) for _ in range(STEPS_BEFORE)]
    began = time.perf_counter()
    saver.begin(state, manifest_of(step))
    stall, during = time.perf_counter() - began, []
    while saver.under_way:
        busy = saver.busy
        took = training_step(*data)
        if busy:
            during.append(took)
        began = time.perf_counter()
        saver.after_step(busy)
        stall += time.perf_counter() - began
    return stall, statistics.mean(during) / statistics.mean(before)


def plain_save(state: dict[str, Tensor], path: Path) -> float:
    """Seconds of ``torch.save`` and fsync."""
    began = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took


def bare_copy(state: dict[str, Tensor], into: Tensor) -> float:
    """Seconds of a copy into memory that is there, (n,) float32."""
    began = time.perf_counter()
    place = 0
    for value in state.values():
        into[place : place + value.numel()].copy_(value)
        place += value.numel()
    return time.perf_counter() - began


def bits_are_those_at_begin(directory: Path) -> bool:
    """Save, change every tensor at once, finish, read again."""
    state = make_state(1)
    kept = {key: value.clone() for key, value in state.items()}
    saver = Saver(str(directory), CheckpointConfig(every=1), ALONE)
    saver.begin(state, manifest_of(1))
    for value in state.values():
        value.zero_()
    saver.finish(must_succeed=True)
    saver.close()
    reader = checkpoint.CheckpointReader(directory / "checkpoints" / "step-00000001")
    return all(torch.equal(reader.full(kind)[name], kept[f"{kind}/{name}/0"]) for kind in KINDS for name in SHAPES)


def a_kill_leaves_the_one_before(directory: Path) -> bool:
    """A process that has saved step 1 is killed in the middle of the file of step 2."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--victim", str(directory)]
    fault = {"UVIT_FAULT": "sigkill@all,save:block#50", "RANK": "0"}  # a file has some 30 blocks
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, **fault}).returncode
    newest = checkpoint.newest_whole(str(directory), "hash")
    return killed == -9 and newest is not None and newest.name == "step-00000001"


def victim(directory: str) -> None:
    """Save twice."""
    dist.start(ALONE, 60)
    saver = Saver(directory, CheckpointConfig(every=1), ALONE)
    for step in (1, 2):
        saver.begin(make_state(step), manifest_of(step))
        saver.finish(must_succeed=True)


def measure(directory: Path, count: int) -> dict[str, Any]:
    """The result of C9."""
    dist.start(ALONE, 60)
    bits, before = bits_are_those_at_begin(directory / "bits"), a_kill_leaves_the_one_before(directory / "killed")
    gates = {"reload equals the state at begin, bit for bit": bits, "a kill in mid-save leaves the one before": before}
    torch.set_num_threads(1)
    state, data = make_state(2), (torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE))
    saver = Saver(str(directory / "run"), CheckpointConfig(every=1), ALONE)
    memory = torch.zeros(sum(value.numel() for value in state.values()))
    found: dict[str, list[float]] = {"stall_s": [], "slowdown": [], "torch_save_s": [], "bare_copy_s": []}
    for number in range(WARM_UPS + max(count, FEWEST)):
        stall, slower = save_and_step(saver, state, number + 1, data)
        plain_s, copy_s = plain_save(state, directory / "plain.pt"), bare_copy(state, memory)
        row = (stall, slower, plain_s, copy_s)
        if number >= WARM_UPS:
            for name, value in zip(found, row, strict=True):
                found[name].append(value)
    saver.close()
    plain = found["torch_save_s"]
    against = {"stall_ratio": [a / b for a, b in zip(found["stall_s"], plain, strict=True)],
               "step_slowdown": found["slowdown"],
               "bare_copy_ratio": [a / b for a, b in zip(found["bare_copy_s"], plain, strict=True)]}  # fmt: skip
    setting = {"bytes": 4 * NUMEL * TENSORS * len(KINDS), "tensors": TENSORS * len(KINDS), "threads": 1,
               "step": f"product of {SIDE} x {SIDE} float32"}  # fmt: skip
    return result("C9", LIMITS, against, gates, {"unit": "seconds; slowdown: ratio", **found}, setting, COMMAND,
                  at_most=LIMITS)  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds")
    parser.add_argument("--dir", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--victim", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.victim:
        victim(arguments.victim)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        record = measure(Path(name), arguments.rounds)
    show(record)
    keep(record, arguments.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
