"""Training: build, resume, loop. Everything random is a function of (seed, purpose, epoch, sample id)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from uvit_dist import checkpoint, dist, preflight, storage, watchdog
from uvit_dist.acceleration import on_device
from uvit_dist.attribution import Attribution
from uvit_dist.config import Config
from uvit_dist.config_rules import micro_batch_size
from uvit_dist.copier import Copier
from uvit_dist.data.batch import Batch
from uvit_dist.data.journal import Journal
from uvit_dist.data.loader import ShardLoader
from uvit_dist.data.plan import Plan
from uvit_dist.data.shards import ShardIndex
from uvit_dist.dist import Ranks
from uvit_dist.divergence import recover
from uvit_dist.engine import Engine, StepResult
from uvit_dist.export_weights import export_weights
from uvit_dist.loss import Example, LossByTime, Objective, Trace
from uvit_dist.metrics import JsonLines, MetricsLog, Progress
from uvit_dist.models.uvit import UViT
from uvit_dist.preemption import StopFlag
from uvit_dist.profile_summary import DATA
from uvit_dist.profiling import StepProfiler
from uvit_dist.resuming import State, make_manifest, resume
from uvit_dist.saving import Saver
from uvit_dist.utilisation import peak_tflops, utilisation
from uvit_dist.validation import Validation
from uvit_dist.weights import adapt, check_same_noise, load_weights

log = logging.getLogger(__name__)


def train(config: Config, ranks: Ranks, stop: StopFlag) -> bool:
    """Train to ``train.steps`` updates, from the newest whole checkpoint if there is one. Called on every rank.

    Returns whether training is complete: False where the stop flag came first and the state was saved.
    Raises ``UserError`` of the right kind.
    """
    watchdog.progress(watchdog.PREPARING)
    index, held_out = dist.on_main(ranks, lambda: preflight.check_training(config, ranks.world_size))
    plan = preflight.make_plan(config, index)
    engine = Engine(initial_network(config, ranks), config, ranks)
    journal, guard = resume(engine, config, index, ranks)
    loader = open_loader(config, index, plan, ranks, engine.step, journal)
    objective = Objective(config, preflight.empty_context(index))
    validation = Validation(config, held_out, objective, ranks) if held_out is not None else None
    report, copier = Report(config, ranks, engine.step), open_copier(config, ranks)
    attribution = Attribution(config, engine, objective, ranks, report.forget)
    saver = Saver(config.run_dir, config.checkpoint, ranks, engine.step, copier)

    def loss_of(net: nn.Module, batch: Batch) -> Tensor:
        example = objective.example(batch)
        losses = objective.losses(net, example)
        report.after_forward(batch.ids, example, losses, objective)
        return losses.mean()

    def save() -> None:
        state = State(engine.step, loader.journal, guard, told.get("validation_loss"))
        saver.begin(engine.local_state(), make_manifest(state, engine.shapes, plan, config, index))

    stopped, told = False, dict[str, Any]()
    while engine.step < config.train.steps and not stopped:
        with report.waiting():
            batch = next(loader)
        flags = (stop.raised, bool(batch.damage), saver.busy)
        result = attribution.step(list(micro_batches(batch, config, ranks)), loss_of, guard.admits, flags)
        stopped, damaged, saving = result.flags
        saver.after_step(saving)
        if damaged:
            loader.adopt(agreed(loader.journal, batch, config, index))
        if not result.applied:
            saver.finish()
            guard = recover(engine, loader, guard, batch, result)
            saver.saved = min(saver.saved, engine.step)
            report.forget(engine.step)
            continue
        guard, told = guard.applied(result.loss), {}
        if validation is not None and validation.due(engine.step) and not stopped:
            with report.aside():
                told = validation.run(engine)
        report.after_step(engine.step, batch.epoch, result, told)
        if engine.step % config.checkpoint.every == 0:
            save()
    if saver.saved != engine.step:
        save()
    complete = engine.step >= config.train.steps
    end(saver, copier, loader, report, complete)
    if complete and ranks.is_main:
        export_weights(config.run_dir, Path(config.run_dir, "ema.safetensors"), "ema")
    log.info("%s after step %d", "complete" if complete else "stopped, and saved,", engine.step)
    return complete


def open_copier(config: Config, ranks: Ranks) -> Copier | None:
    """What copies checkpoints to their second home, on rank 0, where there is one.

    At home stay the newest ``checkpoint.keep`` and what the run keeps here.
    """
    home = config.checkpoint.copy_to
    if home is None or not ranks.is_main:
        return None
    parent = checkpoint.checkpoints_dir(config.run_dir)

    def choose(names: list[str]) -> list[str]:
        return [*names[: config.checkpoint.keep], *(name for name in names if (parent / name).exists())]

    return Copier(home, choose)


def end(saver: Saver, copier: Copier | None, loader: ShardLoader, report: Report, complete: bool) -> None:
    """Wait for the last save, and, if the training is complete, for its copy. A collective call.

    Raises ``OutputError`` on every rank where it cannot be written.
    """
    watchdog.progress("saving", saver.saved)
    saver.finish(must_succeed=True)
    saver.close()
    loader.close()
    report.close()
    if copier is not None:
        watchdog.progress(watchdog.COPYING)
        copier.close(wait=complete)
    watchdog.progress("exporting")


def open_loader(
    config: Config, index: ShardIndex, plan: Plan, ranks: Ranks, step: int, journal: Journal
) -> ShardLoader:
    """This rank's batches from the update number ``step`` on."""
    data, pinned = config.data, config.speed.prefetch and ranks.device.type == "cuda"
    return ShardLoader(
        index, plan, ranks.rank, ranks.world_size, step, data.read_threads, data.prefetch_blocks, journal, pinned
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


def micro_batches(batch: Batch, config: Config, ranks: Ranks) -> Iterator[Batch]:
    """A rank's batch in micro-batches, on the device."""
    size = micro_batch_size(config.train, ranks.world_size)
    batch = on_device(batch, ranks.device, config.speed.prefetch)
    return (batch.to(ranks.device, slice(first, first + size)) for first in range(0, len(batch.ids), size))


class Report:
    """Metrics, progress, trace and profile of the loop; all but profiles are written by rank 0 alone."""

    def __init__(self, config: Config, ranks: Ranks, first_step: int) -> None:
        self.config, self.ranks = config, ranks
        self.trace = Trace() if config.train.trace else None
        self._by_time = LossByTime(config.train.timestep_bins, ranks.device)
        self._metrics = MetricsLog(config.run_dir, config.model_dump(mode="json")) if ranks.is_main else None
        self._progress = Progress(first_step, config.train.steps, ranks.is_main)
        self._traces: JsonLines | None = None
        self._step, self._losses = first_step, list[float]()
        self._places: list[tuple[Tensor, Tensor]] = []
        self._since, self._waited, self._begun = time.monotonic(), 0.0, False
        self._read = storage.COUNTS.snapshot()
        self._profiler = StepProfiler(config.profile, config.run_dir, ranks)
        gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
        self._peak_tflops = config.speed.peak_tflops or peak_tflops(gpu)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent inside, on a validation, is not counted as training."""
        watchdog.progress("validating")
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A step begins; time spent inside is time waited for data."""
        self._profiler.begin(self._step)
        start = time.monotonic()
        watchdog.progress("reading" if self._begun else watchdog.FIRST_STEP, self._step)
        with record_function(DATA):
            yield
        watchdog.progress("training" if self._begun else watchdog.FIRST_STEP)
        self._waited, self._begun = self._waited + time.monotonic() - start, True

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
        self._end_of_profiled(step)
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
            images_per_s = len(self._losses) * batch / (now - self._since)
            record = {
                "step": step,
                "epoch": epoch,
                "samples_seen": step * batch,
                "loss": sum(self._losses) / len(self._losses),
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "images_per_s": images_per_s,
                **utilisation(self.config.model, images_per_s, self.ranks.world_size, self._peak_tflops),
                **self._memory_record(),
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
        self._end_of_profiled(step)

    def _end_of_profiled(self, step: int) -> None:
        """The step is over; time for writing a profile is not counted as training."""
        start = time.monotonic()
        self._profiler.end(step)
        self._since += time.monotonic() - start

    def _memory_record(self) -> dict[str, float]:
        """The most that torch had allocated on this rank's GPU since the last record, 10^9 bytes."""
        if self.ranks.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.ranks.device)
        torch.cuda.reset_peak_memory_stats(self.ranks.device)
        return {"memory_gb": peak / 1e9}

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
            if self._traces is None:
                self._traces = JsonLines(Path(self.config.run_dir, "trace.jsonl"))
            self._traces.write({"step": step, "samples": rows})

    def close(self) -> None:
        """Close the files and the bar."""
        self._progress.close()
        self._profiler.close()
        if self._traces is not None:
            self._traces.close()
        if self._metrics is not None:
            self._metrics.close()
