"""Measures steps of real training on synthetic batches: the process that ``uvit_dist.tune`` starts and asks.

It reads configurations as JSON, one in a line, from its standard input and answers each in a line that begins with
``ANSWER``. What does not fit into memory is an answer like any other.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from uvit_dist import dist
from uvit_dist.config import Config
from uvit_dist.data.batch import Batch
from uvit_dist.dist import Ranks
from uvit_dist.engine import Engine
from uvit_dist.host_memory import keep_memory
from uvit_dist.loss import Objective
from uvit_dist.models.uvit import UViT
from uvit_dist.train import micro_batches

ANSWER = "uvit_dist.trial: "
WARM_UPS, FEWEST, MOST = 2, 2, 20
"""Steps that are not counted; least and most of those that are."""


def synthetic_batch(config: Config, step: int) -> Batch:
    """Drawn samples in the shapes and dtypes of a loader's batch. data: (B, *shape); labels, ids: (B,)."""
    model, count = config.model, config.train.global_batch_size
    side, draw = model.img_size, torch.Generator().manual_seed(step)
    if config.data.space == "pixels":
        data = torch.randint(256, (count, model.in_chans, side, side), dtype=torch.uint8, generator=draw)
    else:
        kind = getattr(torch, config.data.moments_dtype)
        data = torch.randn(count, 2 * model.in_chans, side, side, generator=draw).to(kind)
    labels = torch.randint(max(1, model.num_classes), (count,), generator=draw)
    contexts = None
    if model.clip_dim is not None:
        contexts = torch.randn(count, model.num_clip_token, model.clip_dim, generator=draw)
        contexts = contexts.to(getattr(torch, config.data.contexts_dtype))
    return Batch(step, 0, torch.arange(step * count, (step + 1) * count), labels, data, contexts)


def measure(config: Config, ranks: Ranks, limit_s: float) -> dict[str, Any]:
    """Seconds of a whole update (draws, forward, backward, AdamW, EMA) and the memory it took.

    limit_s: seconds after which no further step begins. Returns step_s, of it update_s (AdamW and the EMA), steps,
    spread; on a GPU peak and used, bytes: allocated at most by tensors, and taken of the GPU in all.
    """
    begun, gpu = time.monotonic(), ranks.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(config.seed)
    with ranks.device:
        net = UViT(**config.model.model_dump())
    engine = Engine(net, config, ranks)
    model = config.model
    objective = Objective(config, torch.zeros(model.num_clip_token, model.clip_dim) if model.clip_dim else None)
    batches = [synthetic_batch(config, step) for step in range(2)]

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        return objective.losses(net, objective.example(batch)).mean()

    times: list[float] = []
    updates: list[float] = []
    computed_at = 0.0

    def admit(loss: float, grad_norm: float) -> bool:
        nonlocal computed_at
        computed_at = time.perf_counter()  # the host has just waited for both numbers
        return True

    for number in range(WARM_UPS + MOST):
        if number >= WARM_UPS + FEWEST and time.monotonic() - begun > limit_s:
            break
        if gpu and number == WARM_UPS:
            torch.cuda.reset_peak_memory_stats()  # of steps, not of building
        start = time.perf_counter()
        pieces = list(micro_batches(batches[number % 2], config, ranks))
        engine.train_step(pieces, loss_of, admit)
        if gpu:
            torch.cuda.synchronize()
        if number >= WARM_UPS:
            times.append(time.perf_counter() - start)
            updates.append(time.perf_counter() - computed_at)
    found: dict[str, Any] = {"step_s": statistics.median(times), "update_s": statistics.median(updates),
                             "steps": len(times),
                             "spread": (max(times) - min(times)) / statistics.median(times)}  # fmt: skip
    if gpu:
        free, total = torch.cuda.mem_get_info()
        found |= {"peak": torch.cuda.max_memory_allocated(), "used": total - free}
    return found


def answer(config: Config, ranks: Ranks, limit_s: float) -> dict[str, Any]:
    """As ``measure``, or {"error": why not}, and what tensors still hold after it, bytes."""
    try:
        found = measure(config, ranks, limit_s)
    except torch.OutOfMemoryError:
        found = {"error": "out of memory"}
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        found = {"error": str(error).splitlines()[0]}
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        found["left"] = torch.cuda.memory_allocated()
    return found


def tell(what: dict[str, Any]) -> None:
    """One line to the process that asks."""
    sys.stdout.write(f"{ANSWER}{json.dumps(what)}\n")
    sys.stdout.flush()


def main() -> None:
    """Answers until its standard input ends."""
    ranks = Ranks()
    dist.start(ranks, 600)
    if ranks.device.type == "cuda":
        tell({"device": torch.cuda.get_device_name(), "memory": torch.cuda.mem_get_info()[1]})
    else:
        keep_memory()
        tell({"device": "CPU", "memory": None})
    for line in sys.stdin:
        asked = json.loads(line)
        tell(answer(Config.model_validate_json(json.dumps(asked["config"])), ranks, asked["limit_s"]))
    dist.stop()


if __name__ == "__main__":
    main()
