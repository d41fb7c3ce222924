"""Logs: a file for each rank, metrics as JSON lines always, W&B when wanted, progress on a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from uvit_dist import storage
from uvit_dist.errors import OutputError
from uvit_dist.score_log import append_line, path_of

if TYPE_CHECKING:  # the worker asks for a log's path before torch is there
    from uvit_dist.dist import Ranks

START_S, FINISH_S = 30.0, 120.0
"""Seconds for which W&B may hold a job up, as it starts and as it ends. What it could not send then is on the disk."""
log = logging.getLogger(__name__)


class AroundProgress(logging.Handler):
    """Writes log lines to stderr without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


def log_file(run_dir: str, rank: int, name: str = "") -> Path:
    """Where a rank logs. name: of the job, where it is not the run's training."""
    return Path(run_dir, "logs", name, f"rank-{rank:05d}.log")


def set_up_logging(run_dir: str, ranks: Ranks, name: str = "") -> Path:
    """One log file for each rank; rank 0 also writes to stderr. Returns the file's path. name: as for ``log_file``."""
    path = log_file(run_dir, ranks.rank, name)
    storage.make_directory(str(path.parent))
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if ranks.is_main:
        handlers.append(AroundProgress())
    for handler in handlers:
        handler.setFormatter(form)
    for name in ("uvit_dist", "data_tools"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handlers[0])  # the file alone
    return path


class JsonLines:
    """Appends records to a file. On a disk that is full they wait in memory, which is told once: training goes on."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._told, self._waiting = path, False, b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - held for the life of the run

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._waiting += (json.dumps(record) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._told = False
        except OSError as error:
            if not self._told:
                log.error("%s: cannot be written (%s); records wait until there is room", self._path, error)
            self._told = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._waiting:
            log.error("%s: its last records are lost, %d bytes: there was no room", self._path, len(self._waiting))


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, if WANDB_API_KEY or WANDB_MODE is set, to W&B.

    W&B never stops training: where it cannot be reached, it goes on offline. Whatever it raises later is logged once,
    and it is left alone from then on.
    """

    def __init__(self, run_dir: str, config: dict[str, Any]) -> None:
        self.path = Path(run_dir, "metrics.jsonl")
        self._file = JsonLines(self.path)
        self._wandb = _WandbRun(run_dir, config) if _wandb_is_wanted() else None

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; ``step`` counts updates."""
        self._file.write(record)
        if self._wandb is not None:
            self._wandb.log(record)

    def close(self) -> None:
        """Close the file and finish the W&B run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.close()


def log_scores(run_dir: str, record: dict[str, Any], config: dict[str, Any]) -> None:
    """Add the scores of a checkpoint, whose record is in the run's history, to the run's metrics at its step.

    In ``metrics.jsonl`` they are one line, ``{"step": …, "evaluation": {…}}``, appended beside a training that goes on.
    A W&B run has one writer: the training if it runs, which sends them with its own next metrics; else this process.
    """
    append_line(Path(run_dir, "metrics.jsonl"), {"step": record["step"], "evaluation": record})
    if _wandb_is_wanted():
        with contextlib.suppress(OutputError), storage.locked(run_dir):
            _WandbRun(run_dir, config).close()


def _wandb_is_wanted() -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"))


class _WandbRun:
    """The W&B run of a run directory, which never stops a job: what W&B raises is logged once, then it is left alone.

    With it go the scores of checkpoints that came to the run's history since the last time: as ``evaluation/…`` over
    ``evaluation/step``, for W&B's own steps cannot go back.
    """

    def __init__(self, run_dir: str, config: dict[str, Any]) -> None:
        self._run_dir, self._sent, self._run = run_dir, Path(run_dir, "wandb_scores_sent"), None
        self._guarded(lambda: self._start(config))

    def _start(self, config: dict[str, Any]) -> None:
        import wandb

        id_file = Path(self._run_dir, "wandb_id")
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        patience = wandb.Settings(init_timeout=START_S, login_timeout=START_S, finish_timeout=FINISH_S)
        options: dict[str, Any] = {"id": id_file.read_text(), "resume": "allow", "dir": self._run_dir}
        options["config"] = json.loads(storage.without_secrets(json.dumps(config)))
        try:
            self._run = wandb.init(**options, project="uvit_dist", settings=patience)
        except Exception as error:  # noqa: BLE001 - no key, no network, a server that refuses: all are W&B's own
            wandb.teardown()  # its service holds the id of the run that did not start
            self._run = wandb.init(**options, project="uvit_dist", mode="offline")
            log.warning(
                "W&B does not answer (%s): what it is to have is kept; send it later: wandb sync %s",
                " ".join(str(error).split()), Path(self._run_dir, "wandb", "offline-run-*"),
            )  # fmt: skip

    def log(self, record: dict[str, Any]) -> None:
        """Send metrics of a step, and what scores there are."""
        if self._run is not None:
            self._guarded(lambda: self._run.log(record, step=record["step"]))
        if self._run is not None:
            self._guarded(self._send_scores)

    def _send_scores(self) -> None:
        path = path_of(self._run_dir)
        size, sent = (path.stat().st_size if path.exists() else 0), self._sent_until()
        if size <= sent or self._run is None:
            return
        with open(path, "rb") as file:
            file.seek(sent)
            new = file.read(size - sent)
        self._run.define_metric("evaluation/step")
        self._run.define_metric("evaluation/*", step_metric="evaluation/step")
        for line in new.splitlines():
            record = json.loads(line)
            if record.get("of_run"):
                self._run.log({f"evaluation/{name}": value for name, value in record.items()})
        storage.write_bytes(str(self._sent), str(size).encode())

    def _sent_until(self) -> int:
        """Bytes of the history that were sent already."""
        return int(self._sent.read_text()) if self._sent.exists() else 0

    def close(self) -> None:
        """Send what scores there are, and finish."""
        if self._run is not None:
            self._guarded(self._send_scores)
        if self._run is not None:
            self._guarded(self._run.finish)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a logger must not stop a job
            log.warning("W&B: %s; no more is sent to it", error)
            self._run = None


class Progress:
    """A bar with loss, images/s and time left on a terminal; plain lines elsewhere."""

    def __init__(self, first: int, total: int, visible: bool) -> None:
        self._bar = None
        if visible and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True)
        self._visible, self._total, self._first, self._start = visible, total, first, time.monotonic()
        self._last_line = self._start

    def update(self, step: int, record: dict[str, Any] | None) -> None:
        """Advance to ``step``; record: the newest metrics, if there are new ones."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if record is not None:
                self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {record['images_per_s']:.0f} images/s")
        elif self._visible and record is not None and (time.monotonic() - self._last_line > 10 or step == self._total):
            self._last_line = time.monotonic()
            left = (self._last_line - self._start) / max(step - self._first, 1) * (self._total - step)
            log.info(
                "step %d of %d, loss %.4f, gradient norm %.3f, %.0f images/s, %d s left",
                step,
                self._total,
                record["loss"],
                record["grad_norm"],
                record["images_per_s"],
                left,
            )

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()
