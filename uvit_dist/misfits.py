"""What a command says where this Python lacks its packages, or has others than are needed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from uvit_dist.errors import ConfigError

OURS = ("uvit_dist", "data_tools")
SIGNS = (ImportError, AttributeError, TypeError)
"""What a package of another version than asked for shows itself by."""
TORCHVISION = "torchvision::"
"""In every message about an operator of torchvision that the installed torch cannot load."""
REMEDY = "In the checkout: make env, then . .venv/bin/activate; or, in an environment of your own: pip install ."


def explain_uncaught() -> None:
    """Have this process, a command, end with a message and exit code 78 where its packages are at fault.

    Any other error, and an import that fails in our own code, keeps its traceback.
    """
    sys.excepthook = _told_or_traced


def _told_or_traced(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    told = explained(error)
    if told is None:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(f"error: {told}\n")
        raise SystemExit(ConfigError.exit_code)


def explained(error: BaseException) -> str | None:
    """What to tell a user of an error that comes from missing or unfitting packages; none of any other error."""
    absent = next((one.name for one in _chain(error) if isinstance(one, ModuleNotFoundError) and _is_absent(one)), None)
    if absent is not None:
        return f"{sys.executable} is not the environment of uvit_dist: it has no module {absent}. {REMEDY}"
    told = " / ".join(f"{type(one).__name__}: {one}" for one in _chain(error))
    if TORCHVISION not in told and (not isinstance(error, SIGNS) or _is_ours(error)):
        return None
    wrong = _outside_their_ranges()
    if wrong:
        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f", at {frame.filename}:{frame.lineno}" for frame in place)
        return f"the installed packages are not those that are needed ({told}{where}):{wrong}"
    if TORCHVISION not in told:
        return None
    torch, torchvision = (_version(name) for name in ("torch", "torchvision"))
    return (
        f"torch {torch} and torchvision {torchvision} do not fit each other ({told}): both must be built for the same, "
        f"CUDA or the CPU alone, and come from one index. pip install --force-reinstall 'torch=={torch.split('+')[0]}' "
        "torchvision, as https://pytorch.org/get-started/locally says for your machine; or the tested pair: make env"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from: libraries wrap what a lazy import of theirs met."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_absent(error: ModuleNotFoundError) -> bool:
    top = (error.name or "").partition(".")[0]
    return bool(top) and top not in sys.stdlib_module_names and importlib.util.find_spec(top) is None


def _is_ours(error: BaseException) -> bool:
    return isinstance(error, ImportError) and (error.name or "").partition(".")[0] in OURS


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _outside_their_ranges() -> str:
    """The packages outside their ranges, a line each with what mends it; empty where there are none."""
    try:
        from uvit_dist.doctor import packages

        wrong = [finding for finding in packages.check() if finding.level == "problem"]
    except Exception:  # noqa: BLE001 - metadata that cannot be read must not hide the error that is explained
        return ""
    return "".join(f"\n  {one.subject} {one.told}: {one.remedy}" for one in wrong)
