"""Rank facts and collectives: the one place that talks to torch.distributed."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from uvit_dist.errors import ConfigError, UnavailableError, UserError

ASKED_EVERY_S = 5.0
"""Seconds between the collectives of ranks that wait for long work."""
ROLL_CALL_S, LAST_WORDS_S = 0.05, 5.0
"""Seconds between looks at who has come; and for which rank 0 waits until all have heard who has."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What DeepSpeed looks for, where one process is alone and has no address."""


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
        raise ConfigError(
            f"environment: RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}); correct or unset them"
        ) from None


def meet(ranks: Ranks, name: str, limit_s: float) -> tuple[Any, list[str | None]]:
    """A roll call before the process group: who has come within a limit, seconds. name: of this rank's host.

    Returns a store for ``start``, and the hosts of all ranks in order, on every rank; none for those who have not come.
    Raises ``UnavailableError`` on a rank that does not reach rank 0.
    """
    if "MASTER_ADDR" not in os.environ:
        return None, [name]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline, limit = time.monotonic() + limit_s, timedelta(seconds=limit_s)
    try:
        store = torch_dist.TCPStore(address, port, ranks.world_size, ranks.is_main, limit, wait_for_workers=False)
        store.set(f"meet/{ranks.rank}", name)
        keys = [f"meet/{rank}" for rank in range(ranks.world_size)]
        if ranks.is_main:
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(ROLL_CALL_S)
            found = [store.get(key).decode() if store.check([key]) else None for key in keys]
            store.set("met", json.dumps(found))
        else:
            store.wait(["met"], limit + timedelta(seconds=LAST_WORDS_S))
        hosts: list[str | None] = json.loads(store.get("met"))
        heard = store.add("heard", 1)
        deadline = time.monotonic() + LAST_WORDS_S
        while ranks.is_main and heard < len(hosts) - hosts.count(None) and time.monotonic() < deadline:
            time.sleep(ROLL_CALL_S)  # the store ends with this process
            heard = store.add("heard", 0)
    except (torch_dist.DistError, RuntimeError) as error:
        raise _unreached(ranks, f" on {name}", limit_s, error) from None
    return store, hosts


def _unreached(ranks: Ranks, where: str, limit_s: float, error: Exception) -> UnavailableError:
    address, port, why = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(error).splitlines()[0]
    if "EADDRINUSE" in why:
        return UnavailableError(
            f"rank {ranks.rank}{where} cannot listen on MASTER_PORT {port}: another process does; give torchrun "
            "another --master-port, or start the job with uvit_dist.launch, which finds a free one"
        )
    return UnavailableError(
        f"rank {ranks.rank}{where} does not reach rank 0 at {address}:{port} within {limit_s:g} s ({why}); "
        "see that hosts reach each other's ports"
    )


def start(ranks: Ranks, timeout_s: float, store: Any = None) -> None:
    """Join the process group: NCCL with GPUs, gloo without. timeout_s: limit of each collective, seconds.

    store: of ``meet``, where ranks have met. Raises ``ConfigError`` where there are GPUs, but none for this rank;
    ``UnavailableError`` where rank 0 is not reached, or cannot listen.
    """
    gpus = torch.cuda.device_count()
    if gpus and ranks.local_rank >= gpus:
        raise ConfigError(
            f"launch.processes_per_node: local rank {ranks.local_rank} has no GPU of its own, this machine has {gpus}; "
            f"set launch.processes_per_node {gpus}, or add --local {gpus}"
        )
    if "MASTER_ADDR" not in os.environ:  # one process alone: no address to agree on
        store = torch_dist.HashStore()
        os.environ |= _ALONE
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    try:
        torch_dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (torch_dist.DistNetworkError, torch_dist.DistStoreError) as error:
        if "MASTER_ADDR" not in os.environ:
            raise
        raise _unreached(ranks, "", timeout_s, error) from None


def stop() -> None:
    """Leave the process group; the environment is as before it, for processes that are started later."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
        if "MASTER_ADDR" not in os.environ:
            for name in _ALONE:
                os.environ.pop(name, None)


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    torch_dist.all_reduce(tensor)
    return tensor


def sum_pieces(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sum a flat tensor over all ranks, each piece to one rank alone: a reduce-scatter of uneven pieces.

    flat: (sum of sizes,), the pieces of rank 0, 1, … one after the other, overwritten; sizes: elements of each, the
    same on all ranks. Returns this rank's sum, (sizes[rank],). A rank sends (N - 1)/N of what an even cut gives it to
    send, as in theory, over gloo too, whose own reduce-scatter sends twice that.
    """
    rank = torch_dist.get_rank()
    if torch_dist.get_backend() != "gloo":
        pieces = flat.split(list(sizes))
        sums = [torch_dist.reduce(piece, to, async_op=True) for to, piece in enumerate(pieces) if piece.numel()]
        for work in filter(None, sums):
            work.wait()
        return pieces[rank]
    arrived = flat.new_empty(len(sizes) * sizes[rank])
    torch_dist.all_to_all_single(arrived, flat, [sizes[rank]] * len(sizes), list(sizes))
    return arrived.view(len(sizes), sizes[rank]).sum(0)


def exchange(out: Tensor, to: int, into: Tensor, source: int) -> Tensor:
    """Send a tensor to a rank while another is received, in place, from a rank: same shapes and dtypes."""
    pair = [torch_dist.P2POp(torch_dist.isend, out, to), torch_dist.P2POp(torch_dist.irecv, into, source)]
    for work in torch_dist.batch_isend_irecv(pair):
        work.wait()
    return into


def barrier() -> None:
    """Wait for every rank."""
    torch_dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of rank, on every rank. For small things."""
    out: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(out, value)
    return out


def gather_number(value: float, device: torch.device) -> list[float]:
    """Every rank's number, in order of rank, on every rank: one collective of 8 bytes from each."""
    numbers = torch.empty(torch_dist.get_world_size(), dtype=torch.float64, device=device)
    torch_dist.all_gather_into_tensor(numbers, torch.tensor([value], dtype=torch.float64, device=device))
    told: list[float] = numbers.tolist()
    return told


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
