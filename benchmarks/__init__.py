"""Comparisons with the outside world, each run by hand; what they gave is in ``benchmarks/results``."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def commit_of(directory: Path) -> str:
    """The commit of a checkout, "-dirty" where files of it are changed; "" of any other directory."""
    if not (directory / ".git").exists():
        return ""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def provenance() -> dict[str, Any]:
    """When, of which commit, with which versions and on what a result was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of(ROOT) or "unknown",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "deepspeed": version("deepspeed")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
