"""What grows with the number of ranks, by simulation: no network and no torch in the ranks, a few processes for all.

    make bench-simulation

The real supervisor's server and judge, plan, commit of checkpoints and sharing of an evaluation's work run against 8 to
1,024 simulated ranks: time of a decision, memory, number of requests to a file system. What is checked: the rank that
was killed is blamed, and no other; ranks' samples make up the step's; a checkpoint is whole, and a rank opens its own
file alone; every unit of an evaluation is done. Writes simulation.json and docs/simulation.png, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import ROOT, provenance
from benchmarks.simulated_evaluation import counted, evaluation
from uvit_dist.beats import BeatServer, alive
from uvit_dist.data import plan as plan_module
from uvit_dist.data.plan import Plan
from uvit_dist.verdicts import Limits, judge

COMMAND = "make bench-simulation"
RANKS = (8, 64, 256, 1024)
REPEATS = 15
IMAGES, SHARD, LANES, BATCH, BLOCK, PART = 2 * 1_281_167, 2048, 1024, 1024, 512, 127
"""ImageNet with mirror images as configs/uvit_h_imagenet512.yaml cuts it, with a lane for each of 1,024 ranks; PART:
samples of latents of 64 KiB that are fetched together."""
UNITS_EACH, FID_UNITS = 4, 200
"""Units of an evaluation for each worker; those that 50,000 images of 250 each make."""
UNIT_S = 2.0
"""Seconds that a unit takes here; minutes in earnest, where workers meet less often."""
KINDS, TENSORS, NUMEL = ("master", "exp_avg", "exp_avg_sq", "ema"), 400, 64
"""Of a checkpoint: tensors and, for each rank, elements, far fewer than in earnest: only files and names count here."""


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median time of a call."""
    out = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        out.append(time.perf_counter() - began)
    return statistics.median(out)


# -- the supervisor ----------------------------------------------------------------------------------------------------


