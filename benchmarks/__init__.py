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
    """The commit of a checkout, "-dirty" where files of it are changed but those in ``benchmarks/results``, which the
    benchmarks themselves write one after the other; "" of any other directory.
    """
    if not (directory / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return commit + ("-dirty" if commit and changed else "")


def provenance() -> dict[str, Any]:
    """When, of which commit, with which versions and on what a result was measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of(ROOT) or "unknown",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "deepspeed": version("deepspeed")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
