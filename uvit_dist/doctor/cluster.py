"""SLURM: its commands, and whether the profile's partition and account exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uvit_dist import slurm
from uvit_dist.config import Config
from uvit_dist.config_cluster import ClusterProfile
from uvit_dist.doctor.finding import Finding, ok, problem, warning
from uvit_dist.errors import UnavailableError

SECTION = "SLURM"
COMMANDS = ("sbatch", "scontrol", "srun")


def check(config: Config | None, profile: ClusterProfile | None) -> list[Finding]:
    """What can be told on this machine."""
    wanted = config is not None and config.launch.target == "slurm"
    versions = slurm.versions()
    found = judge_commands(versions, wanted)
    if not versions or profile is None:
        return found
    for what, name, ask in (
        ("partition", profile.partition, slurm.partitions),
        ("account", profile.account, slurm.accounts),
    ):
        if name is not None:
            try:
                found += judge_name(what, name, ask())
            except UnavailableError as error:
                remedy = f"see that {name} is right: sinfo; sacctmgr show associations user=$USER"
                found.append(warning(SECTION, what, str(error), remedy))
    if config is not None and wanted and config.launch.spares:
        try:
            usable = slurm.usable_nodes(profile.partition) - set(profile.exclude)
            found += judge_nodes(config.launch.nodes, config.launch.spares, len(usable))
        except UnavailableError as error:
            found.append(warning(SECTION, "nodes", str(error), "see what sinfo says"))
    return found


def judge_nodes(nodes: int, spares: int, usable: int) -> list[Finding]:
    """Whether a training can be given its nodes and spares. usable: nodes that are not down, of the partition."""
    told = f"{usable} can be used; training asks for {nodes}" + (f" and {spares} spare(s)" if spares else "")
    if nodes + spares <= usable:
        return [ok(SECTION, "nodes", told)]
    remedy = "lower launch.spares or launch.nodes; or wait until nodes are back (sinfo)"
    return [warning(SECTION, "nodes", told, remedy)]


def judge_commands(versions: Mapping[str, str], wanted: bool) -> list[Finding]:
    """versions: command → what it said. wanted: the configuration submits jobs."""
    if not versions and not wanted:
        return [ok(SECTION, "commands", "none answers here, and none is needed: jobs run on this machine")]
    missing = [name for name in COMMANDS if name not in versions]
    if "sbatch" in missing or "srun" in missing:
        told = f"{', '.join(missing)}: not on this machine, or not answering"
        remedy = "log in to the cluster's login node; or run here: launch … --local N, or launch.target=local"
        return [problem(SECTION, "commands", told, remedy) if wanted else warning(SECTION, "commands", told, remedy)]
    told = f"{next(iter(versions.values()))}: {', '.join(versions)}"
    if missing:
        remedy = "install it on the compute nodes as well, so that lost jobs are requeued"
        return [warning(SECTION, "commands", f"{told}; no {', '.join(missing)}", remedy)]
    return [ok(SECTION, "commands", told)]


def judge_name(what: str, name: str, names: Sequence[str]) -> list[Finding]:
    """Whether a partition or account of the profile is one of the cluster's."""
    if name in names:
        return [ok(SECTION, what, f"{name} exists")]
    told = f"launch.cluster: {what} {name}: there is none; there are: {', '.join(names) or 'none'}"
    return [problem(SECTION, what, told, f"set {what} in the cluster's profile to one of these")]
