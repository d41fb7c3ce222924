"""Where the time of C3's training steps goes, ours and the official code's, by torch's operations.

    .venv/bin/python -m benchmarks.step_profile --official DIR     DIR: a checkout of the official code

Prints a table, ms of one step: of all operations without the time of those they call, what lies between them (Python),
and the operations that take longest. Each side has a process of its own. The profiler itself takes time, alike on all
sides; rates are those of C3.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import official_parity
from benchmarks.rounds import Side
from benchmarks.step import official_side, our_side
from uvit_dist.errors import UserError

WARM, STEPS, LONGEST = 3, 3, 8
KINDS = {
    "products": ("mm", "addmm", "bmm", "linear", "convolution", "mkldnn"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "norms": ("layer_norm",),
    "GELU": ("gelu",),
    "in place: AdamW, EMA, sums of gradients": (
        "lerp_",
        "mul_",
        "add_",
        "addcmul_",
        "addcdiv_",
        "div_",
        "sqrt",
        "adam",
    ),
    "copies": ("copy_", "cat", "fill_", "zero_"),
}
"""Parts of the operations' names; what has none of them is "other"."""


def kind_of(name: str) -> str:
    """The row of an operation."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profiled(make: Callable[..., Side], *args: bool) -> tuple[float, dict[str, float]]:
    """ms of a step, and of each operation in it, of STEPS steps after WARM."""
    side = make(*args)
    for _ in range(WARM):
        side()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            side()
    took = (time.perf_counter() - began) / STEPS * 1e3
    events = found.key_averages()
    return took, {event.key: event.self_cpu_time_total / STEPS / 1e3 for event in events}


def table(found: dict[str, tuple[float, dict[str, float]]]) -> str:
    """Markdown: a column for each side."""
    rows = {"all": [took for took, _ in found.values()]}
    for kind in [*KINDS, "other"]:
        rows[kind] = [sum(ms for name, ms in ops.items() if kind_of(name) == kind) for _, ops in found.values()]
    rows["between operations"] = [took - sum(ops.values()) for took, ops in found.values()]
    ours = next(iter(found.values()))[1]
    for name in sorted(ours, key=ours.__getitem__, reverse=True)[:LONGEST]:
        rows[f"`{name}`"] = [ops.get(name, 0.0) for _, ops in found.values()]
    lines = [f"| ms of a step | {' | '.join(found)} |", "| --- |" + " --- |" * len(found)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in row)} |" for name, row in rows.items())])


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--official", default="", help="checkout of the official code")
    os.environ["OFFICIAL"] = parser.parse_args().official
    try:
        official_parity.official_directory()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sides: dict[str, tuple[Any, ...]] = {"ours": (our_side,), "official, plain": (official_side, False),
                                         "official, checkpointed": (official_side, True)}  # fmt: skip
    found = {}
    for name, side in sides.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            found[name] = alone.submit(profiled, *side).result()
    print(table(found))
    print(f"\n{STEPS} steps after {WARM}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
