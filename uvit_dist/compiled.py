"""C code of this project's own, compiled where it is used: once on a machine, by its C compiler."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import uuid
from pathlib import Path

log = logging.getLogger(__name__)


def library(source: Path, *options: str) -> ctypes.CDLL:
    """The functions of a C file, which are called without Python's lock; options: further ones of the compiler.

    They are kept, compiled, in UVIT_DIST_CACHE, or ~/.cache/uvit_dist. Raises ``OSError`` or
    ``subprocess.SubprocessError`` where they cannot be had.
    """
    folder = Path(os.environ.get("UVIT_DIST_CACHE") or os.path.expanduser("~/.cache/uvit_dist"))
    identity = source.read_bytes() + " ".join((platform.machine(), *platform.libc_ver(), *options)).encode()
    kept = folder / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # cut short by a full disk, or of another machine
            pass
    folder.mkdir(parents=True, exist_ok=True)
    temporary = f"{kept}.tmp-{uuid.uuid4().hex}"
    command = [os.environ.get("CC", "cc"), "-O3", "-shared", "-fPIC", *options, "-o", temporary, str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    os.replace(temporary, kept)
    return ctypes.CDLL(str(kept))


def library_or_none(source: Path, instead: str, *options: str) -> ctypes.CDLL | None:
    """``library``; none where it cannot be had, of which the log says why, and what is done ``instead``."""
    try:
        return library(source, *options)
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s cannot be compiled (%s); %s, which takes longer", source.name, error, instead)
        return None
