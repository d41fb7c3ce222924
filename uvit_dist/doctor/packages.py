"""Python and its packages: their versions against the ranges that this program asks for."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import uvit_dist
from uvit_dist.doctor.finding import Finding, ok, problem, warning

SECTION = "packages"
PYPROJECT = Path(uvit_dist.__file__).parents[1] / "pyproject.toml"
INSTALL = "make env; or, in your own environment: pip install -e ."
TOLD = ("torch", "torchvision", "deepspeed", "numpy")
"""Packages whose versions are told even where all is well."""


@dataclass(frozen=True)
class Wanted:
    """What this program asks for: a range of Pythons, and of each package."""

    python: SpecifierSet
    packages: tuple[Requirement, ...]


def wanted(pyproject: Path = PYPROJECT) -> Wanted:
    """The ranges of pyproject.toml in a checkout; of the installed package's metadata elsewhere.

    pyproject: beside the package; outside of a checkout one that is there belongs to something else.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {}) if pyproject.exists() else {}
    if project.get("name") == "uvit_dist":
        return Wanted(SpecifierSet(project["requires-python"]), tuple(map(Requirement, project["dependencies"])))
    found = importlib.metadata.metadata("uvit_dist")
    lines = [Requirement(line) for line in found.get_all("Requires-Dist") or []]
    return Wanted(
        SpecifierSet(found["Requires-Python"] or ""),
        tuple(line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})),
    )


def installed() -> dict[str, str]:
    """Package, in its canonical name, → version, of those that an import here would find."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():  # in the order of sys.path: the first is imported
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def needs_of_torchvision() -> SpecifierSet:
    """The versions of torch that the installed torchvision was built for; any where it does not say."""
    try:
        lines = importlib.metadata.requires("torchvision") or []
        requirements = [Requirement(line) for line in lines]
    except (importlib.metadata.PackageNotFoundError, InvalidRequirement):
        return SpecifierSet()
    return next((line.specifier for line in requirements if line.name == "torch"), SpecifierSet())


def check() -> list[Finding]:
    """Everything that metadata tell, without an import of the packages."""
    ask, found = wanted(), installed()
    findings = judge_versions(ask, platform.python_version(), found)
    if "torch" in found and "torchvision" in found:
        findings += judge_builds(found["torch"], found["torchvision"], needs_of_torchvision())
    return findings


def judge_versions(ask: Wanted, python: str, found: Mapping[str, str]) -> list[Finding]:
    """A finding for each package that is missing or outside its range. found: canonical name → version."""
    out = []
    if not ask.python.contains(python, prereleases=True):
        remedy = f"make env PYTHON=python{min_version(ask.python)}"
        out.append(problem(SECTION, "Python", f"{python} at {sys.executable}; needed: {ask.python}", remedy))
    wrong = [_judge(need, found.get(canonicalize_name(need.name))) for need in ask.packages]
    out += [finding for finding in wrong if finding is not None]
    if not out:
        names = ", ".join(f"{name} {found[name]}" for name in TOLD if name in found)
        told = f"Python {python}, {names}: all {len(ask.packages)} packages are in their ranges"
        out.append(ok(SECTION, "versions", told))
    return out


def min_version(python: SpecifierSet) -> str:
    """The lowest Python of a range such as >=3.11."""
    return next((spec.version for spec in python if spec.operator in (">=", "~=")), "3")


def _judge(need: Requirement, version: str | None) -> Finding | None:
    remedy = f"pip install '{need}', or the whole environment: {INSTALL}"
    if version is None:
        return problem(SECTION, need.name, f"not installed; needed: {need}", remedy)
    try:
        fits = need.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    return None if fits else problem(SECTION, need.name, f"{version}; needed: {need.specifier}", remedy)


BUILDS = "https://pytorch.org/get-started/locally"
"""Where the commands for each kind of build are."""
BUILD = re.compile(r"cpu|xpu|cu\d+|rocm[\d.]+")


def judge_builds(torch: str, torchvision: str, needs: SpecifierSet) -> list[Finding]:
    """Whether torch and torchvision were built for each other. needs: the versions of torch that the latter names.

    Builds for CUDA, ROCm or the CPU alone have it behind a plus: 2.11.0+cu128.
    """
    told, here = f"torch {torch}, torchvision {torchvision}", Version(torch)
    builds = [_build(version) for version in (torch, torchvision)]
    same = f", both built for {builds[0]}: {BUILDS}" if builds[0] else ""
    remedy = f"pip install --force-reinstall 'torch=={here.public}' torchvision{same}"
    if not needs.contains(here.public, prereleases=True):
        return [problem(SECTION, "torchvision", f"{told}: built for torch{needs}", remedy)]
    if None not in builds and builds[0] != builds[1]:
        return [problem(SECTION, "torchvision", f"{told}: built for {builds[1]}, torch for {builds[0]}", remedy)]
    if None in builds and "cpu" in builds and sys.platform == "linux":
        told += ": one is built for the CPU alone, and PyPI's, which does not say, for CUDA"
        return [warning(SECTION, "torchvision", told, f"{remedy}; both from one index: {BUILDS}")]
    return [ok(SECTION, "torchvision", f"{told}: built for each other")]


def _build(version: str) -> str | None:
    """What a version says that it is built for; of one's own build, as vendors' containers have, nothing is known."""
    local = Version(version).local
    return local if local is not None and BUILD.fullmatch(local) else None


def judge_torch_for_gpus(cuda: str | None, gpus: Sequence[str]) -> list[Finding]:
    """cuda: that torch was built for, or none; gpus: the names that the driver tells."""
    if not gpus or cuda is not None:
        return []
    told = f"{len(gpus)} GPU(s) here ({gpus[0]}), but this torch was built for the CPU alone"
    remedy = f"pip install --force-reinstall torch torchvision, both built for CUDA: {BUILDS}"
    return [problem(SECTION, "torch", told, remedy)]
