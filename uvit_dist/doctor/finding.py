"""What a check found, and the exit code of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from uvit_dist.errors import ConfigError, DataError, MissingInputError, OutputError, UnavailableError, UserError

ENVIRONMENT = ConfigError.exit_code
"""Exit code where the machine or its packages are at fault: nothing can start before that is mended."""
WORST_FIRST = tuple(
    kind.exit_code for kind in (ConfigError, OutputError, MissingInputError, DataError, UnavailableError)
)
"""Exit codes in the order in which problems are to be mended; the others come after these."""


@dataclass(frozen=True)
class Finding:
    """One line of the page. section, subject: what was looked at; told: what was found; remedy: what to do, or type.

    code: exit code of a problem; 0 else.
    """

    section: str
    subject: str
    level: Literal["ok", "warning", "problem"]
    told: str
    remedy: str = ""
    code: int = 0


def ok(section: str, subject: str, told: str) -> Finding:
    """Something that works."""
    return Finding(section, subject, "ok", told)


def warning(section: str, subject: str, told: str, remedy: str) -> Finding:
    """Something that may fail later, or that could not be told."""
    return Finding(section, subject, "warning", told, remedy)


def problem(section: str, subject: str, told: str, remedy: str, code: int = ENVIRONMENT) -> Finding:
    """Something that must be mended first."""
    return Finding(section, subject, "problem", told, remedy, code)


def of_error(section: str, subject: str, error: UserError) -> Finding:
    """A user's mistake as it is told elsewhere: "SUBJECT value: fault; remedy". Of several lines all are told."""
    told = str(error).removeprefix(f"{subject} ")
    told, remedy = (told, "") if "\n" in told else _parted(told)
    return Finding(section, subject, "problem", told, remedy, error.exit_code)


def _parted(message: str) -> tuple[str, str]:
    """A message at its first semicolon outside of brackets."""
    depth = 0
    for place, letter in enumerate(message):
        depth += (letter in "([") - (letter in ")]")
        if letter == ";" and depth == 0:
            return message[:place], message[place + 1 :].strip()
    return message, ""


def exit_code(findings: Iterable[Finding]) -> int:
    """That of the problem to mend first; 0 where there is none."""
    codes = {finding.code for finding in findings if finding.level == "problem"}
    return min(codes, key=lambda code: WORST_FIRST.index(code) if code in WORST_FIRST else 99, default=0)
