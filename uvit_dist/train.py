"""Training: build, resume, loop. Everything random is a function of (seed, purpose, epoch, sample id)."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uvit_dist import __version__, checkpoint, dist, preflight, storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import dump_config
from uvit_dist.data.batch import Batch
from uvit_dist.data.journal import Journal
from uvit_dist.data.loader import ShardLoader
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex
from uvit_dist.dist import Ranks
from uvit_dist.divergence import recover
from uvit_dist.engine import Engine, StepResult
from uvit_dist.errors import DataError
from uvit_dist.guard import Guard
from uvit_dist.loss import Example, LossByTime, Objective, Trace
from uvit_dist.metrics import MetricsLog, Progress
from uvit_dist.models.uvit import UViT
from uvit_dist.preemption import StopFlag
from uvit_dist.validation import Validation
from uvit_dist.weights import adapt, check_same_noise, load_weights

log = logging.getLogger(__name__)


def train(config: Config, ranks: Ranks, stop: StopFlag) -> bool:
    """Train to ``train.steps`` updates, from the newest whole checkpoint if there is one. Called on every rank.

    Returns whether training is complete: False where the stop flag came first and the state was saved.
    Raises ``UserError`` of the right kind.
    """
    index, held_out = dist.on_main(ranks, lambda: preflight.check_training(config, ranks.world_size))
    plan = preflight.make_plan(config, index)
    engine = Engine(initial_network(config, ranks), config, ranks)
    journal, guard = resume(engine, config, index, ranks)
    loader = open_loader(config, index, plan, ranks, engine.step, journal)
    objective = Objective(config, preflight.empty_context(index))
    validation = Validation(config, held_out, objective, ranks) if held_out is not None else None
    report = Report(config, ranks, engine.step)
    saved_at = engine.step

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        example = objective.example(batch)
        losses = objective.losses(net, example)
        report.after_forward(batch.ids, example, losses, objective)
        return losses.mean()

    def save() -> int:
        manifest = make_manifest(engine.step, engine.shapes, plan, config, index, loader.journal, guard)
        checkpoint.save(config.run_dir, engine.local_state(), manifest, ranks, config.checkpoint.keep)
        return engine.step

    stopped = False
    while engine.step < config.train.steps and not stopped:
        with report.waiting():
            batch = next(loader)
        flags = (stop.raised, bool(batch.damage))
        result = engine.train_step(list(micro_batches(batch, config, ranks.device)), loss_of, guard.admits, flags)
        stopped, damaged = result.flags
        if damaged:
            loader.adopt(agreed(loader.journal, batch, config, index))
        if not result.applied:
            guard = recover(engine, loader, guard, batch, result)
            saved_at = min(saved_at, engine.step)
            report.forget(engine.step)
            continue
        guard = guard.applied(result.loss)
        told = {}
        if validation is not None and validation.due(engine.step) and not stopped:
            with report.aside():
                told = validation.run(engine)
        report.after_step(engine.step, batch.epoch, result, told)
        if engine.step % config.checkpoint.every == 0:
            saved_at = save()
    if saved_at != engine.step:
        save()
    loader.close()
    report.close()
    complete = engine.step >= config.train.steps
    if complete and ranks.is_main:
        checkpoint.export_weights(config.run_dir, Path(config.run_dir, "ema.safetensors"), "ema")
    log.info("%s after step %d", "complete" if complete else "stopped, and saved,", engine.step)
    return complete


def open_loader(
    config: Config, index: ShardIndex, plan: Plan, ranks: Ranks, step: int, journal: Journal
) -> ShardLoader:
    """This rank's batches from the update number ``step`` on."""
    data = config.data
    return ShardLoader(
        index, plan, ranks.rank, ranks.world_size, step, data.read_threads, data.prefetch_blocks, journal
    )


