"""What is worth trying to train a network faster: micro-batch, checkpointing and ZeRO stage, by the forecast alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from uvit_dist import forecast
from uvit_dist.config import Config
from uvit_dist.config_rules import rules_between
from uvit_dist.errors import ConfigError
from uvit_dist.forecast import Checkpointing

GB = 1e9
PASS_OVERHEAD = 3.0
"""Images whose time a pass takes beside its own, assumed: it only orders what is tried."""


@dataclass(frozen=True)
class Candidate:
    """A way to train. micro: images of a rank in one forward pass."""

    micro: int
    checkpointing: Checkpointing
    stage: int

    def __str__(self) -> str:
        return f"micro-batch {self.micro}, {forecast.KEPT[self.checkpointing]}, ZeRO-{self.stage}"

    def overrides(self) -> list[str]:
        """As ``section.key=value``."""
        checkpointing = self.checkpointing if isinstance(self.checkpointing, str) else str(self.checkpointing).lower()
        return [f"model.use_checkpoint={checkpointing}", f"train.micro_batch_size={self.micro}",
                f"zero.stage={self.stage}"]  # fmt: skip

    def applied(self, config: Config) -> Config:
        """The configuration with it."""
        return config.model_copy(
            update={
                "model": config.model.model_copy(update={"use_checkpoint": self.checkpointing}),
                "train": config.train.model_copy(update={"micro_batch_size": self.micro}),
                "zero": config.zero.model_copy(update={"stage": self.stage}),
            }
        )


def memory(config: Config, candidate: Candidate, world_size: int) -> forecast.GpuMemory:
    """The forecast for a rank of ``world_size``."""
    changed = candidate.applied(config)
    return forecast.gpu_memory(changed.model, changed.train, changed.zero, world_size, candidate.micro)


def passes(config: Config, candidate: Candidate, world_size: int) -> int:
    """Micro-batches of a rank in an update."""
    return config.train.global_batch_size // world_size // candidate.micro


def communication_s(config: Config, candidate: Candidate, world_size: int, bus: float) -> float:
    """Seconds of an update's communication, nothing of it hidden. bus: bytes that a rank sends in a second."""
    changed, count = candidate.applied(config), passes(config, candidate, world_size)
    return forecast.traffic(changed.model, changed.train, changed.zero, world_size, count).total / bus


def own_setting(config: Config, world_size: int) -> Candidate:
    """What the configuration has now."""
    micro = forecast.batch(config, world_size).micro
    return Candidate(micro, config.model.use_checkpoint, config.zero.stage)


def propose(config: Config, world_size: int, room: float) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """What to measure, the most promising first, and (what, why) of the rest. room: bytes of a GPU.

    The configuration's own setting comes first where it fits. Micro-batches divide a rank's batch, so that the global
    batch stays. Raises ``ConfigError`` where nothing fits, with what would.
    """
    own_batch = config.train.global_batch_size // world_size
    sizes = [size for size in range(own_batch, 0, -1) if own_batch % size == 0]
    stages, left_out = _stages(world_size)
    fitting: list[Candidate] = []
    for size, checkpointing in itertools.product(sizes, forecast.KEPT):
        tried = [Candidate(size, checkpointing, stage) for stage in stages]
        broken = {candidate: _broken_rule(config, candidate) for candidate in tried}
        needs = {c.stage: memory(config, c, world_size).total for c in tried if broken[c] is None}
        left_out += [(str(candidate), rule) for candidate, rule in broken.items() if rule is not None]
        fits = [stage for stage, need in needs.items() if need <= room]
        if fits:
            fitting.append(Candidate(size, checkpointing, fits[0]))
            continue
        if not needs:
            continue
        told = ", ".join(f"{need / GB:.1f} GB at ZeRO-{stage}" for stage, need in needs.items())
        left_out.append((f"micro-batch {size}, {forecast.KEPT[checkpointing]}", f"{told}, of {room / GB:.1f}"))
    if not fitting:
        raise ConfigError(_what_would_fit(config, world_size, stages, room))
    chosen = []
    for candidate in fitting:
        better = next((other for other in fitting if _dominates(other, candidate, stages)), None)
        if better is None:
            chosen.append(candidate)
        else:
            left_out.append((str(candidate), f"{forecast.KEPT[better.checkpointing]} fits too, and computes less"))
    own = own_setting(config, world_size)
    first = [own] if memory(config, own, world_size).total <= room else []
    rest = sorted((c for c in chosen if c != own), key=lambda c: _cost(config, c))
    return first + rest, [line for line in left_out if not first or line[0] != str(own)]


