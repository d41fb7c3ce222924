"""Saving beside the training steps: a copy in memory, then files, a vote, the commit, while training goes on.

Every rank calls ``begin`` after the same update. The copy is all that training waits for; a thread of each rank writes
its file, makes it durable and hashes it. Whether any rank still writes is one of the flags of the collective that each
step has anyway; at the first step at which none does all gather their records, which is the vote, and a thread of rank
0 commits (``checkpoint.commit``). At most one save is under way. A save that fails leaves what is there as it is.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit_dist import checkpoint, dist, faults, storage, watchdog
from uvit_dist.checkpoint import FileRecord
from uvit_dist.config import CheckpointConfig
from uvit_dist.copier import Copier
from uvit_dist.dist import Ranks
from uvit_dist.errors import OutputError
from uvit_dist.safetensors_stream import write_flat

log = logging.getLogger(__name__)


class Saver:
    """Commits the checkpoints of a run. ``begin``, ``after_step`` and ``finish`` are called on every rank alike.

    saved: the step that needs no saving: committed, or on its way. copier: on rank 0, of what is committed.
    """

    def __init__(
        self,
        run_dir: str,
        config: CheckpointConfig,
        ranks: Ranks,
        saved: int = -1,
        copier: Copier | None = None,
    ) -> None:
        self._run_dir, self._config, self._ranks, self._copier = run_dir, config, ranks, copier
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._memory = torch.empty(0)
        self._manifest: dict[str, Any] | None = None
        self._work: Future[Any] | None = None
        self._voted, self._told, self._began = False, "", 0.0
        self.failures, self.saved = 0, saved

    @property
    def busy(self) -> bool:
        """Whether this rank still has something to do for the save under way: a flag for the step's collective."""
        return self._work is not None and not self._work.done()

    @property
    def under_way(self) -> bool:
        """Whether a save has begun and not ended, on whatever rank: the same on all."""
        return self._manifest is not None

    def begin(self, state: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        """Start to save. A save that is still under way is waited for first.

        state: this rank's flat fp32 tensors (n,) (Engine.local_state), copied before this returns; manifest: what is
        the same for all ranks, with "step". Raises as ``finish`` does.
        """
        if self._manifest is not None:
            log.warning("step %d: training waits for the checkpoint of step %d, still being written",
                        manifest["step"], self._manifest["step"])  # fmt: skip
            self.finish()
        faults.point("save:begin")
        self._began = time.monotonic()
        layout = [(key, value.numel()) for key, value in state.items()]
        flat = self._copied(state)
        faults.point("save:copied")
        self._manifest, self._voted, self.saved = manifest, False, manifest["step"]
        self._work = self._pool.submit(self._write, layout, flat)
        if not self._config.background:
            self.finish()

    def after_step(self, any_busy: bool) -> None:
        """Go on with the save under way, if no rank is busy with it. any_busy: of the flag ``busy``, by all ranks.

        Raises ``OutputError`` on every rank where more saves in a row have failed than ``most_failures``.
        """
        if self._manifest is None or any_busy:
            return
        if not self._voted:
            self._vote()
        else:
            self._end()

    def finish(self, must_succeed: bool = False) -> None:
        """Wait until nothing is under way. A collective call.

        Raises ``OutputError`` on every rank where too many saves have failed, or, with must_succeed, the last one has.
        """
        while self._manifest is not None:
            watchdog.progress("saving")
            if not self._voted:
                self._vote()
            else:
                self._end()
        if must_succeed and self.failures:  # a save that succeeds sets them back
            raise OutputError(self._told)

    def close(self) -> None:
        """End the thread; what is under way is finished by ``finish`` alone."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- the parts -------------------------------------------------------------------------------------------------

    def _copied(self, state: dict[str, Tensor]) -> Tensor:
        """The tensors one after the other in memory of the host that is used again, (n,) fp32.

        On a CPU the thread that will write copies the second half: it has nothing to do before.
        """
        parts = list(state.values())
        numel, on_gpu = sum(value.numel() for value in parts), self._ranks.device.type == "cuda"
        if self._memory.numel() != numel:
            self._memory = torch.zeros(numel, pin_memory=on_gpu)
        places = self._memory.split([value.numel() for value in parts])
        if on_gpu:
            for place, value in zip(places, parts, strict=True):
                place.copy_(value, non_blocking=True)
            torch.cuda.synchronize(self._ranks.device)
        elif parts:
            half = len(parts) // 2
            middle = sum(value.numel() for value in parts[:half])
            second = self._pool.submit(torch.cat, parts[half:], out=self._memory[middle:])
            if half:
                torch.cat(parts[:half], out=self._memory[:middle])
            second.result()
        return self._memory

    def _write(self, layout: list[tuple[str, int]], flat: Tensor) -> FileRecord | str:
        """Write and fsync this rank's file, of flat fp32 (n,). Returns its record, or what went wrong."""
        assert self._manifest is not None
        directory = checkpoint.temporary(self._run_dir, self._manifest["step"])
        path = directory / f"rank-{self._ranks.rank:05d}.safetensors"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            faults.point("save:prepared")
            _require_space(directory, flat.nbytes)
            size, xxh3 = write_flat(path, layout, flat)
            faults.point("save:written")
            return FileRecord(path.name, size, xxh3)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            return f"{path}: {error}"

    def _vote(self) -> None:
        assert self._work is not None
        assert self._manifest is not None
        records = dist.gather(self._work.result())
        faults.point("save:voted")
        self._work, self._voted = None, True
        errors = [record for record in records if isinstance(record, str)]
        if errors:
            if self._ranks.is_main:
                storage.remove_tree(checkpoint.temporary(self._run_dir, self._manifest["step"]))
            self._failed("; ".join(errors))
        elif self._ranks.is_main:
            self._work = self._pool.submit(self._commit, self._manifest, records)

    def _commit(self, manifest: dict[str, Any], records: list[FileRecord]) -> str | None:
        """Returns what went wrong, or none."""
        try:
            whole = {**manifest, "world_size": self._ranks.world_size}
            path = checkpoint.commit(self._run_dir, whole, records)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            storage.remove_tree(checkpoint.temporary(self._run_dir, manifest["step"]))
            return str(error)
        try:
            if self._copier is not None:
                self._copier.submit(path)
            spared = self._copier.copying if self._copier is not None else None
            checkpoint.retain(self._run_dir, manifest["step"], self._config, spared)
        except Exception as error:  # noqa: BLE001 - the checkpoint is committed, which is what counts
            log.warning("%s: older checkpoints were not cleaned up (%s)", path.parent, error)
        return None

    def _end(self) -> None:
        error = dist.broadcast(self._work.result() if self._work is not None else None)
        self._work = None
        if error is not None:
            self._failed(error)
        else:
            self._manifest, self.failures = None, 0
            watchdog.saved_in(time.monotonic() - self._began)

    def _failed(self, why: str) -> None:
        assert self._manifest is not None
        step, self._manifest = self._manifest["step"], None
        self.failures, self.saved = self.failures + 1, -1
        self._told = (
            f"the checkpoint of step {step} cannot be written: {why}. "
            "Free space or mend the directory and start again: the last whole checkpoint is untouched."
        )
        allowed = self._config.most_failures
        log.error("%s (%d in a row; checkpoint.most_failures is %d)", self._told, self.failures, allowed)
        if self.failures > allowed:
            raise OutputError(self._told)


def save_now(
    run_dir: str, config: CheckpointConfig, ranks: Ranks, state: dict[str, Tensor], manifest: dict[str, Any]
) -> Path:
    """Commit one checkpoint and wait for it, as ``Saver.begin`` takes them, flat fp32 (n,). A collective call.

    Returns its directory. Raises ``OutputError`` on every rank where it cannot be written.
    """
    saver = Saver(run_dir, config, ranks)
    try:
        saver.begin(state, manifest)
        saver.finish(must_succeed=True)
    finally:
        saver.close()
    return checkpoint.checkpoints_dir(run_dir) / f"step-{manifest['step']:08d}"


def _require_space(directory: Path, needed: int) -> None:
    """Raises ``OSError`` where a file system has less room than that, before any of it is used."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
