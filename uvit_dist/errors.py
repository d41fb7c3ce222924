"""Errors that a user can mend, and the exit code of each (codes as in BSD's sysexits.h)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake a user can mend. The message gives the value, the rule and the remedy; no traceback is shown."""

    exit_code = 64


class ConfigError(UserError):
    """The configuration is wrong: nothing was started."""

    exit_code = 78


class DataError(UserError):
    """Data are damaged or contradict the configuration."""

    exit_code = 65


class MissingInputError(UserError):
    """A file that the job needs is not there."""

    exit_code = 66


class NoSuchFileError(MissingInputError):
    """A file is not there; no fault of access or credentials."""


class UnavailableError(UserError):
    """A server does not answer, in spite of all retries: nothing is known to be wrong with the data."""

    exit_code = 69


class OutputError(UserError):
    """Something cannot be written, or another job has the run."""

    exit_code = 73


class CheckpointError(UserError):
    """No checkpoint of the run directory can be used."""

    exit_code = 65


class NumericalError(UserError):
    """Training diverged: a loss or gradient is not finite, or a loss leapt; or features are not finite."""

    exit_code = 70


class HardwareError(UserError):
    """A host computes wrongly, or holds other weights than it must: the message names it; start again without it."""

    exit_code = 71

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


INTERRUPTED_EXIT_CODE = 75
"""A job was asked to stop, saved its state and can be started again (EX_TEMPFAIL)."""
HANG_EXIT_CODE = 74
"""A rank stood still, or lost its supervisor, and was ended: the job can be started again (EX_IOERR)."""


@contextlib.contextmanager
def explained_exit() -> Iterator[None]:
    """End the process with the message and exit code of a user's mistake or a Ctrl-C, without a traceback."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped; what is finished is kept: start the same command again to go on", file=sys.stderr)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
