"""The work of a job that writes shards: cut into units, claimed by workers, found again after a kill, merged.

A unit is a range of a seeded permutation of the images, so that no shard is of one class. Its images make one shard,
and their mirror images, in an order of their own, another: none meets its original in a shard, and each image is read
once.
Beside the shards, ``.work/JOB`` holds a lease of each unit under way and a mark of each that is done, whose name says
how many images were left out; JOB is a hash of all that the bytes of the output depend on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from uvit_dist import storage, watchdog
from uvit_dist.config import Config
from uvit_dist.data.latents import MIRROR_SUFFIX, Provenance
from uvit_dist.data.shards import (
    ShardIndex,
    Sidecar,
    finished_shard,
    hash_keys,
    read_index,
    write_index,
)
from uvit_dist.errors import ConfigError, DataError, MissingInputError, OutputError
from uvit_dist.preflight import contradictions
from uvit_dist.work import Leases, newest_leases

log = logging.getLogger(__name__)
STEMS = {"moments": "latents", "pixels": "images"}
"""Names of shards by what they hold."""
WORK, JOB, BAD_IMAGES, MERGE, MERGED = ".work", "job.json", "bad_images.jsonl", "merge", "merge.done-0"
POLL_S = 5.0
"""Seconds between looks at what is in other hands."""
SHOWN = 5
"""Bad images that an error names."""


@dataclass(frozen=True)
class Shard:
    """One shard of a unit. images: numbers of the images whose samples it holds, in order."""

    name: str
    images: Sequence[int]
    mirrored: bool

    def keys(self, keys: Sequence[str], images: Sequence[int] | None = None) -> list[str]:
        """The keys of its samples, or of those of some images. keys: of all images."""
        return [keys[number] + MIRROR_SUFFIX * self.mirrored for number in (self.images if images is None else images)]


@dataclass(frozen=True)
class Unit:
    """Images that are read together and the shards they make: of the originals and, where asked for, the mirrored."""

    number: int
    images: list[int]
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """What its lease and its mark are called."""
        return f"unit-{self.number:06d}"


def plan_units(images: int, mirror: bool, per_shard: int, seed: int, stem: str = "latents") -> list[Unit]:
    """The cut of images into units, ranges of a seeded permutation; mirror images have an order of their own."""
    again = np.random.Philox(key=[seed, 1]).random_raw(images)
    order = np.argsort(np.random.Philox(key=[seed, 0]).random_raw(images), kind="stable").tolist()
    count = -(-images // per_shard)
    units = []
    for number in range(count):
        own = order[number * per_shard : (number + 1) * per_shard]
        orders = (own, [own[place] for place in np.argsort(again[own], kind="stable").tolist()])
        shards = [Shard(f"{stem}-{m * count + number:06d}", orders[m], bool(m)) for m in range(1 + mirror)]
        units.append(Unit(number, own, tuple(shards)))
    return units


@dataclass(frozen=True)
class State:
    """How far all workers are. done: units; bad: images left out in them; names: the files of the work directory."""

    done: frozenset[str]
    bad: int
    names: frozenset[str] = field(repr=False)

    @staticmethod
    def of(names: Iterable[str]) -> State:
        """From the names of the files in the work directory."""
        marks = [name.rpartition(".done-") for name in names]
        done = {unit: int(bad) for unit, dot, bad in marks if dot and bad.isdigit() and unit.startswith("unit-")}
        return State(frozenset(done), sum(done.values()), frozenset(names))


class ShardJob:
    """One worker's view of a job that writes shards beside ``data.index``. Any number may work on it, anywhere.

    keys: of all images; made_with: settings, beside the provenance, that the bytes depend on; unusable: number of an
    image → why it is left out unseen. Raises ``ConfigError``, before anything is made, where the network could not be
    trained on the result; ``OutputError`` where another index has its shards there.
    """

    def __init__(
        self,
        config: Config,
        keys: Sequence[str],
        provenance: Provenance,
        made_with: dict[str, Any] | None = None,
        unusable: dict[int, str] | None = None,
    ) -> None:
        wrong = contradictions(config, provenance)
        if wrong:
            raise ConfigError(
                "these shards would not fit the network:\n  " + "\n  ".join(wrong) + "\nCorrect the configuration."
            )
        assert provenance.samples == len(keys) * (1 + provenance.mirror)
        data = config.data
        self.index, self.directory = data.index, storage.parent(data.index)
        self.keys, self.provenance, self.made_with = keys, provenance, made_with or {}
        self.unusable, self._limit = unusable or {}, config.precompute.bad_image_limit
        stem = STEMS[provenance.kind]
        self.units = plan_units(len(keys), provenance.mirror, data.samples_per_shard, config.seed, stem)
        claim_directory(self.index)
        _check_same_source(self.index, provenance)
        cut = [data.samples_per_shard, config.seed, hash_keys(list(keys)), dataclasses.asdict(provenance), made_with]
        self.work = storage.join(self.directory, WORK, hashlib.sha256(json.dumps(cut).encode()).hexdigest()[:16])
        self.leases = Leases(self.work, config.precompute.lease_s)
        self._own_bad: dict[str, dict[str, str]] = {}
        self._done = 0
        self._lease_s, self._tried = config.precompute.lease_s, set[str]()
        told = {"index": data.index, "images": len(keys), "units": len(self.units), "per_unit": data.samples_per_shard,
                "lease_s": config.precompute.lease_s, **self.made_with, "source": provenance.source}  # fmt: skip
        storage.create(storage.join(self.work, JOB), json.dumps(told, indent=1).encode())

    # -- claiming and finishing ----------------------------------------------------------------------------------------

    def state(self) -> State:
        """How far all are, by one listing."""
        return State.of(storage.sizes_in(self.work))

    def claim(self) -> Unit | None:
        """The next unit to do, now this worker's, with the shards that it lacks; none where there is none left to take.

        Raises ``DataError`` where more images are bad than the configuration allows.
        """
        state = self.state()
        self.check_bad(state)
        todo = {unit.name: unit for unit in self.units if unit.name not in state.done}
        for name in self.leases.claims(list(todo), state.names):
            found = self._finished(todo[name], storage.sizes_in(self.directory))
            # What an interrupted worker left unmarked with bad images is made again: they may have been mended.
            pairs = zip(todo[name].shards, found, strict=True)
            left = tuple(shard for shard, sidecar in pairs if sidecar is None or sidecar.bad)
            if left:
                return replace(todo[name], shards=left)
            self._mark(todo[name], {}, {})
        return None

    def finish(self, unit: Unit, bad: dict[str, str], facts: dict[str, Any]) -> None:
        """Mark a unit as done; its shards are written. bad: key → why; facts: of the worker's time, for the status."""
        self._mark(unit, bad, facts)
        self._done += 1
        watchdog.progress(watchdog.WORKING, self._done)

    def _mark(self, unit: Unit, bad: dict[str, str], facts: dict[str, Any]) -> None:
        told = {"images": len(unit.images), "bad": bad, "host": self.leases.us["host"], **facts}
        storage.create(storage.join(self.work, f"{unit.name}.done-{len(bad)}"), json.dumps(told).encode())
        self._own_bad.pop(unit.name, None)
        self.leases.release(unit.name)

    def _finished(self, unit: Unit, present: dict[str, int]) -> list[Sidecar | None]:
        """The sidecars of a unit's shards; none for one that is not there as this job would make it."""
        return [
            finished_shard(self.directory, shard.name, shard.keys(self.keys), self.provenance, self.made_with, present)
            for shard in unit.shards
        ]

    def sidecar(self, shard: Shard, bad: dict[str, str]) -> dict[str, Any]:
        """What the sidecar of a shard says beside its record. bad: key → why, of the images left out of it."""
        told = {"keys": hash_keys(shard.keys(self.keys)), "made_with": self.made_with}
        return told | ({"bad": dict(sorted(bad.items()))} if bad else {})

    def redo_bad(self) -> None:
        """Have the units be made again whose images were bad: they may have been mended. For who starts a job anew."""
        state = self.state()
        if MERGED in state.names or newest_leases(state.names):
            return  # all is done, or others are at work
        for unit in self.units:
            names = [name for name in state.names if name.startswith(f"{unit.name}.done-") and not name.endswith("-0")]
            if names:
                for shard in unit.shards:
                    storage.remove(storage.join(self.directory, f"{shard.name}.json"))
                storage.remove(storage.join(self.work, names[0]))

    def bad_keys(self) -> set[str]:
        """The keys of all images that were left out."""
        return set(self._write_bad(self.state(), {}))

    # -- bad images ----------------------------------------------------------------------------------------------------

    def note(self, unit: Unit, images: int, bad: dict[str, str], images_per_s: float) -> None:
        """Tell how far a unit is, and how fast this worker.

        Raises ``DataError`` where more images are bad than the configuration allows.
        """
        watchdog.progress(watchdog.WORKING)
        self.leases.note(unit.name, images=images, bad=len(bad), images_per_s=round(images_per_s, 2))
        if bad and self._own_bad.get(unit.name) != bad:
            self._own_bad[unit.name] = dict(bad)
            self.check_bad(self.state())

    def check_bad(self, state: State) -> None:
        """Raises ``DataError`` where more images are bad than the configuration allows, with a file that names them."""
        own = {key: why for bad in self._own_bad.values() for key, why in bad.items()}
        count = state.bad + len(own)
        if count <= self._limit * len(self.keys):
            return
        listed = self._write_bad(state, own)
        shown = "\n  ".join(f"{key}: {why}" for key, why in list(listed.items())[:SHOWN])
        raise DataError(
            f"{count} of {len(self.keys)} images cannot be used, and precompute.bad_image_limit {self._limit:g} "
            f"allows {int(self._limit * len(self.keys))}:\n  {shown}\n{storage.join(self.directory, BAD_IMAGES)} names "
            "them all; mend or remove them, or raise the limit, and start again: what is finished is kept, but for the "
            "units of these"
        )

    def _write_bad(self, state: State, own: dict[str, str]) -> dict[str, str]:
        """Write the list of the images that were left out so far, sorted by key, and return it."""
        found = dict(own)
        for name in sorted(state.names):
            if ".done-" in name and not name.endswith(".done-0"):
                with contextlib.suppress(MissingInputError, ValueError):  # gone, or lost with the machine's memory
                    found |= json.loads(storage.read_bytes(storage.join(self.work, name)))["bad"]
        path = storage.join(self.directory, BAD_IMAGES)
        if not found:
            storage.remove(path)
            return {}
        found = dict(sorted(found.items()))
        lines = [json.dumps({"key": key, "reason": why}, ensure_ascii=False) + "\n" for key, why in found.items()]
        storage.write_bytes(path, "".join(lines).encode())
        return found

    # -- merging -------------------------------------------------------------------------------------------------------

    def complete(self) -> ShardIndex | None:
        """The index, if it and every shard that it needs are there. Units whose shards are not are made again."""
        state = self.state()
        if len(state.done) < len(self.units) or MERGED not in state.names:
            return None
        if self._whole(state) and storage.exists(self.index):
            return read_index(self.index)
        storage.remove(storage.join(self.work, MERGED))
        return None

    def merge(self) -> ShardIndex | None:
        """Write the index and the list of bad images, if all units are done and this worker gets to do it.

        Returns the index; none while units are left, or another worker merges. Raises ``DataError`` as ``claim`` does.
        """
        state = self.state()
        if len(state.done) < len(self.units) or not self.leases.claim(MERGE, state.names):
            return None
        try:
            sidecars = self._whole(state)
            if not sidecars:
                return None
            records = [sidecar.record for sidecar in sidecars if sidecar.record.samples]
            made = replace(self.provenance, samples=sum(record.samples for record in records))
            counts = _class_counts(ShardIndex(self.index, made, tuple(records), ""))
            bad = {key: why for sidecar in sidecars for key, why in sidecar.bad.items()}
            self._write_bad(state, bad)
            self.check_bad(state)
            if not records:
                raise DataError(f"data.source: none of its {len(self.keys)} images can be used; see {BAD_IMAGES}")
            write_index(self.index, records, replace(made, class_counts=counts), self.made_with)
            storage.create(storage.join(self.work, MERGED), b"{}")
        finally:
            self.leases.release(MERGE)
        return read_index(self.index)

    def _whole(self, state: State) -> list[Sidecar]:
        """The sidecars of all shards, in order of their names; none where some are not whole, which are unmarked."""
        present = storage.sizes_in(self.directory)
        with ThreadPoolExecutor(16 if storage.is_remote(self.directory) else 1) as pool:
            found = list(pool.map(lambda unit: self._finished(unit, present), self.units))
        lost = {unit.name for unit, sidecars in zip(self.units, found, strict=True) if None in sidecars}
        for name in state.names:
            if name.rpartition(".done-")[0] in lost:
                storage.remove(storage.join(self.work, name))
        if lost:
            log.warning("%s: %d unit(s) are not whole any more and are made again", self.directory, len(lost))
            return []
        return [sidecar for kind in zip(*found, strict=True) for sidecar in kind if sidecar is not None]

    def once(self, name: str, path: str, action: Callable[[], None]) -> None:
        """Have one worker, after all units, make the file at ``path`` by ``action``; wait until it is made.

        Where an action makes none, as it says in the log, it is done all the same.
        """
        mark = f"{name}.done-0"
        while True:
            state = self.state()
            if mark in state.names and (storage.exists(path) or name in self._tried):
                return
            if self.leases.claim(name, state.names):
                try:
                    action()
                    storage.create(storage.join(self.work, mark), b"{}")
                finally:
                    self.leases.release(name)
                return
            self._tried.add(name)  # another does it now: whatever comes of it, it is not done twice
            time.sleep(min(POLL_S, self._lease_s / 4))

    def close(self) -> None:
        """Give back what this worker holds."""
        self.leases.close()


