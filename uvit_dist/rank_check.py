"""The ranks of a large run try each other out before its first step: all there, sums right, none slow.

Every rank answers a roll call; then sums over all ranks, within each node, and what neighbours in a ring of nodes send
each other, are compared with known values, bit for bit; then products of matrices, all-reduce and the ring are timed.
``RUN_DIR/launch/train/preflight.json`` holds what was found. Failing nodes end the step with their names; slow ones
are told. It takes seconds.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uvit_dist import dist, slurm, storage, watchdog
from uvit_dist.config import Config
from uvit_dist.config_cluster import job_directory
from uvit_dist.dist import Ranks
from uvit_dist.errors import UnavailableError
from uvit_dist.run_state import PREFLIGHT

TRIALS = 5
"""Timed repetitions, after one that is not counted; the median counts."""
SLOW = 0.7
"""A node below this share of the median node is called slow."""
GPU_NUMEL, CPU_NUMEL = 64 * 2**20, 2**20
"""fp32 numbers in a timed message, 256 MiB and 4 MiB: what a bucket of gradients has, or less."""
GPU_SIDE, CPU_SIDE = 8192, 512
"""Of the matrices."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Nodes:
    """Which ranks are on which host, in order. hosts: of every rank."""

    hosts: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The hosts, each once."""
        return list(dict.fromkeys(self.hosts))

    def ranks(self, name: str) -> list[int]:
        """The ranks on a host."""
        return [rank for rank, host in enumerate(self.hosts) if host == name]

    def neighbours(self, rank: int) -> tuple[int, int]:
        """(next, previous): the rank in the same place on the next node, and on the one before, in a ring."""
        names = self.names
        here, place = names.index(self.hosts[rank]), self.ranks(self.hosts[rank]).index(rank)

        def on(node: int) -> int:
            there = self.ranks(names[node % len(names)])
            return there[place % len(there)]

        return on(here + 1), on(here - 1)


def check_ranks(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Meet, check, time, report. Joins the process group. Returns the report, on every rank.

    Raises ``UnavailableError`` on every rank, with the names of the nodes that fail.
    """
    per_node = config.launch.processes_per_node
    store, met = dist.meet(ranks, watchdog.host_name(), config.launch.timeout_s)
    absent = [rank for rank, host in enumerate(met) if host is None]
    if absent:
        hosts = slurm.hosts()
        names = [hosts[rank // per_node] if rank // per_node < len(hosts) else f"node {rank // per_node}"
                 for rank in absent]  # fmt: skip
        told = ", ".join(f"rank {rank} on {name}" for rank, name in zip(absent, names, strict=True))
        fault = f"did not join within launch.timeout_s, {config.launch.timeout_s:g} s"
        report: dict[str, Any] = {"failing": {name: fault for name in names}, "hosts": met}
        return _conclude(config, ranks, report, f"{told} {fault}")
    dist.start(ranks, config.launch.timeout_s, store)
    watchdog.progress("checking")
    report = examine(ranks, [host for host in met if host is not None])
    failing = "; ".join(f"{name}: {fault}" for name, fault in report["failing"].items())
    return _conclude(config, ranks, report, failing)


def examine(ranks: Ranks, hosts: Sequence[str]) -> dict[str, Any]:
    """The report on ranks that have joined the process group. hosts: of every rank, in order. A collective call."""
    nodes = Nodes(tuple(hosts))
    found = dist.gather({"faults": _faults(ranks, nodes), **_speeds(ranks, nodes)})
    return {"hosts": list(nodes.hosts), **judge(nodes, found)}


def judge(nodes: Nodes, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report from what the ranks found, in order of rank: failing, slow and slowest nodes, and their figures."""
    figures = {}
    for number, name in enumerate(nodes.names):
        mine = [found[rank] for rank in nodes.ranks(name)]
        after = [found[rank] for rank in nodes.ranks(nodes.names[(number + 1) % len(nodes.names)])]
        figures[name] = {
            "tflops": min(one["tflops"] for one in mine),
            "in_gbytes_per_s": sum(one["ring"] for one in mine),
            "out_gbytes_per_s": sum(one["ring"] for one in after),
        }
    # Both links of a slow node are slow; its neighbours have a good one on their other side.
    links = {name: max(one["in_gbytes_per_s"], one["out_gbytes_per_s"]) for name, one in figures.items()}
    tflops = {name: one["tflops"] for name, one in figures.items()}
    slow: dict[str, list[str]] = {}
    for what, values in (("products of matrices", tflops), ("its network", links)):
        middle = statistics.median(values.values())
        for name, value in values.items():
            if value < SLOW * middle:
                slow.setdefault(name, []).append(f"{what} at {value / middle:.0%} of the median node's")
    return {
        "failing": _failing(nodes, [one["faults"] for one in found]),
        "slow": {name: "; ".join(told) for name, told in slow.items()},
        "slowest": {"products": min(tflops, key=tflops.__getitem__), "network": min(links, key=links.__getitem__)},
        "all_reduce_gbytes_per_s": min(one["all_reduce"] for one in found),
        "nodes": figures,
    }


def _failing(nodes: Nodes, faults: Sequence[Sequence[str]]) -> dict[str, str]:
    """Host → why it is blamed. faults: of each rank, of "alone", "node", "ring", "all", the checks that were wrong.

    The narrowest check that is wrong tells most: a rank's own, then a node's, then the sender's in the ring; a wrong
    sum over all ranks that nothing narrower explains is everybody's.
    """
    found: dict[str, str] = {}
    for check, told in (("alone", "wrong results of its own"), ("node", "wrong sums within the node")):
        for rank, wrong in enumerate(faults):
            if check in wrong:
                found.setdefault(nodes.hosts[rank], f"{told} (rank {rank})")
    for rank, wrong in enumerate(faults):
        sender = nodes.neighbours(rank)[1]
        if "ring" in wrong and not {nodes.hosts[sender], nodes.hosts[rank]} & found.keys():
            found[nodes.hosts[sender]] = f"what it sends to {nodes.hosts[rank]} arrives wrong (rank {sender})"
    if not found and any("all" in wrong for wrong in faults):
        found = {name: "the sum over all ranks is wrong, and nothing tells whose fault it is" for name in nodes.names}
    return found


def known(rank: int, numel: int, device: torch.device) -> Tensor:
    """The numbers that a rank contributes, (numel,) fp32 integers: small enough for exact sums over 30,000 ranks."""
    return (torch.arange(numel, device=device) % 7 + 1).float() * (rank % 61 + 1)


def known_sum(ranks: Sequence[int], numel: int, device: torch.device) -> Tensor:
    """The sum of what those ranks contribute, (numel,) fp32, exact."""
    return known(0, numel, device) * sum(rank % 61 + 1 for rank in ranks)


def _faults(ranks: Ranks, nodes: Nodes) -> list[str]:
    """The checks whose result is wrong on this rank. A collective call."""
    device, numel, wrong = ranks.device, 1 << 16, []
    mine = known(ranks.rank, numel, device)
    if not torch.equal(mine.cpu(), known(ranks.rank, numel, torch.device("cpu"))) or not _product_is_right(device):
        wrong.append("alone")
    following, before = nodes.neighbours(ranks.rank)
    if following != ranks.rank:
        arrived = dist.exchange(mine, following, torch.zeros_like(mine), before)
        if not torch.equal(arrived, known(before, numel, device)):
            wrong.append("ring")
    for name, group in (("node", nodes.ranks(nodes.hosts[ranks.rank])), ("all", list(range(ranks.world_size)))):
        # within a node as a sum over all, to which the others add zeros, in turns: no groups to be made
        turns = nodes.names if name == "node" else [None]
        for turn in turns:
            taking_part = turn in (None, nodes.hosts[ranks.rank])
            total = dist.sum_(mine.clone() if taking_part else torch.zeros_like(mine))
            if taking_part and not torch.equal(total, known_sum(group, numel, device)):
                wrong.append(name)
    return wrong


def _product_is_right(device: torch.device) -> bool:
    """Whether a product of small integers, exact in fp32, is what it must be, on every core of the device."""
    side = 256
    left = (torch.arange(side * side, device=device) % 5).float().view(side, side)
    expected = left.cpu().double() @ left.cpu().double().T
    return bool(torch.equal((left @ left.T).cpu().double(), expected))


def _speeds(ranks: Ranks, nodes: Nodes) -> dict[str, float]:
    """ "tflops" of products of matrices, "all_reduce" and "ring" (received), 10^9 bytes/s. A collective call."""
    gpu = ranks.device.type == "cuda"
    side, numel = (GPU_SIDE, GPU_NUMEL) if gpu else (CPU_SIDE, CPU_NUMEL)
    matrix = torch.ones(side, side, device=ranks.device, dtype=torch.bfloat16 if gpu else torch.float32)
    message, room = torch.ones(numel, device=ranks.device), torch.empty(numel, device=ranks.device)
    size, world = 4 * numel / 1e9, ranks.world_size
    following, before = nodes.neighbours(ranks.rank)
    product_s = _seconds(ranks, lambda: matrix @ matrix)
    reduce_s = _seconds(ranks, lambda: dist.sum_(room.copy_(message)))
    ring_s = float("inf")
    if following != ranks.rank:
        ring_s = _seconds(ranks, lambda: dist.exchange(message, following, room, before))
    return {
        "tflops": 2 * side**3 / product_s / 1e12,
        "all_reduce": 2 * (world - 1) / world * size / reduce_s,
        "ring": size / ring_s,
    }


def _seconds(ranks: Ranks, work: Callable[[], object]) -> float:
    """The median duration of ``work`` on this rank, begun on all ranks at once. A collective call."""
    took = []
    for _ in range(1 + TRIALS):
        dist.barrier()
        began = time.perf_counter()
        work()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _conclude(config: Config, ranks: Ranks, report: dict[str, Any], failing: str) -> dict[str, Any]:
    """Write and tell the report. Raises ``UnavailableError`` where nodes fail."""
    if ranks.is_main:
        directory = job_directory(config.run_dir, "train")
        storage.make_directory(str(directory))
        whole = {"time": time.time(), "passed": not failing, **report}
        storage.write_bytes(str(directory / PREFLIGHT), json.dumps(whole, indent=1).encode())
    if failing:
        raise UnavailableError(f"pre-flight: {failing}; leave such nodes out (exclude, in the cluster's profile)")
    log.info(
        "pre-flight: %d ranks on %d nodes; all-reduce %.2f GB/s; slowest node in products %s, in its network %s",
        ranks.world_size, len(report["nodes"]), report["all_reduce_gbytes_per_s"], *report["slowest"].values(),
    )  # fmt: skip
    for name, why in report["slow"].items():
        log.warning("pre-flight: %s is slow: %s", name, why)
    return report
