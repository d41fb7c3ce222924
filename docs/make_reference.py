"""Write docs/configuration.md, the reference of every key, from the sections that check the configuration.

    python -m docs.make_reference

``make docs`` does it first; a test (tests/integration/test_docs.py) holds the file in the checkout up to date.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from uvit_dist import errors
from uvit_dist.config import Config
from uvit_dist.config_cluster import ClusterProfile

PATH = Path(__file__).with_name("configuration.md")
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}

HEAD = """# Configuration

*Written by `docs/make_reference.py` from the classes that check the configuration; change those, not this file.*

A run is one YAML file, as those in `configs/`. Every key can be given on the command line, as `section.key=value`,
where the value is YAML (`null` is none). A file may name another as its `base`, and then holds only what differs.
Unknown keys are errors, and all mistakes are told at once, with exit code 78, before anything starts.
`RUN_DIR/config.yaml` is what a run was given, defaults included.

Keys without a default must be given: those of a section that is itself none by default only where the section is given.
Values are strict: `1` is a number, `"1"` is none.
"""

CLUSTER = """# Cluster profiles

`launch.cluster` names a YAML file with these keys: a cluster's facts, which all runs on it share. An empty file is
valid. Examples: `slurm/gpu.yaml`, `slurm/gpu_infiniband.yaml`, `slurm/gpu_pyxis.yaml` and `slurm/gpu_apptainer.yaml`.
What becomes of them is in [slurm.md](slurm.md#cluster-profiles).
"""

EXIT_CODES = """# Exit codes

Of all commands; the numbers are those of BSD's `sysexits.h`. With 69, 74 and 75, start the same command again to go on.

| code | meaning |
| --- | --- |
"""
OTHER_CODES = {
    0: "Done, or a SLURM job was submitted.",
    1: "Another fault, also of a SLURM job that has given up; the log files say what.",
    2: "The command line is wrong.",
    130: "Stopped at once by a second signal, the last checkpoint untouched; or a SLURM job is no longer followed.",
}
"""Those that are no ``UserError``."""


def sections(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """(full key, class, field) of each section below ``root``, outer ones first."""
    for name, field in root.model_fields.items():
        if section := section_of(field.annotation):
            yield f"{prefix}{name}", section, field
            yield from sections(section, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds; none where it is a value."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def type_text(annotation: Any) -> str:
    """A type in words: ``int or none``, ``one of `a`, `b```, ``list of str``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = [type_text(kind) for kind in arguments if kind is not types.NoneType]
        return " or ".join([*kinds, *(["none"] if types.NoneType in arguments else [])])
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)}: " + ", ".join(map(type_text, arguments))
    if origin is tuple:
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    return annotation.__name__


def bounds(field: FieldInfo) -> str:
    """The limits of a number, such as ``≥ 0, < 1``."""
    found = [(sign, getattr(mark, name, None)) for mark in field.metadata for name, sign in SIGNS.items()]
    return ", ".join(f"{sign} {'2^63' if limit == 2**63 else limit}" for sign, limit in found if limit is not None)


def default_text(field: FieldInfo) -> str:
    """The default as it would stand in YAML."""
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def plain(text: str) -> str:
    """A docstring or description as Markdown in a table's cell."""
    text = " ".join(text.split()).replace("``", "`")
    return re.sub(r"(?<!`)([|*<])", r"\\\1", text)


def table(section: type[BaseModel]) -> list[str]:
    """The keys of a section that hold values."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        if section_of(field.annotation):
            continue
        kind = ", ".join(filter(None, [type_text(field.annotation), bounds(field)])).replace("<", "\\<")
        lines.append(f"| `{name}` | {kind} | {default_text(field)} | {plain(field.description or '')} |")
    return lines


def described(name: str, section: type[BaseModel], field: FieldInfo) -> list[str]:
    """A heading, what the section is, whether it must be given, and its keys."""
    lines = [f"## `{name}`", "", plain(section.__doc__ or "")]
    if not field.is_required() and field.get_default(call_default_factory=True) is None:
        lines[-1] += f" {plain(field.description or '').capitalize()}."
    return [*lines, "", *table(section), ""]


def exit_codes() -> dict[int, str]:
    """Every exit code and what it means, from the errors' own words."""
    found: dict[int, list[str]] = {code: [text] for code, text in OTHER_CODES.items()}
    for error in [errors.UserError, *errors.UserError.__subclasses__()]:
        found.setdefault(error.exit_code, []).append((error.__doc__ or "").splitlines()[0])
    found[errors.UserError.exit_code] = ["A command was asked for something that cannot be."]
    found[errors.INTERRUPTED_EXIT_CODE] = ["Stopped by a signal, state saved."]
    found[errors.HANG_EXIT_CODE] = ["A rank stood still, or lost its supervisor, and was ended."]
    return {code: " ".join(texts) for code, texts in sorted(found.items())}


def reference() -> str:
    """The whole file."""
    lines = [HEAD, "## Top level", "", *table(Config), ""]
    for item in sections(Config):
        lines += described(*item)
    lines += [CLUSTER.replace("# Cluster", "## Cluster", 1), *table(ClusterProfile), ""]
    for name, section, field in sections(ClusterProfile):
        lines += [line.replace("## `", "### Profile: `") for line in described(name, section, field)]
    lines += [EXIT_CODES.replace("# Exit", "## Exit", 1).rstrip()]
    lines += [f"| {code} | {plain(text)} |" for code, text in exit_codes().items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(reference())