def agreed(journal: Journal, batch: Batch, config: Config, index: ShardIndex) -> Journal:
    """The journal after a step in which some rank found damage, equal on all. A collective call.

    Raises ``DataError`` on every rank where more shards are damaged than ``data.quarantine_limit`` allows.
    """
    told = dist.gather((batch.damage, batch.substitutes))
    found = [damage for damages, _ in told for damage in damages]
    for name, reason in sorted({(damage.name, damage.reason) for damage in found}):
        log.warning("%s: %s; substitutes stand in for it", name, reason)
    journal = journal.after(batch.step, found, [used for _, substitutes in told for used in substitutes])
    journal.check_budget(len(index.shards), config.data.quarantine_limit, storage.parent(index.path))
    return journal


def initial_network(config: Config, ranks: Ranks) -> UViT:
    """The network as a run begins: initialised from the seed, or from ``train.init_from``. A collective call.

    Raises ``UserError`` of the right kind where those weights cannot be had or do not fit.
    """
    torch.manual_seed(config.seed)
    net = UViT(**config.model.model_dump())
    path = config.train.init_from
    if path is None:
        return net
    if dist.on_main(ranks, lambda: checkpoint.any_checkpoint(config.run_dir)):
        log.info("train.init_from %s is not used: the run has a checkpoint", path)
        return net
    dist.on_main(ranks, lambda: load_weights(path).step)  # read in full and checked by one rank, for all
    weights = load_weights(path, verify="size")
    check_same_noise(weights, config)
    net.load_state_dict(adapt(weights, net, config.diffusion.null_label))
    log.info("starting from the %s weights of step %d of %s", weights.kind, weights.step, weights.origin)
    return net


def micro_batches(batch: Batch, config: Config, device: torch.device) -> Iterator[Batch]:
    """A rank's batch in pieces of ``train.micro_batch_size``, on the device."""
    size = config.train.micro_batch_size
    return (batch.to(device, slice(first, first + size)) for first in range(0, len(batch.ids), size))


