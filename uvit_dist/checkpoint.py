"""Checkpoints: step directories that appear whole or not at all, and the choice of the newest whole one.

``checkpoints/step-00000500/`` holds one safetensors file for each rank and ``manifest.json``. All is written under a
temporary name and made durable, every rank reports its file's size and hash, and the renaming of the directory is the
commit. What a kill leaves behind is a temporary directory, which the next save removes.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uvit_dist import dist, faults, pins, score_log, storage
from uvit_dist.config import CheckpointConfig
from uvit_dist.dist import Ranks
from uvit_dist.errors import CheckpointError, OutputError

VERSION = 2
SEAL = "xxh3"
MANIFEST, REASON = "manifest.json", "reason.txt"
"""What a checkpoint says of itself; why one was set aside."""
EMPTY_BYTES = 32
"""A file without tensors has no more: at ZeRO-0 all but rank 0's."""
_STEP = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """A rank's file: name, bytes, xxh3 (128 bits) of its content."""

    name: str
    size: int
    xxh3: str


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir, "checkpoints")


def _hash_file(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            hasher.update(piece)
    return hasher.hexdigest()


def temporary(run_dir: str | Path, step: int) -> Path:
    """Where the files of a checkpoint are written before it is committed."""
    return checkpoints_dir(run_dir) / f".tmp-{_name(step)}"


def _name(step: int) -> str:
    return f"step-{step:08d}"


def clean(run_dir: str | Path) -> None:
    """Delete what dead attempts to save have left. For one process, while none saves."""
    for leftover in checkpoints_dir(run_dir).glob(".tmp-*"):
        storage.remove_tree(leftover)


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is written: with the xxh3 (128 bits) of the rest of it."""
    return json.dumps({**manifest, SEAL: _seal(manifest)}, indent=1).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """A manifest as it was sealed. Raises ``ValueError``, ``KeyError``, ``TypeError`` where it is not that any more."""
    manifest: dict[str, Any] = json.loads(data)
    if manifest["version"] != VERSION:
        raise ValueError(f"version {manifest['version']} of the format, this program reads {VERSION}")
    if manifest.pop(SEAL) != _seal(manifest):
        raise ValueError("it differs from its own hash")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def commit(run_dir: str | Path, manifest: dict[str, Any], records: Sequence[FileRecord]) -> Path:
    """Make the files in ``temporary`` a checkpoint, at once, by renaming their directory. Returns it.

    manifest: "step", "world_size" and what else it says; records: of every rank's file. Raises ``OutputError``.
    """
    final, before = checkpoints_dir(run_dir) / _name(manifest["step"]), temporary(run_dir, manifest["step"])
    for record in records:
        path = before / record.name
        found = path.stat().st_size if path.exists() else None
        if found != record.size:
            raise OutputError(
                f"{path}: {found} bytes, its rank wrote {record.size}; run_dir must be where all ranks see the same"
            )
    whole = {"version": VERSION, **manifest, "files": [asdict(record) for record in records]}
    storage.write_bytes(str(before / MANIFEST), sealed(whole))
    faults.point("save:after_manifest")
    storage.fsync_directory(before)
    set_aside(final)
    faults.point("save:before_rename")
    try:
        before.rename(final)
        faults.point("save:renamed")
        storage.fsync_directory(final.parent)
    except OSError as error:
        raise OutputError(
            f"{final}: cannot be written ({error.strerror or error}); make room, or use another run_dir"
        ) from error
    faults.point("save:committed")
    return final


def set_aside(directory: Path, reason: str = "made anew") -> None:
    """Rename a checkpoint that is not to be used, if it is there. Nothing of a user's is deleted for being damaged."""
    number = 0
    while directory.exists():
        aside = directory.with_name(f"damaged-{directory.name}-{number}")
        if not aside.exists():
            directory.rename(aside)
            with contextlib.suppress(OSError):  # a full disk must not stand in the way
                (aside / REASON).write_text(reason + "\n")
        number += 1


def retain(run_dir: str | Path, step: int, config: CheckpointConfig, spared: str | None = None) -> list[str]:
    """Delete the whole checkpoints up to ``step``, the one just committed, that the configuration does not keep.

    Those that are to be evaluated yet stay, too (``pins``).
    spared: the name of one that is in use. Returns the names of those that stay.
    """
    parent = checkpoints_dir(run_dir)
    whole = [path for path in _steps(parent) if _step_of(path) <= step and defect(path, verify="size") is None]
    losses = {}
    for path in whole if config.keep_best else []:
        loss = json.loads((path / MANIFEST).read_text()).get("validation_loss")
        if loss is not None:
            losses[_step_of(path)] = float(loss)
    steps = [_step_of(path) for path in whole]
    distances = score_log.distances(run_dir) if config.keep_best_scores else {}
    stay = kept(steps, losses, config, distances) | pins.pinned(run_dir, steps)
    for path in whole:
        if _step_of(path) in stay or path.name == spared:
            continue
        # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under a valid name.
        doomed = parent / f".tmp-old-{path.name}"
        path.rename(doomed)
        faults.point("save:retiring")
        storage.remove_tree(doomed)
    return [path.name for path in whole if _step_of(path) in stay]


def kept(
    steps: Sequence[int], losses: Mapping[int, float], config: CheckpointConfig, distances: Mapping[int, float] = {}
) -> set[int]:
    """Of the steps of whole checkpoints, newest first, those that stay.

    losses: validation losses, of some; distances: FIDs, or what an evaluation has in their place, of some.
    """
    stay = set(steps[: config.keep])
    if config.keep_every is not None:
        stay |= {step for step in steps if step % config.keep_every == 0}
    for values, count in ((losses, config.keep_best), (distances, config.keep_best_scores)):
        here = [step for step in steps if step in values]
        stay |= set(sorted(here, key=lambda step: (values[step], step))[:count])
    return stay


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _steps(parent: Path) -> list[Path]:
    """Step directories, newest first."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if path.is_dir() and _STEP.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def defect(directory: Path, verify: str) -> str | None:
    """Why a checkpoint is not whole, or none. verify: "size", or "hash" to read every byte."""
    try:
        manifest = unsealed((directory / MANIFEST).read_bytes())
        for item in manifest["files"]:
            record, path = FileRecord(**item), directory / item["name"]
            size = path.stat().st_size
            if size != record.size:
                return f"{record.name} has {size} bytes, the manifest says {record.size}"
            if verify == "hash" and _hash_file(path) != record.xxh3:
                return f"{record.name} differs from its hash in the manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"the manifest cannot be read ({error})"
    return None


def newest_whole(run_dir: str, verify: str = "size") -> Path | None:
    """The newest whole checkpoint of a run, or none where the run has never saved.

    Damaged ones are named in the log and passed over. Raises ``CheckpointError`` if there are checkpoints and none is
    whole: a run that silently starts anew would lose all that was trained.
    """
    parent = checkpoints_dir(run_dir)
    reasons = []
    for path in _steps(parent):
        reason = defect(path, verify)
        if reason is None:
            return path
        log.warning("checkpoint %s is not whole: %s", path, reason)
        reasons.append(f"{path.name}: {reason}")
    reasons += [f"{path.name}: set aside earlier" for path in parent.glob("damaged-*")]
    if reasons:
        listed = "\n  ".join(reasons)
        raise CheckpointError(
            f"{parent}: {len(reasons)} checkpoint(s), none of them whole:\n  {listed}\n"
            "Bring back a whole one from a copy, or use another run_dir to start anew."
        )
    return None


def any_checkpoint(run_dir: str) -> bool:
    """Whether a run has saved anything, whole or not."""
    parent = checkpoints_dir(run_dir)
    return bool(_steps(parent)) or any(parent.glob("damaged-*"))


def set_aside_newer(path: Path) -> None:
    """Set aside the checkpoints after the one that a run resumes from: they are damaged, and will be made anew."""
    for other in _steps(path.parent):
        if _step_of(other) > _step_of(path):
            reason = defect(other, "hash") or f"the run goes on from {path.name}"
            log.warning("checkpoint %s is set aside: %s; the run goes on from %s", other, reason, path)
            set_aside(other, reason)


def open_on_all(path: Path, ranks: Ranks) -> CheckpointReader:
    """A reader on every rank. A collective call. Raises ``CheckpointError`` on every rank where any has none."""
    reader, problem = None, None
    try:
        reader = CheckpointReader(path, (ranks.rank + 0.5) / ranks.world_size)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
        problem = f"rank {ranks.rank}: {error}"
    problems = [told for told in dist.gather(problem) if told is not None]
    if problems or reader is None:
        raise CheckpointError("; ".join(problems))
    return reader


class CheckpointReader:
    """Reads any range of any tensor of a checkpoint, whatever ranks and ZeRO stage wrote it.

    Files are opened as they are needed, those first that lie at ``place`` (0 to 1) among all: there a rank finds its
    own part, or at another number of ranks most of it. If every rank opened every file, the file system would see the
    square of their number. opened: the names of those. Raises ``CheckpointError`` where a file cannot be read.
    """

    def __init__(self, directory: Path, place: float = 0.0) -> None:
        self.directory = directory
        self.manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text())
        files = [FileRecord(**item) for item in self.manifest["files"]]
        distance = {file.name: abs(number + 0.5 - place * len(files)) for number, file in enumerate(files)}
        ordered = sorted(files, key=lambda file: (file.size <= EMPTY_BYTES, distance[file.name]), reverse=True)
        self._unopened = [file.name for file in ordered]
        self.opened: list[str] = []
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        self._open_next()

    def _open_next(self) -> None:
        name = self._unopened.pop()
        self.opened.append(name)
        try:
            file = safe_open(self.directory / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.directory}: {name} cannot be read ({error}); use another") from None
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            kind, tensor, start = key.split("/")
            numel = file.get_slice(key).get_shape()[0]
            bisect.insort(self._pieces[kind, tensor], (int(start), numel, file, key), key=lambda piece: piece[0])

    def read(self, kind: str, name: str, first: int, numel: int) -> Tensor:
        """``numel`` elements of a flattened tensor from ``first``, fp32. Raises ``CheckpointError`` on a gap."""
        end = first + numel
        while True:
            place, out = first, []
            for start, length, file, key in self._pieces[kind, name]:
                if start <= place < min(start + length, end):
                    stop = min(start + length, end)
                    out.append((file, key, place - start, stop - start))
                    place = stop
            if place == end:
                return torch.cat([file.get_slice(key)[a:b] for file, key, a, b in out])
            if not self._unopened:
                raise CheckpointError(
                    f"{self.directory}: {kind} of {name} lacks elements {place}…{end - 1}; use another checkpoint"
                )
            self._open_next()

    def full(self, kind: str) -> dict[str, Tensor]:
        """All tensors of a kind ("ema", "master"), by parameter name, in shape. Needs no process group."""
        shapes: dict[str, list[int]] = self.manifest["shapes"]
        while self._unopened:  # before the first read: the directory may go meanwhile
            self._open_next()
        return {
            name: self.read(kind, name, 0, int(torch.Size(shape).numel())).reshape(shape)
            for name, shape in shapes.items()
        }
