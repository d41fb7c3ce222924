"""The code as it is at submission, kept with the run: editing the checkout does not change a job that is requeued."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import uvit_dist
from uvit_dist.errors import OutputError

PACKAGES = ("uvit_dist", "data_tools")


def _files(root: Path) -> list[Path]:
    """The packages' files, relative to ``root``, in order; no compiled ones and no hidden ones."""
    found = (path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith((".", "__pycache__")) for part in path.parts))


def content_hash(root: Path) -> str:
    """sha256 of the names and contents of the packages' files under ``root``, 16 hexadecimal digits."""
    whole = hashlib.sha256()
    for path in _files(root):
        content = (root / path).read_bytes()
        whole.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:16]


def _root() -> Path:
    """The directory of the packages that run now."""
    return Path(next(iter(uvit_dist.__path__))).absolute().parent


def place(run_dir: str | Path) -> Path:
    """Where the code that runs now is kept with a run: ``RUN_DIR/launch/code-HASH``, absolute."""
    return Path(run_dir, "launch", f"code-{content_hash(_root())}").absolute()


def make(target: str | Path) -> None:
    """Copy the packages to ``place(run_dir)``, whole or not at all, unless they are there. Raises ``OutputError``."""
    root, target = _root(), Path(target)
    if target.is_dir():
        return
    temporary = target.with_name(f".tmp-{target.name}-{os.uname().nodename}-{os.getpid()}")
    try:
        for path in _files(root):
            copy = temporary / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, copy)
        if content_hash(temporary) != target.name.removeprefix("code-"):
            raise OutputError(f"{root}: the code changed while it was copied; start again")
        temporary.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another launcher was faster
            raise OutputError(
                f"{target}: the code cannot be kept there ({error.strerror or error}); make room"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
