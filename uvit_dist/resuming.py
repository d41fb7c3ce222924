"""What a checkpoint says of a run beside its tensors, and going on from one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uvit_dist import __version__, checkpoint, dist, second_home, storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import dump_config
from uvit_dist.data.journal import Journal
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex
from uvit_dist.dist import Ranks
from uvit_dist.engine import Engine
from uvit_dist.errors import CheckpointError, DataError
from uvit_dist.guard import Guard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """The state of a run beside its tensors. step: updates made; validation_loss: if measured after just this step."""

    step: int
    journal: Journal
    guard: Guard
    validation_loss: float | None = None


def make_manifest(
    state: State, shapes: Mapping[str, Sequence[int]], plan: Plan, config: Config, index: ShardIndex
) -> dict[str, Any]:
    """What a checkpoint says of itself: the state beside the tensors, and what a resumed run must agree with.

    shapes: of the parameters, by name.
    """
    epoch, step_in_epoch = plan.position(state.journal.plan_step(state.step))
    return {
        "step": state.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "samples_seen": state.step * config.train.global_batch_size,
        "must_agree": must_agree(config, index),
        "journal": state.journal.to_dict(),
        "guard": state.guard.to_dict(),
        "validation_loss": state.validation_loss,
        "zero_stage": config.zero.stage,
        "config": config.model_dump(mode="json"),
        "text_encoder": index.provenance.text.encoder_fingerprint if index.provenance.text else None,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "versions": {"uvit_dist": __version__, "torch": torch.__version__},
    }


def must_agree(config: Config, index: ShardIndex) -> dict[str, Any]:
    """What a resumed run must agree with: what decides the order of samples and the meaning of the weights."""
    return {
        "sha256 of data.index": index.sha256,
        "seed": config.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "data.lanes": config.data.lanes,
        "data.block_size": config.data.block_size,
        # how activations are recomputed is no part of what the weights mean
        "model": config.model.model_dump(mode="json", exclude={"use_checkpoint"}),
        "diffusion": config.diffusion.model_dump(mode="json"),
        "data.mirror": config.data.mirror,
        "autoencoder.scale_factor": config.autoencoder.scale_factor if config.autoencoder else None,
    }


def resume(engine: Engine, config: Config, index: ShardIndex, ranks: Ranks) -> tuple[Journal, Guard]:
    """Load the newest whole checkpoint into the engine, if the run or its second home has one. A collective call.

    Returns its journal and guard. The configuration becomes the run's ``config.yaml`` only once
    it is accepted; what it changes is logged. Raises ``CheckpointError`` where there are checkpoints and none is whole,
    ``DataError`` where the configuration differs from the checkpoint's in what decides the order of samples or the
    meaning of the weights.
    """

    def choose() -> Path | None:
        checkpoint.clean(config.run_dir)
        path = _newest(config)
        if path is not None:
            _check_agreement(path, config, index)
            checkpoint.set_aside_newer(path)
        storage.write_bytes(storage.join(config.run_dir, "config.yaml"), dump_config(config).encode())
        return path

    path = dist.on_main_for_long(ranks, choose)  # hashes every byte, or brings it from its second home
    if path is None:
        log.info("%s holds no checkpoint: this is step 0", config.run_dir)
        return Journal(), Guard(config.guard)
    reader = checkpoint.open_on_all(path, ranks)
    engine.load_state(reader.read, reader.manifest["step"])
    log.info("resumed from %s", path)
    journal = Journal.from_dict(reader.manifest["journal"])
    for shard in journal.quarantined_shards:
        log.warning("%s is in quarantine from the data of step %d on: %s", shard.name, shard.from_step, shard.reason)
    return journal, Guard.from_dict(config.guard, reader.manifest.get("guard", {}))


def _newest(config: Config) -> Path | None:
    """The newest whole checkpoint, brought back from its second home where the run has none that is as new."""
    run_dir, verify, home = config.run_dir, config.checkpoint.verify, config.checkpoint.copy_to
    damaged, path = None, None
    try:
        path = checkpoint.newest_whole(run_dir, verify)
    except CheckpointError as error:
        if home is None:
            raise
        damaged = error
    if home is not None:
        there = second_home.names_at(home)
        if there and (path is None or there[0] > path.name):
            try:
                path = second_home.bring_back(home, run_dir, newer_than=path.name if path else "") or path
            except CheckpointError as error:
                if path is None:
                    raise
                log.warning("%s", error)
    if path is None and damaged is not None:
        raise damaged
    return path


def _check_agreement(path: Path, config: Config, index: ShardIndex) -> None:
    """Raises ``DataError`` where a checkpoint cannot be resumed with a configuration; logs what else has changed."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    saved, ours = manifest["must_agree"], must_agree(config, index)
    wrong = [
        f"{key}: the checkpoint says {saved.get(key)}, this run {ours[key]}"
        for key in ours
        if saved.get(key) != ours[key]
    ]
    if wrong:
        raise DataError(
            f"{path} cannot be resumed with this configuration:\n  "
            + "\n  ".join(wrong)
            + "\nSet these back, or use another run_dir to start anew."
        )
    for change in _changes(manifest["config"], config.model_dump(mode="json")):
        log.info("changed since the checkpoint: %s", change)


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """The values that differ between two dumped configurations, each with its full key."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            yield from _changes(before.get(name), now[name], f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key} from {before} to {now}"