def make_manifest(
    step: int,
    shapes: Mapping[str, Sequence[int]],
    plan: Plan,
    config: Config,
    index: ShardIndex,
    journal: Journal,
    guard: Guard,
) -> dict[str, Any]:
    """What a checkpoint says of itself: the state beside the tensors, and what a resumed run must agree with.

    step: updates made; shapes: of the parameters, by name.
    """
    epoch, step_in_epoch = plan.position(journal.plan_step(step))
    return {
        "step": step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "samples_seen": step * config.train.global_batch_size,
        "must_agree": must_agree(config, index),
        "journal": journal.to_dict(),
        "guard": guard.to_dict(),
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
    """Load the newest whole checkpoint into the engine, if the run has one. A collective call.

    Returns its journal and guard.

    The configuration becomes the run's ``config.yaml`` only once it is accepted; what it changes is logged.
    Raises ``CheckpointError`` where there are checkpoints and none is whole, ``DataError`` where the configuration
    differs from the checkpoint's in what decides the order of samples or the meaning of the weights.
    """

    def choose() -> Path | None:
        path = checkpoint.newest_whole(config.run_dir, config.checkpoint.verify)
        if path is not None:
            manifest = json.loads((path / checkpoint.MANIFEST).read_text())
            saved = manifest["must_agree"]
            ours = must_agree(config, index)
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
            checkpoint.set_aside_newer(path)
        storage.write_bytes(storage.join(config.run_dir, "config.yaml"), dump_config(config).encode())
        return path

    path = dist.on_main(ranks, choose)
    if path is None:
        log.info("%s holds no checkpoint: this is step 0", config.run_dir)
        return Journal(), Guard(config.guard)
    reader = checkpoint.CheckpointReader(path)
    engine.load_state(reader.read, reader.manifest["step"])
    log.info("resumed from %s", path)
    journal = Journal.from_dict(reader.manifest["journal"])
    for shard in journal.quarantined_shards:
        log.warning("%s is in quarantine from the data of step %d on: %s", shard.name, shard.from_step, shard.reason)
    return journal, Guard.from_dict(config.guard, reader.manifest.get("guard", {}))


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """The values that differ between two dumped configurations, each with its full key."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            yield from _changes(before.get(name), now[name], f"{key}.{name}" if key else name)
    elif before != now:
        yield f"{key} from {before} to {now}"


class Report:
    """Metrics, progress and trace of the loop; only rank 0 writes."""

    def __init__(self, config: Config, ranks: Ranks, first_step: int) -> None:
        self.config, self.ranks = config, ranks
        self.trace = Trace() if config.train.trace else None
        self._by_time = LossByTime(config.train.timestep_bins, ranks.device)
        self._metrics = MetricsLog(config.run_dir, config.model_dump(mode="json")) if ranks.is_main else None
        self._progress = Progress(first_step, config.train.steps, ranks.is_main)
        self._step, self._losses = first_step, list[float]()
        self._places: list[tuple[Tensor, Tensor]] = []
        self._since, self._waited = time.monotonic(), 0.0
        self._read = storage.COUNTS.snapshot()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside is not counted as training."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is time waited for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def after_forward(self, ids: Tensor, example: Example, losses: Tensor, objective: Objective) -> None:
        """Note a micro-batch: its ids (B,), what the network was asked, and the losses (B,)."""
        if self._by_time.bins:
            self._places.append((losses.detach(), objective.schedule.elapsed(example.time)))
        if self.trace is not None:
            self.trace.add(ids, example)

    def forget(self, step: int) -> None:
        """Note that the last step was not applied, and where the run has gone back to ``step``, all since the record.

        step: updates made.
        """
        self._places.clear()
        if self.trace is not None:
            self.trace.rows = []
        if step < self._step:
            self._by_time.take(lambda sums: sums)
            self._losses, self._since, self._waited = [], time.monotonic(), 0.0
            self._step = step

    def after_step(self, step: int, epoch: int, result: StepResult, validation: dict[str, Any]) -> None:
        """Note an update; every ``train.log_every`` of them, and after a validation, one record is written.

        step: updates made. A collective call.
        """
        self._step = step
        self._losses.append(result.loss)
        for losses, places in self._places:
            self._by_time.add(losses, places)
        self._places.clear()
        record = None
        if step % self.config.train.log_every == 0 or step == self.config.train.steps or validation:
            now = time.monotonic()
            batch = self.config.train.global_batch_size
            record = {
                "step": step,
                "epoch": epoch,
                "samples_seen": step * batch,
                "loss": sum(self._losses) / len(self._losses),
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "images_per_s": len(self._losses) * batch / (now - self._since),
                **self._data_record(now - self._since),
                "time": time.time(),
                **validation,
            }
            if self._by_time.bins:
                record["loss_by_timestep"] = self._by_time.take(dist.sum_)
            self._losses, self._since, self._waited = [], now, 0.0
            if self._metrics is not None:
                self._metrics.write(record)
        self._progress.update(step, record)
        if self.trace is not None:
            self._write_trace(step, self.trace)

    def _data_record(self, elapsed_s: float) -> dict[str, float]:
        """How the data came since the last record: sums over all ranks, the wait the mean of a rank's step."""
        before, now = self._read, storage.COUNTS.snapshot()
        self._read = now
        names = ("requests", "bytes", "retries", "cache_hits", "cache_misses")
        counts = [float(getattr(now, name) - getattr(before, name)) for name in names]
        waited, *total = dist.sum_(torch.tensor([self._waited, *counts], dtype=torch.float64, device=self.ranks.device))
        record = {f"data_{name}": float(value) for name, value in zip(names, total, strict=True)}
        return {
            "data_wait_s": float(waited) / self.ranks.world_size / len(self._losses),
            "data_bytes_per_s": record.pop("data_bytes") / elapsed_s,
            **record,
        }

    def _write_trace(self, step: int, trace: Trace) -> None:
        rows = [row for rank_rows in dist.gather(trace.rows) for row in rank_rows]
        trace.rows = []
        if self.ranks.is_main:
            path = storage.join(self.config.run_dir, "trace.jsonl")
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "samples": rows}) + "\n")

    def close(self) -> None:
        """Close the files and the bar."""
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()
