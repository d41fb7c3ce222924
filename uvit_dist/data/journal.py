"""What befell a run's stream of samples: skipped steps, shards in quarantine, and which samples stand in for theirs.

The stream is a pure function of (index, seed, journal). Steps here are those of the plan, from 0: an update's step and
the plan's differ by what was skipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uvit_dist.errors import DataError

_DRAWS = 16
"""Candidates drawn at once."""


@dataclass(frozen=True)
class Quarantined:
    """A shard that proved damaged: none of its samples is used from the plan's step ``from_step`` on."""

    name: str
    from_step: int
    reason: str


@dataclass(frozen=True, order=True)
class Substitute:
    """In a step of the plan, the sample ``used`` stood in for ``planned``, which proved damaged just then (ids)."""

    step: int
    planned: int
    used: int


@dataclass(frozen=True)
class Damage:
    """What one rank found in one step: a shard's name, and what is wrong with it."""

    name: str
    reason: str


@dataclass(frozen=True)
class Journal:
    """The same on all ranks, and part of every checkpoint.

    skipped_steps: (first, last) of each range of the plan's steps that is left out, in order, apart from each other.
    """

    skipped_steps: tuple[tuple[int, int], ...] = ()
    quarantined_shards: tuple[Quarantined, ...] = ()
    substitutes: tuple[Substitute, ...] = field(default=(), repr=False)

    @staticmethod
    def from_dict(record: dict[str, Any]) -> Journal:
        """Read what ``to_dict`` wrote. Raises ``KeyError``, ``TypeError`` where it is something else."""
        return Journal(
            tuple((int(first), int(last)) for first, last in record["skipped_steps"]),
            tuple(Quarantined(**shard) for shard in record["quarantined_shards"]),
            tuple(Substitute(*row) for row in record["substitutes"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "skipped_steps": [list(span) for span in self.skipped_steps],
            "quarantined_shards": [dataclasses.asdict(shard) for shard in self.quarantined_shards],
            "substitutes": [list(dataclasses.astuple(row)) for row in self.substitutes],
        }

    def plan_step(self, step: int) -> int:
        """The step of the plan that feeds the update number ``step``, from 0."""
        for first, last in self.skipped_steps:
            if step >= first:
                step += last - first + 1
        return step

    def skipping(self, first: int, last: int) -> Journal:
        """The journal with a further range of the plan's steps left out."""
        assert first <= last
        spans: list[tuple[int, int]] = []
        for begin, end in sorted([*self.skipped_steps, (first, last)]):
            if spans and begin <= spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], max(spans[-1][1], end))
            else:
                spans.append((begin, end))
        return dataclasses.replace(self, skipped_steps=tuple(spans))

    def after(self, step: int, found: Iterable[Damage], substitutes: Iterable[Substitute]) -> Journal:
        """The journal after what all ranks found in a step of the plan, whatever their order and number."""
        known = {shard.name for shard in self.quarantined_shards}
        reasons: dict[str, str] = {}
        for damage in sorted(found, key=lambda damage: (damage.name, damage.reason)):
            reasons.setdefault(damage.name, damage.reason)
        new = tuple(Quarantined(name, step + 1, why) for name, why in reasons.items() if name not in known)
        used = (*self.substitutes, *sorted(set(substitutes)))
        return dataclasses.replace(self, quarantined_shards=self.quarantined_shards + new, substitutes=used)

    def out_of_use(self, names: Sequence[str], step: int) -> frozenset[int]:
        """The shards, by number in the index, whose samples are not used in a step. names: of all shards, in order."""
        out = {shard.name for shard in self.quarantined_shards if shard.from_step <= step}
        return frozenset(number for number, name in enumerate(names) if name in out) if out else frozenset()

    def check_budget(self, shards: int, limit: float, directory: str) -> None:
        """Raises ``DataError``, naming each, where more than ``limit`` of so many shards are in quarantine."""
        bad = self.quarantined_shards
        if len(bad) > limit * shards:
            listed = "\n  ".join(f"{shard.name}: {shard.reason}" for shard in bad[:20])
            raise DataError(
                f"{directory}: {len(bad)} of {shards} shards are damaged, more than data.quarantine_limit {limit:g} "
                f"allows ({int(limit * shards)}):\n  {listed}\nMake or copy these again (python -m "
                "data_tools.verify_shards --repair says how), or raise data.quarantine_limit to go on with substitutes."
            )


def stand_ins(seed: int, epoch: int, planned: int, samples: int, allowed: Callable[[int], bool]) -> Iterator[int]:
    """Ids that may stand in for a sample in an epoch, first choice first: uniform draws of those allowed.

    samples: N, of the index. Without end; the caller takes the first that can be read.
    """
    digest = hashlib.sha256(f"{seed}/substitute/{epoch}/{planned}".encode()).digest()
    draws = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    while True:
        for word in draws.random_raw(_DRAWS):
            candidate = int(word % np.uint64(samples))
            if allowed(candidate):
                yield candidate
