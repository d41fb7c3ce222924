"""Traces of chosen training steps, by torch's profiler, each with a summary of one page."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from uvit_dist import storage, watchdog
from uvit_dist.config_speed import ProfileConfig
from uvit_dist.dist import Ranks
from uvit_dist.errors import OutputError
from uvit_dist.profile_summary import STEP, summary

log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps asked for, on the ranks asked for; elsewhere and at other times it does nothing.

    Writes ``profile/trace-rank0-steps20-25.json.gz`` and ``profile/summary-rank0.md`` in the run directory. A run that
    ends or is stopped before the last of the steps leaves what there is by then.
    """

    def __init__(self, config: ProfileConfig, run_dir: str, ranks: Ranks) -> None:
        self._span = config.span if ranks.rank in config.ranks else None
        self._ranks, self._folder = ranks, Path(run_dir, "profile")
        self._profile: profile | None = None
        self._step: record_function | None = None

    def begin(self, step: int) -> None:
        """A step begins. step: updates made before it."""
        if self._span is None or not self._span[0] <= step < self._span[1]:
            return
        if self._profile is None:
            gpu = [ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._await_device()
            self._profile.start()
        self._step = record_function(f"{STEP}{step}")
        self._step.__enter__()

    def end(self, step: int) -> None:
        """The step is over. step: updates made by now."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
        if self._span is not None and step >= self._span[1]:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was. Where that cannot be done it is logged: training goes on."""
        traced, self._profile, span, self._span = self._profile, None, self._span, None
        if traced is None or span is None:
            return
        watchdog.progress("writing a profile")
        self._await_device()
        traced.stop()
        try:
            self._write(traced, span)
        except (OSError, OutputError) as error:
            log.error("profile: %s", error)

    def _write(self, traced: profile, span: tuple[int, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            traced.export_chrome_trace(str(path))
            data = path.read_bytes()
        rank = self._ranks.rank
        trace = self._folder / f"trace-rank{rank}-steps{span[0]}-{span[1]}.json.gz"
        storage.make_directory(str(self._folder))
        storage.write_bytes(str(trace), gzip.compress(data, compresslevel=6))
        page = summary(json.loads(data), f"Steps {span[0]} to {span[1] - 1}, rank {rank}")
        storage.write_bytes(str(self._folder / f"summary-rank{rank}.md"), page.encode())
        log.info("profile: %s", trace)

    def _await_device(self) -> None:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
