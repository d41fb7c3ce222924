"""What the ranks of the tests run: the real jobs, with real faults at chosen places."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from uvit_dist import dist, metrics, storage
from uvit_dist import train as train_module
from uvit_dist.config import Config
from uvit_dist.data.batch import Batch
from uvit_dist.errors import UserError
from uvit_dist.loss import Objective
from uvit_dist.preemption import StopFlag
from uvit_dist.train import Report, train


def _before(owner: Any, name: str, condition: Callable[..., bool], action: Callable[[], None]) -> None:
    """Do ``action`` before the call of ``owner.name`` for which the condition holds."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if condition(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def scale_losses(rank: int, factors: Mapping[int, float], on_rank: int | None) -> None:
    """Multiply the losses of steps of the plan, on one rank or on all."""
    batches, losses, step = train_module.micro_batches, Objective.losses, -1

    def micro_batches(batch: Batch, *args: Any) -> Any:
        nonlocal step
        step = batch.step
        return batches(batch, *args)

    def scaled(*args: Any) -> Any:
        return losses(*args) * (factors.get(step, 1.0) if on_rank in (rank, None) else 1.0)

    train_module.micro_batches = micro_batches
    Objective.losses = scaled  # type: ignore[method-assign]


def skip_from_the_start(first: int, last: int) -> None:
    """Leave steps of the plan out of the run from its beginning."""
    resume = train_module.resume

    def resume_skipping(*args: Any) -> Any:
        journal, *others = resume(*args)
        return journal.skipping(first, last), *others

    train_module.resume = resume_skipping


def train_job(
    config: Config,
    fault: str = "none",
    factors: Mapping[int, float] | None = None,
    on_rank: int | None = None,
    skipping: tuple[int, int] | None = None,
) -> str:
    """Train as a worker does. Returns how it ended.

    fault: what happens to this rank; factors: of the losses of steps of the plan, on the rank ``on_rank`` or on all;
    skipping: steps of the plan that are left out from the start.
    """
    ranks = dist.ranks_from_environment()
    if factors is not None:
        scale_losses(ranks.rank, factors, on_rank)
    if skipping is not None:
        skip_from_the_start(*skipping)

    def end(number: int) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), number)

    killed = fault.removeprefix("kill one rank after step ")
    if killed != fault and ranks.rank == 1:
        _before(Report, "after_step", lambda _, step, *__: step == int(killed), end(signal.SIGKILL))
    if fault == "kill all ranks as the checkpoint of step 10 is committed":
        _before(storage, "write_bytes", lambda path, _: path.endswith("manifest.json") and "00000010" in path,
                end(signal.SIGKILL))  # fmt: skip
    if fault == "SIGTERM to one rank in step 7" and ranks.rank == 1:
        _before(Report, "after_step", lambda _, step, *__: step == 6, end(signal.SIGTERM))
    metrics.set_up_logging(config.run_dir, ranks)
    storage.configure(config.storage)
    dist.start(ranks, 60)
    try:
        complete = train(config, ranks, StopFlag())
    except UserError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    dist.stop()
    return "complete" if complete else "stopped"


def evaluate_job(config: Config, fault: str = "none") -> Any:
    """Evaluate as a worker does, on a node of its own. fault: where this one is killed."""
    from uvit_dist import work
    from uvit_dist.evaluate import evaluate

    ranks, stored = dist.ranks_from_environment(), list[str]()
    ours = work._this_process
    work._this_process = lambda: {**ours(), "machine": f"node {ranks.rank}"}

    def first(what: str) -> bool:
        return storage.create(f"{config.run_dir}/killed {what}", b"{}")

    faults: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "before it stores its second chunk": (
            work.SharedWork, "put", lambda _, unit, __: stored.append(unit) or len(stored) > 1
        ),
        "the first that stores chunk 2": (
            work.SharedWork, "put", lambda _, unit, __: unit == "chunk-000002" and first("chunk")
        ),
        "the first that writes scores": (
            storage, "write_bytes", lambda path, _: path.endswith("scores-60.json") and first("scores")
        ),
    }  # fmt: skip
    if fault != "none":
        _before(*faults[fault], lambda: os.kill(os.getpid(), signal.SIGKILL))
    storage.configure(config.storage)
    try:
        return evaluate(config, ranks)
    except UserError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"


def loaded_state(config: Config) -> dict[str, Any]:
    """What this rank's engine holds of the state after it was resumed: "kind/name/start" → flat tensor (n,)."""
    from uvit_dist import preflight
    from uvit_dist.engine import Engine
    from uvit_dist.resuming import resume
    from uvit_dist.train import initial_network

    ranks = dist.ranks_from_environment()
    dist.start(ranks, 60)
    index, _ = preflight.check_training(config, ranks.world_size)
    engine = Engine(initial_network(config, ranks), config, ranks)
    resume(engine, config, index, ranks)
    state = {key: value.clone() for key, value in engine.local_state().items()}
    dist.stop()
    return state
