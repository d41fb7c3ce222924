"""What follows a step that the guard did not admit: its data are passed over, if need be from the last checkpoint on.

A rollback leaves no trace on disk that a resumed run would need: killed before its next checkpoint, the run starts from
the same one, meets the same data, and does the same again.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from uvit_dist import checkpoint, dist, storage, watchdog
from uvit_dist.data.batch import Batch
from uvit_dist.data.journal import Journal
from uvit_dist.data.loader import ShardLoader
from uvit_dist.engine import Engine, StepResult
from uvit_dist.errors import NumericalError
from uvit_dist.guard import Guard, Verdict

REMEDY = (
    "See whether these samples are in order. Start again from the last checkpoint with a lower optimizer.lr, "
    "optimizer.clip_grad_norm set, or train.precision fp32; or raise guard.skip_nonfinite (for what is not finite) or "
    "guard.rollbacks, to pass over such data."
)
log = logging.getLogger(__name__)


def recover(engine: Engine, loader: ShardLoader, guard: Guard, batch: Batch, result: StepResult) -> Guard:
    """Skip the step, or go back to the last checkpoint and leave out its data up to this step's. A collective call.

    Engine and loader are then ready for the next step; ``engine.step`` has gone back where the run has. No save may be
    under way. Returns the guard to go on with.
    Raises ``NumericalError`` on every rank where no rollback is left, or nothing to go back to; ``CheckpointError``
    where there are checkpoints and none is whole.
    """
    if guard.judge(result.loss, result.grad_norm) is Verdict.SKIP:
        log.warning("step %d: %s; skipped, with step %d of the data", engine.step, _numbers(result), batch.step)
        loader.adopt(loader.journal.skipping(batch.step, batch.step), engine.step)
        return guard.passed_over()
    run_dir, verify = engine.config.run_dir, engine.config.checkpoint.verify
    left = guard.rules.rollbacks - guard.rollbacks
    path: Path | None = None
    if left > 0:
        path = dist.on_main(engine.ranks, lambda: _last_whole(run_dir, verify))
    if path is None:
        why = f"no rollback is left of guard.rollbacks {guard.rules.rollbacks}" if left <= 0 else "no checkpoint yet"
        raise NumericalError(f"{report(engine, batch, result, guard, f'ended: {why}')} {REMEDY}")
    reader = checkpoint.open_on_all(path, engine.ranks)
    first = Journal.from_dict(reader.manifest["journal"]).plan_step(reader.manifest["step"])
    action = f"back to {path.name}, steps {first}…{batch.step} of the data are left out, rollbacks left: {left - 1}"
    log.warning("%s", report(engine, batch, result, guard, action))
    watchdog.progress(watchdog.PREPARING)
    engine.load_state(reader.read, reader.manifest["step"])
    loader.adopt(loader.journal.skipping(first, batch.step), engine.step)
    return guard.gone_back(reader.manifest.get("guard", {}))


def _last_whole(run_dir: str, verify: str) -> Path | None:
    path = checkpoint.newest_whole(run_dir, verify)
    if path is not None:
        checkpoint.set_aside_newer(path)
    return path


def report(engine: Engine, batch: Batch, result: StepResult, guard: Guard, action: str) -> str:
    """Write who had what to ``divergence-step-…-plan-….json`` in the run directory. A collective call.

    Returns the same in words. Losses are those of each rank's part; the gradient is known as the mean of all alone.
    """
    told = dist.gather((result.own_loss, batch.ids.tolist()))
    losses = [loss for loss, _ in told]
    # the first whose loss is not finite, or else the greatest
    worst = max(range(len(losses)), key=lambda rank: losses[rank] if math.isfinite(losses[rank]) else math.inf)
    path = storage.join(engine.config.run_dir, f"divergence-step-{engine.step:08d}-plan-{batch.step:08d}.json")
    record = {
        "step": engine.step,
        "epoch": batch.epoch,
        "plan_step": batch.step,
        "loss": _json(result.loss),
        "grad_norm": _json(result.grad_norm),
        "limit": _json(guard.limit),
        "ranks": [{"rank": rank, "loss": _json(loss), "ids": ids} for rank, (loss, ids) in enumerate(told)],
        "worst_rank": worst,
        "guard": guard.to_dict(),
        "action": action,
    }
    dist.on_main(engine.ranks, lambda: storage.write_bytes(path, json.dumps(record, indent=1).encode()))
    listed = ", ".join(map(str, told[worst][1][:8])) + (", …" if len(told[worst][1]) > 8 else "")
    return (
        f"step {engine.step}: {_numbers(result)}{_rule(result, guard)}; the update was not made. Step {batch.step} of "
        f"the data, epoch {batch.epoch}; worst is rank {worst}, loss {losses[worst]:g}, samples {listed}; "
        f"all are in {path}. {action[0].upper()}{action[1:]}."
    )


def _numbers(result: StepResult) -> str:
    return f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"


def _rule(result: StepResult, guard: Guard) -> str:
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        return f": not finite, after {guard.skipped} skipped in a row" if guard.skipped else ": not finite"
    return f": above {guard.limit:g}, the mean of the last {len(guard.losses)} losses and guard.spike deviations"


def _json(number: float) -> Any:
    """JSON has no infinity and no NaN."""
    return number if math.isfinite(number) else str(number)