def _stages(world_size: int) -> tuple[list[int], list[tuple[str, str]]]:
    """The stages worth trying, those that send and compute least first."""
    if world_size == 1:
        return [0, 1], [("ZeRO-2 and 3", "one rank alone shards nothing")]
    reason = "each rank would hold and update all of Adam's state; ZeRO-1 sends as many bytes"
    return [1, 2, 3], [("ZeRO-0", reason)]


def _broken_rule(config: Config, candidate: Candidate) -> str | None:
    """What the configuration's rules say against a candidate; none: nothing."""
    changed = candidate.applied(config)
    rules = rules_between({name: getattr(changed, name) for name in type(changed).model_fields})
    return next((message for holds, message in rules if not holds), None)


def _dominates(other: Candidate, candidate: Candidate, stages: list[int]) -> bool:
    """Whether ``other`` does the same products, recomputes less, and sends no more."""
    order = list(forecast.KEPT)
    return (
        other.micro == candidate.micro
        and order.index(other.checkpointing) < order.index(candidate.checkpointing)
        and stages.index(other.stage) <= stages.index(candidate.stage)
    )


def _cost(config: Config, candidate: Candidate) -> float:
    """Of an image, in no unit."""
    flop = forecast.training_flop(candidate.applied(config).model)
    return flop * (1 + PASS_OVERHEAD / candidate.micro) * (1.05 if candidate.stage == 3 else 1.0)


def _what_would_fit(config: Config, world_size: int, stages: list[int], room: float) -> str:
    tried = [Candidate(1, kind, stage) for kind in forecast.KEPT for stage in stages]
    least = min(
        (c for c in tried if _broken_rule(config, c) is None), key=lambda c: memory(config, c, world_size).total
    )
    need = memory(config, least, world_size).total
    text = (
        f"nothing fits: {forecast.parameters(config.model):,} parameters on {world_size} rank(s) need "
        f"{need / GB:.1f} GB on each at least ({least}), and there are {room / GB:.1f} GB; take GPUs of that size"
    )
    sharded, lanes = Candidate(1, least.checkpointing, max(1, least.stage)), config.data.lanes
    for more in (n for n in range(world_size + 1, lanes + 1) if lanes % n == 0):
        if memory(config, sharded, more).total <= room:
            return f"{text}, or {more} ranks (launch.nodes, launch.processes_per_node)"
    return f"{text}, or a smaller network"


def skipped(candidate: Candidate, rates: Mapping[Candidate, float]) -> str | None:
    """Why a candidate need not be measured after those whose rates, images/s, are known; none: it should be."""
    same = sorted((c for c in rates if (c.checkpointing, c.stage) == (candidate.checkpointing, candidate.stage)
                   and c.micro > candidate.micro), key=lambda c: -c.micro)  # fmt: skip
    for larger, smaller in itertools.pairwise(same):
        if rates[smaller] < rates[larger]:
            return f"{smaller.micro} images were slower than {larger.micro} already"
    return None


def fastest(projected: Mapping[Candidate, float]) -> Candidate:
    """The candidate of the highest rate; among equals the one with less sharding and larger products."""
    return max(projected, key=lambda c: (projected[c], -c.stage, c.micro))


def as_yaml(candidate: Candidate) -> str:
    """The sections that a configuration needs for it."""
    sections: dict[str, list[str]] = {}
    for override in candidate.overrides():
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"  {name}: {value}")
    return "\n".join(line for section, lines in sections.items() for line in (f"{section}:", *lines))


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows of texts as aligned lines; the first row is the head."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