class _Ranks:
    """The ends of connections that ranks would hold: hello, beats, answers read."""

    def __init__(self, server: BeatServer, token: str, count: int) -> None:
        self.sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(count)]
        for rank, connection in enumerate(self.sockets):
            self._send(connection, {"hello": token, "rank": rank, "host": f"node-{rank // 8:04d}", "pid": 1000 + rank})
        self._beat = 0

    @staticmethod
    def _send(connection: socket.socket, message: dict[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    def beat(self) -> None:
        """A beat of every rank, and its answer."""
        self._beat += 1
        for connection in self.sockets:
            told = {"beat": self._beat, "count": self._beat, "phase": "train_step", "step": self._beat, "save_s": None}
            self._send(connection, told)
        for connection in self.sockets:
            while not connection.recv(1 << 16).endswith(b"\n"):
                pass

    def close(self) -> None:
        for connection in self.sockets:
            connection.close()


def supervisor(count: int) -> dict[str, Any]:
    """Beats of a round of ranks, and what the judge makes of them."""
    limits, victim = Limits(silence_s=30, hang_s=300, start_s=900), count // 3
    tracemalloc.start()
    server = BeatServer("127.0.0.1", fence_s=60)
    server.expect("simulated", count)
    ranks = _Ranks(server, "simulated", count)
    ranks.beat()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    began, cpu = time.monotonic(), time.process_time()
    for _ in range(REPEATS):
        ranks.beat()
    cpu = (time.process_time() - cpu) / REPEATS
    decision = seconds(lambda: judge(server.views(), time.monotonic(), began, limits, independent=False))
    well = judge(server.views(), time.monotonic(), began, limits, independent=False)
    ranks.sockets[victim].close()
    while len(list(alive(server.views()))) == count:
        time.sleep(0.01)
    found = judge(server.views(), time.monotonic() + 6, began, limits, independent=False)
    ranks.close()
    server.close()
    return {
        "cpu_s_for_a_beat_of_all": cpu,
        "decision_s": decision,
        "bytes": held,
        "right": well is None and found is not None and found.ranks == (victim,),
    }


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan(count: int) -> dict[str, Any]:
    """Which samples a rank uses, and how many parts of shards all of them fetch."""
    shards = [SHARD] * (IMAGES // SHARD) + [IMAGES % SHARD]
    plan_module._sequence.cache_clear()
    tracemalloc.start()
    order = Plan(tuple(shards), 1, BATCH, LANES, BLOCK)
    order.sample_ids(0, 0, count)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    step = order.steps_per_epoch // 2
    took = seconds(lambda: order.sample_ids(step, count // 2, count))
    together = np.concatenate([order.sample_ids(step, rank, count) for rank in range(count)])
    parts = [_parts(order, lane) for lane in range(LANES)]
    each = LANES // count
    of_ranks = [sum(map(len, parts[rank * each : (rank + 1) * each])) for rank in range(count)]
    return {
        "decision_s": took,
        "bytes": held,
        "requests_of_an_epoch": sum(of_ranks),
        "requests_of_a_rank": max(of_ranks),
        "right": np.array_equal(together, order.sample_ids(step, 0, 1)),
    }


def _parts(order: Plan, lane: int) -> set[tuple[int, int, int]]:
    """The parts of shards that a lane fetches in an epoch: (block, shard, number of the part)."""
    blocks = -(-order.lane_length // order.block_size)
    return {
        (block, shard, part)
        for block in range(blocks)
        for shard, first, size in order.block(0, lane, block).pieces
        for part in range(first // PART, (first + size - 1) // PART + 1)
    }


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints(count: int, folder: Path) -> dict[str, Any]:
    """The commit of a checkpoint that so many ranks have written, and the reading of it by as many and by half."""
    import torch

    from uvit_dist import checkpoint
    from uvit_dist.safetensors_stream import write_flat

    directory, records = checkpoint.temporary(folder, 1), []
    directory.mkdir(parents=True)
    total = NUMEL * count
    tensors = [round(number * total / TENSORS) for number in range(TENSORS + 1)]
    for rank in range(count):
        held = _cut(tensors, rank, rank + 1)
        layout = [(f"{kind}/{name}/{start}", numel) for kind in KINDS for name, start, numel in held]
        path = directory / f"rank-{rank:05d}.safetensors"
        size, digest = write_flat(path, layout, torch.full((len(KINDS) * NUMEL,), float(rank)))
        records.append(checkpoint.FileRecord(path.name, size, digest))
    shapes = {f"t{number}": [last - first] for number, (first, last) in enumerate(pairwise(tensors))}
    with counted(os, ["stat"]) as stats:
        began = time.perf_counter()
        final = checkpoint.commit(folder, {"step": 1, "world_size": count, "shapes": shapes}, records)
        took = time.perf_counter() - began
    found = seconds(lambda: checkpoint.newest_whole(str(folder)), 3)
    opened = {}
    for readers in (count, count // 2):
        most = 0
        for rank in sorted({0, 1, readers // 2, readers - 1}):
            reader = checkpoint.CheckpointReader(final, (rank + 0.5) / readers)
            for kind in KINDS:
                for name, start, numel in _cut(tensors, rank * count // readers, (rank + 1) * count // readers):
                    reader.read(kind, name, start, numel)
            most = max(most, len(reader.opened))
        opened[readers] = most
    return {
        "files": len(list(final.iterdir())),
        "commit_s": took,
        "stats_of_the_commit": stats["stat"],
        "manifest_bytes": (final / checkpoint.MANIFEST).stat().st_size,
        "found_again_s": found,
        "opened_by_a_rank_of_as_many": opened[count],
        "opened_by_a_rank_of_half": opened[count // 2],
        "right": checkpoint.newest_whole(str(folder), "hash") == final and opened[count] == 1,
    }


def _cut(tensors: list[int], first: int, last: int) -> list[tuple[str, int, int]]:
    """(name, first element, number) of what the ranks first…last-1 hold of tensors that lie one after the other."""
    begin, end = NUMEL * first, NUMEL * last
    return [
        (f"t{number}", max(begin, start) - start, min(end, stop) - max(begin, start))
        for number, (start, stop) in enumerate(pairwise(tensors))
        if max(begin, start) < min(end, stop)
    ]


# -- all of it ---------------------------------------------------------------------------------------------------------


def simulate(count: int) -> dict[str, Any]:
    """Everything for one number of ranks."""
    with tempfile.TemporaryDirectory() as name:
        return {
            "ranks": count,
            "supervisor": supervisor(count),
            "plan": plan(count),
            "checkpoints": checkpoints(count, Path(name, "run")),
            "evaluation": evaluation(count, UNITS_EACH * count, UNIT_S, Path(name, "units")),
        }


COLUMNS: dict[str, tuple[str, str, float, str]] = {
    "supervisor: a decision, ms": ("supervisor", "decision_s", 1e3, ".2f"),
    "supervisor: a beat of all ranks, CPU ms, both ends": ("supervisor", "cpu_s_for_a_beat_of_all", 1e3, ".1f"),
    "supervisor: memory, both ends, MB": ("supervisor", "bytes", 1e-6, ".2f"),
    "plan: samples of a rank's step, ms": ("plan", "decision_s", 1e3, ".2f"),
    "plan: memory, MB": ("plan", "bytes", 1e-6, ".2f"),
    "data: requests of an epoch, all ranks": ("plan", "requests_of_an_epoch", 1, ",.0f"),
    "data: requests of an epoch, one rank": ("plan", "requests_of_a_rank", 1, ",.0f"),
    "checkpoint: files": ("checkpoints", "files", 1, ",.0f"),
    "checkpoint: commit, ms": ("checkpoints", "commit_s", 1e3, ".1f"),
    "checkpoint: files looked at by the commit": ("checkpoints", "stats_of_the_commit", 1, ",.0f"),
    "checkpoint: manifest, kB": ("checkpoints", "manifest_bytes", 1e-3, ".1f"),
    "checkpoint: found again by sizes, ms": ("checkpoints", "found_again_s", 1e3, ".1f"),
    "checkpoint: files opened by a rank of as many": ("checkpoints", "opened_by_a_rank_of_as_many", 1, ".0f"),
    "checkpoint: files opened by a rank of half": ("checkpoints", "opened_by_a_rank_of_half", 1, ".0f"),
    "evaluation: a claim, CPU ms": ("evaluation", "decision_s", 1e3, ".2f"),
    "evaluation: requests of a unit": ("evaluation", "requests_of_a_unit", 1, ".1f"),
}
"""Rows of the table: (part, key, factor, format)."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = ["| ranks | " + " | ".join(f"{row['ranks']:,}" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for title, (part, key, factor, form) in COLUMNS.items():
        lines.append(f"| {title} | " + " | ".join(f"{row[part][key] * factor:{form}}" for row in rows) + " |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each row of the table over the number of ranks, in four pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [row["ranks"] for row in rows]
    pictures = {
        "Time of a decision, ms": [
            ("supervisor: a decision", "supervisor", "decision_s", 1e3),
            ("plan: a rank's step", "plan", "decision_s", 1e3),
            ("checkpoint: commit", "checkpoints", "commit_s", 1e3),
            ("evaluation: a claim", "evaluation", "decision_s", 1e3),
        ],
        "Memory, MB": [("supervisor, both ends", "supervisor", "bytes", 1e-6), ("plan", "plan", "bytes", 1e-6)],
        "Requests and files": [
            ("data, epoch, all ranks", "plan", "requests_of_an_epoch", 1),
            ("data, epoch, one rank", "plan", "requests_of_a_rank", 1),
            ("files of a checkpoint", "checkpoints", "files", 1),
            ("of them opened by a rank", "checkpoints", "opened_by_a_rank_of_as_many", 1),
        ],
        "Requests of a unit of an evaluation": [("four units a worker", "evaluation", "requests_of_a_unit", 1)],
    }  # fmt: skip
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, pictures.items(), strict=True):
        for label, part, key, factor in lines:
            axis.plot(ranks, [row[part][key] * factor for row in rows], marker="o", label=label)
        axis.set(title=title, xlabel="ranks", xscale="log", xticks=ranks)
        axis.set_xticks(ranks, [f"{count:,}" for count in ranks])
        axis.margins(y=0.7)  # room for the legend
        if len(lines) > 1:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(given: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where something came out wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), help="numbers of ranks; they divide 1,024")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "simulation.png", help="the picture")
    arguments = parser.parse_args(given)
    if wrong := [count for count in arguments.ranks if count < 2 or LANES % count]:
        print(f"error: --ranks {wrong[0]}: give divisors of {LANES} from 2 on", file=sys.stderr)
        return 2
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))  # two ends of each connection
    supervisor(2), plan(2)  # what the first call of all takes besides
    rows = []
    for count in arguments.ranks:
        rows.append(simulate(count))
        print(f"{count} ranks done", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as name:
        fid = evaluation(max(arguments.ranks), FID_UNITS, UNIT_S, Path(name))
    right = all(part["right"] for row in rows for part in row.values() if isinstance(part, dict)) and fid["right"]
    setting = {"images": IMAGES, "shard": SHARD, "lanes": LANES, "batch": BATCH, "block": BLOCK, "part": PART,
               "units_each": UNITS_EACH, "tensors": TENSORS}  # fmt: skip
    record = {"id": "simulation", "right": right, "rows": rows, f"evaluation of {FID_UNITS} units": fid,
              "setting": setting, "command": COMMAND, **provenance()}  # fmt: skip
    (arguments.out / "simulation.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, arguments.plot)
    print(table(rows))
    print(f"{FID_UNITS} units and {max(arguments.ranks):,} workers: {fid['requests_of_a_unit']:.1f} requests of a unit")
    print("all came out right" if right else "WRONG: see simulation.json")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
