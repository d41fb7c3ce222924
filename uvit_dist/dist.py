"""Rank facts and collectives: the one place that talks to torch.distributed."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from uvit_dist.errors import ConfigError, UserError

ASKED_EVERY_S = 5.0
"""Seconds between the collectives of ranks that wait for long work."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """Who this process is. rank in 0…world_size-1; local_rank within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of the local rank, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def ranks_from_environment() -> Ranks:
    """Read RANK, WORLD_SIZE, LOCAL_RANK (and MASTER_ADDR, MASTER_PORT). Raises ``ConfigError`` if half are set."""
    found = [name for name in _VARIABLES if name in os.environ]
    if not found:
        if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ConfigError(
                f"environment: {os.environ['SLURM_NTASKS']} SLURM tasks, but none of {', '.join(_VARIABLES)} is set: "
                "each would think it is alone; set them for every task, or start the ranks with torchrun"
            )
        return Ranks()
    if len(found) < len(_VARIABLES):
        missing = [name for name in _VARIABLES if name not in found]
        raise ConfigError(f"environment: {', '.join(found)} set but {', '.join(missing)} not; set all or none")
    try:
        return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except ValueError as error:
        raise ConfigError(f"environment: RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error})") from None


def start(ranks: Ranks, timeout_s: float) -> None:
    """Join the process group: NCCL with GPUs, gloo without. timeout_s: limit of each collective, seconds.

    Raises ``ConfigError`` where there are GPUs, but none for this rank.
    """
    gpus = torch.cuda.device_count()
    if gpus and ranks.local_rank >= gpus:
        raise ConfigError(
            f"launch.processes_per_node: local rank {ranks.local_rank} has no GPU of its own, this machine has {gpus}; "
            f"set launch.processes_per_node {gpus}, or add --local {gpus}"
        )
    if "MASTER_ADDR" not in os.environ:  # one process alone: no address to agree on
        store: Any = torch_dist.HashStore()
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # DeepSpeed looks for them
    else:
        store = None
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    torch_dist.init_process_group(
        "nccl" if ranks.device.type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def stop() -> None:
    """Leave the process group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    torch_dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for every rank."""
    torch_dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on every rank. For small things."""
    out: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(out, value)
    return out


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank. For small things."""
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(ranks: Ranks, work: Any) -> Any:
    """Call ``work()`` on rank 0; its result, or the error it raised, on every rank."""
    result: Any = None
    error: Exception | None = None
    told: Exception | None = None
    if ranks.is_main:
        try:
            result = work()
        except UserError as caught:
            error = told = caught
        except Exception as caught:  # noqa: BLE001 - raised again, on every rank; some exceptions cannot be sent
            error, told = caught, RuntimeError(f"rank 0: {type(caught).__name__}: {caught}")
    result, told = broadcast((result, told))
    if told is not None:
        raise error or told
    return result


def on_main_for_long(ranks: Ranks, work: Any) -> Any:
    """As ``on_main``, for work that may take longer than a collective: the others ask again and again if it is done."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            done.set_exception(error)

    if ranks.is_main:
        threading.Thread(target=run, name="on-main", daemon=True).start()
    while not broadcast(bool(wait([done], ASKED_EVERY_S).done) if ranks.is_main else None):
        pass
    return on_main(ranks, done.result)