def claim_directory(index: str) -> None:
    """Make the directory of an index. Raises ``OutputError`` where another index has its shards there."""
    directory = storage.parent(index)
    storage.make_directory(directory)
    ours = index.rsplit("/", 1)[-1]
    stems = tuple(f"{stem}-" for stem in STEMS.values())
    others = [name for name in storage.sizes_in(directory) if name.endswith(".json") and not name.startswith(stems)]
    others = [name for name in others if name != ours and b'"provenance"' in storage.read_bytes(f"{directory}/{name}")]
    if others:
        raise OutputError(
            f"data.index {index}: {', '.join(others)} in the same directory has its shards there, under the same "
            "names; give each index a directory of its own"
        )


def _check_same_source(index: str, provenance: Provenance) -> None:
    """Shards of one collection of images are not replaced by those of another. Raises ``OutputError``."""
    if not storage.exists(index):
        return
    before = json.loads(storage.read_bytes(index)).get("provenance") or {}
    was, this = (
        f"{str(made.get('source')).rsplit(' ', 1)[0]} ({made.get('split')})"  # without the hash of its contents
        for made in (before, dataclasses.asdict(provenance))
    )
    if was != this:
        raise OutputError(
            f"data.index {index}: holds the shards of {was}, and these would be of {this}; give another data.index, in "
            "a directory of its own, or delete those"
        )


def _class_counts(index: ShardIndex) -> tuple[int, ...]:
    """Samples of each class in the shards as written."""
    classes = index.provenance.classes
    if not classes:
        return ()
    with ThreadPoolExecutor(16 if storage.is_remote(index.path) else 1) as pool:
        tables: Iterator[Any] = pool.map(index.rows, range(len(index.shards)))
        counts = sum((np.bincount(rows["label"], minlength=classes) for rows in tables), np.zeros(classes, np.int64))
    return tuple(map(int, counts))
