"""Runs a function on several ranks: processes forked from one server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])
NEWER = ("AWS_", "UVIT_")
"""Variables that a rank has from the test, not from the fork server."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def _rank_main(function: Callable, environment: dict[str, str], log: str, out: str, args: tuple) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in [name for name in os.environ if name.startswith(NEWER)]:
        del os.environ[name]  # of the fork server, as it was when that started
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        torch.save(function(*args), out)
    except BaseException:
        traceback.print_exc()
        raise


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 400) -> list[Any]:
    """function(*args) on every rank, with the environment of a launcher. Returns what the ranks return, in order."""
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        newer = {name: value for name, value in os.environ.items() if name.startswith(NEWER)}
        outs = [Path(directory, f"{rank}.pt") for rank in range(world_size)]
        logs = [Path(directory, f"{rank}.log") for rank in range(world_size)]
        processes = [
            CONTEXT.Process(
                target=_rank_main,
                args=(
                    function,
                    {**newer, **rank_environment(rank, world_size, port)},
                    str(logs[rank]),
                    str(outs[rank]),
                    args,
                ),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            text = "\n".join(f"--- rank {i}\n{log.read_text()[-4000:]}" for i, log in enumerate(logs) if log.exists())
            raise AssertionError(f"exit codes {codes}\n{text}")
        return [torch.load(out, weights_only=False) for out in outs]
