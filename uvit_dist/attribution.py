"""Whose fault a bad step is, asked between its passes and its update: hardware's, or that of data and optimization.

A step is a pure function of weights and batch (``train.deterministic``). So a suspicious one is computed again: another
result on a rank is its hardware's fault, and the step is done again; the same result is the data's or the
optimization's, and the samples are named. Weights that all ranks share are compared by checksums. What is found goes to
the logs and to ``health.jsonl``. All ranks judge by the same numbers, and so alike.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uvit_dist import dist, faults, health, watchdog
from uvit_dist.checksums import flip_bit
from uvit_dist.config import Config
from uvit_dist.data.batch import Batch
from uvit_dist.dist import Ranks
from uvit_dist.engine import Engine, StepResult
from uvit_dist.errors import HardwareError
from uvit_dist.loss import Objective
from uvit_dist.replay import MANTISSA_BIT, at_fault
from uvit_dist.stragglers import Stragglers

OUTLIER = 10.0
"""A sample whose loss, or greatest datum, is so many times the median sample's stands out."""
NAMED = 8
"""Samples that are named where none stands out."""
Sample = tuple[int, float, float]
"""Id, loss, and the greatest absolute value of its data."""
log = logging.getLogger(__name__)


class Attribution:
    """Watches over the steps of a run. on_repeat: called with the updates made where a step is done again."""

    def __init__(
        self, config: Config, engine: Engine, objective: Objective, ranks: Ranks, on_repeat: Callable[[int], None]
    ) -> None:
        self.rules, self._run_dir = config.attribution, config.run_dir
        self._engine, self._objective, self._ranks, self._on_repeat = engine, objective, ranks, on_repeat
        self._hosts: list[str] = dist.gather(watchdog.host_name())
        self._stragglers = Stragglers(config.stragglers, self._hosts)
        self._wrong: dict[str, int] = dist.on_main(ranks, lambda: health.disagreements(self._run_dir))
        self._last: deque[tuple[float, float]] = deque(maxlen=self.rules.window)
        self._repeat, self._compared = False, 0
        if self.rules.replay:
            engine.checks.watch()

    def step(
        self,
        micro_batches: Sequence[Batch],
        loss_of: Callable[[nn.Module, Batch], Tensor],
        admit: Callable[[float, float], bool],
        flags: Sequence[bool] = (),
    ) -> StepResult:
        """``Engine.train_step``, again and again as long as its results are found to be wrong. A collective call.

        Losses are scalars. Raises ``HardwareError`` on every rank, with those at fault.
        """

        def watched(net: nn.Module, batch: Batch) -> Tensor:
            faults.point("step:forward")
            return self._engine.checks.note(loss_of(net, batch))

        def judged(loss: float, grad_norm: float) -> bool:
            self._examine(micro_batches, loss, grad_norm)
            return not self._repeat and admit(loss, grad_norm)

        while True:
            if faults.point("step:weights"):
                flip_bit(self._engine.checks.weights()[0][0], MANTISSA_BIT)
            result = self._engine.train_step(micro_batches, watched, judged, flags)
            if not self._repeat:
                return result
            self._on_repeat(self._engine.step)

    def _examine(self, micro_batches: Sequence[Batch], loss: float, grad_norm: float) -> None:
        """Look at a step whose update is not made yet, and say whether it is to be repeated."""
        self._repeat = False
        number = self._engine.step + 1  # of the update
        if _due(self._stragglers.rules.every, number) and number != self._compared:  # not again when it is repeated
            self._compared = number
            self._look_for_stragglers()
        suspicion = self._suspicion(loss, grad_norm) if self.rules.replay else None
        if suspicion is not None or _due(self.rules.weights_every, number):
            self._compare_weights()
        if self.rules.replay:
            first = self._engine.checks.take()
            if not self._repeat and (suspicion is not None or _due(self.rules.replay_every, number)):
                self._replay(micro_batches, first, suspicion)
        if not self._repeat and math.isfinite(loss) and math.isfinite(grad_norm):
            self._last.append((loss, grad_norm))

    def _suspicion(self, loss: float, grad_norm: float) -> str | None:
        """Why a step is suspicious, or none."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:g}, gradient norm {grad_norm:g}"
        if len(self._last) < self.rules.window:
            return None
        columns: Iterator[tuple[float, ...]] = zip(*self._last, strict=True)
        for name, value, before in zip(("loss", "gradient norm"), (loss, grad_norm), columns, strict=True):
            limit = statistics.fmean(before) + self.rules.spike * statistics.pstdev(before)
            if value > limit:
                return f"{name} {value:g} above {limit:g}"
        return None

    # -- the ways of looking ------------------------------------------------------------------------------------------

    def _look_for_stragglers(self) -> None:
        times = dist.gather_number(self._engine.clock.take(), self._ranks.device)
        for rank, told in self._stragglers.hear(times).items():
            self._tell(health.STRAGGLER, told, [rank])

    def _compare_weights(self) -> None:
        """A rank's weights are not those of the others: brought back from the masters, where these are in order."""
        told = dist.gather(self._engine.checks.weight_sums())
        if not told[0][0]:
            return  # ZeRO-3: ranks have none in common
        ranks, sound = at_fault([copies for copies, _ in told], [master for _, master in told])
        if not ranks:
            return
        mended = sound and told[0][1] is not None
        what = "its weights are not those of the others" if sound else "its master weights are not what others got"
        if len(ranks) > 1 and not mended:
            what = "their weights differ, and nothing tells whose are right"
        self._blame(health.WEIGHTS, ranks, what, at_once=not mended)
        self._engine.refresh_weights()

    def _replay(self, micro_batches: Sequence[Batch], first: Tensor, suspicion: str | None) -> None:
        """Compute the step's gradients again. first: what ``Replay.take`` gave of them, (n,) int64."""
        samples: list[Sample] = []

        def passes(net: nn.Module) -> Iterator[Tensor]:
            for batch in micro_batches:
                example = self._objective.example(batch)
                losses = self._objective.losses(net, example)
                peaks = example.x0.abs().flatten(1).amax(1)
                samples.extend(zip(batch.ids.tolist(), losses.tolist(), peaks.tolist(), strict=True))
                yield losses.mean()

        self._engine.replay(passes)
        same = torch.equal(first, self._engine.checks.take())
        told = dist.gather((same, samples))
        wrong = [rank for rank, (agrees, _) in enumerate(told) if not agrees]
        if wrong:
            self._blame(health.GRADIENT, wrong, "the same step computed twice gave two results", at_once=False)
        elif suspicion is not None:
            self._name_samples(suspicion, [sample for _, mine in told for sample in mine])

    # -- what is told -------------------------------------------------------------------------------------------------

    def _blame(self, kind: str, ranks: Sequence[int], what: str, at_once: bool) -> None:
        """Have the step done again; or raise ``HardwareError``, at once or where a host was wrong too often."""
        hosts = [self._hosts[rank] for rank in ranks]
        if len(set(hosts)) == 1:  # several are suspects
            self._wrong[hosts[0]] = self._wrong.get(hosts[0], 0) + 1
        times = max(self._wrong.get(host, 1) for host in hosts)
        who = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks)
        told = f"{who}: {what}; {times} of {self.rules.disagreements} (attribution.disagreements)"
        at_once = at_once or times >= self.rules.disagreements
        self._tell(kind, told, ranks)
        if at_once:
            named = ", ".join(dict.fromkeys(hosts))
            remedy = f"start again without {named} (exclude, in the cluster's profile)"
            if len(set(hosts)) > 1:
                remedy = f"one of {named} is at fault: test them, and start again on others"
            raise HardwareError(
                f"step {self._engine.step}: {told}. That is the hardware's fault: {remedy}, from the last checkpoint",
                tuple(ranks),
            )
        self._repeat = True

    def _name_samples(self, suspicion: str, samples: Sequence[Sample]) -> None:
        """The result is what weights and data make it. samples: of the global batch."""
        found = outliers(samples)
        named = found or sorted(samples, key=lambda sample: -sample[1])[:NAMED]
        listed = ", ".join(f"{one} (loss {loss:.4g}, data to {peak:.4g})" for one, loss, peak in named[:NAMED])
        why = "these samples stand out" if found else "no sample stands out: optimization; the greatest losses are of"
        told = f"{suspicion}; computed again, the same on all ranks, so not the hardware. {why}: {listed}"
        self._tell(health.DATA, told, [], samples=[one for one, _, _ in named])

    def _tell(self, kind: str, told: str, ranks: Sequence[int], **more: Any) -> None:
        log.warning("step %d: %s", self._engine.step, told)
        if self._ranks.is_main:
            hosts = [self._hosts[rank] for rank in ranks]
            health.note(self._run_dir, self._engine.step, kind, told, ranks, hosts, **more)


def outliers(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that are not finite; or, where all are, those whose loss or data are far above the median's."""
    strange = [one for one in samples if not (math.isfinite(one[1]) and math.isfinite(one[2]))]
    if strange:
        return strange
    middle = [OUTLIER * statistics.median(one[column] for one in samples) for column in (1, 2)]
    return [one for one in samples if one[1] > middle[0] or one[2] > middle[1]]


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0
