"""The loss on held-out samples, each at a noise and a time of its own that never change: the health of a run."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uvit_dist import dist, watchdog
from uvit_dist.config import Config
from uvit_dist.data.batch import Batch
from uvit_dist.data.plan import held_out_ids
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import ShardIndex
from uvit_dist.dist import Ranks
from uvit_dist.engine import Engine
from uvit_dist.loss import LossByTime, Objective

log = logging.getLogger(__name__)


class Validation:
    """Held-out samples of an index, dealt to the ranks in batches of a fixed size, kept in host memory.

    Which samples, their noise and times depend on the seed and the index alone.
    """

    def __init__(self, config: Config, index: ShardIndex, objective: Objective, ranks: Ranks) -> None:
        assert config.validation is not None
        self._objective, self._ranks = objective, ranks
        self._bins, self._every = config.train.timestep_bins, config.validation.every
        count = min(config.validation.samples, index.provenance.samples)
        ids = held_out_ids(index.provenance.samples, count, config.seed)
        size = config.validation.batch_size
        log.info("validation on %d of the %d samples of %s", count, index.provenance.samples, index.path)
        batches = [ids[first : first + size] for first in range(0, count, size)]
        rounds = -(-len(batches) // ranks.world_size)
        reader = SampleReader(index, config.seed, "held_out_caption")
        # Under ZeRO-3 every rank must call the network equally often: those without a batch repeat the last one.
        self._mine = [
            (number < len(batches), reader.read_ids(batches[min(number, len(batches) - 1)]))
            for number in (turn * ranks.world_size + ranks.rank for turn in range(rounds))
        ]

    def due(self, step: int) -> bool:
        """Whether it is asked for after so many updates."""
        return step % self._every == 0

    def run(self, engine: Engine) -> dict[str, Any]:
        """Mean loss (a scalar) and loss by timestep, of the EMA and of the weights in training. A collective call."""
        with engine.ema_weights():
            ema, by_time = self._losses(engine)
        weights, _ = self._losses(engine)
        record: dict[str, Any] = {"validation_loss": ema, "validation_loss_weights": weights}
        return record if not self._bins else {**record, "validation_loss_by_timestep": by_time}

    def _losses(self, engine: Engine) -> tuple[float, list[float | None]]:
        by_time = LossByTime(self._bins, self._ranks.device)
        total = torch.zeros(2, dtype=torch.float64, device=self._ranks.device)
        for counts, batch in self._mine:
            watchdog.progress("validating")
            losses, elapsed = engine.forward_only(partial(self._batch, batch))
            if counts:
                by_time.add(losses, elapsed)
                total += torch.stack([losses.double().sum(), total.new_tensor(float(len(losses)))])
        loss, samples = dist.sum_(total).tolist()
        return loss / samples, by_time.take(dist.sum_)

    def _batch(self, batch: Batch, net: nn.Module) -> tuple[Tensor, Tensor]:
        example = self._objective.example(batch.to(self._ranks.device), held_out=True)
        return self._objective.losses(net, example), self._objective.schedule.elapsed(example.time)
