"""What a run has found out about the hosts it runs on, and about its data: ``RUN_DIR/health.jsonl``.

One JSON object a line: ``time`` (Unix seconds), ``step`` (updates made), ``kind`` (KINDS), ``told`` (in words),
``ranks``, ``hosts`` (those at fault) and, of data, ``samples`` (their ids).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uvit_dist.score_log import append_line, read_lines

FILE = "health.jsonl"
STRAGGLER, GRADIENT, WEIGHTS, DATA = "straggler", "gradient", "weights", "data"
KINDS = (STRAGGLER, GRADIENT, WEIGHTS, DATA)
log = logging.getLogger(__name__)


def note(
    run_dir: str, step: int, kind: str, told: str, ranks: Sequence[int], hosts: Sequence[str], **more: Any
) -> None:
    """Add a finding. Where that cannot be written it is logged: training goes on."""
    named = list(dict.fromkeys(hosts))
    record = {"time": time.time(), "step": step, "kind": kind, "told": told, "ranks": list(ranks), "hosts": named}
    try:
        append_line(Path(run_dir, FILE), {**record, **more})
    except OSError as error:
        log.error("%s: %s; not in %s: %s", kind, told, FILE, error)


def findings(run_dir: str | Path) -> list[dict[str, Any]]:
    """All findings of a run, the oldest first; lines that are not whole are passed over."""
    return [record for record in read_lines(Path(run_dir, FILE)) if record.get("kind") in KINDS]


def disagreements(run_dir: str | Path) -> dict[str, int]:
    """Host → steps in which its results alone were wrong, in the life of the run: several are suspects."""
    wrong = Counter[str]()
    for record in findings(run_dir):
        if record["kind"] in (GRADIENT, WEIGHTS) and len(record["hosts"]) == 1:
            wrong.update(record["hosts"])
    return dict(wrong)


def slow_hosts(run_dir: str | Path, since: float) -> list[str]:
    """Hosts that were named as slow since then, Unix seconds."""
    found = (record for record in findings(run_dir) if record["kind"] == STRAGGLER and record["time"] >= since)
    return sorted({host for record in found for host in record["hosts"]})
