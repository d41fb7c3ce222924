"""The machine without torch: disk, shared memory, limits, ports, network interfaces, compiler."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from uvit_dist.config import Config
from uvit_dist.config_cluster import ClusterProfile
from uvit_dist.doctor.finding import Finding, ok, problem, warning
from uvit_dist.errors import OutputError, UnavailableError
from uvit_dist.forecast import STATE_BYTES, parameters

SECTION = "machine"
GB = 1e9
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 1e9
"""NCCL's channels between GPUs of a machine, and processes that decode images, lie in it. Docker gives 64 MB."""
LEAST_FILES = 1024
"""Open files of a process: connections, shards, logs, and what libraries keep."""
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
COMMAND_S = 20.0


def check(config: Config | None, profile: ClusterProfile | None) -> list[Finding]:
    """All that can be told here."""
    found = []
    if config is not None:
        found += check_run_dir(config)
    if SHARED_MEMORY.is_dir():
        found += judge_shared_memory(shutil.disk_usage(SHARED_MEMORY).free)
    found += judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    names = [name for _, name in socket.if_nameindex()]
    found += judge_interfaces(os.environ, names, "environment", certain=True)
    if profile is not None:
        inside = "SLURM_JOB_ID" in os.environ
        found += judge_interfaces(profile.environment, names, "launch.cluster", certain=inside)
    if "MASTER_PORT" in os.environ:
        found += check_port(os.environ["MASTER_PORT"])
    return found + check_compiler()


def check_run_dir(config: Config) -> list[Finding]:
    """Whether run_dir can be written, and has room. Leaves nothing behind."""
    folder = Path(config.run_dir).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "mend its permissions, or choose another: run_dir=PATH"
        told = f"{config.run_dir}: cannot be written ({error.strerror or error})"
        return [problem(SECTION, "run_dir", told, remedy, OutputError.exit_code)]
    return judge_room(config, free)


def judge_room(config: Config, free: float) -> list[Finding]:
    """free: bytes on the disk of run_dir, against the checkpoints that the configuration keeps.

    While one is written, the ones that are kept are all there.
    """
    section, each = config.checkpoint, parameters(config.model) * STATE_BYTES
    last = config.train.steps // section.every
    for_ever = config.train.steps // section.keep_every if section.keep_every else 0
    kept = min(last, section.keep + for_ever + section.keep_best + section.keep_best_scores)
    least, most = 2 * each, (kept + 1) * each
    told = f"{config.run_dir}: {free / GB:,.1f} GB free; a checkpoint has {each / GB:,.2f} GB"
    if free < least:
        remedy = f"make room, or choose another disk: run_dir=PATH; two checkpoints need {least / GB:,.1f} GB"
        return [problem(SECTION, "run_dir", told, remedy, OutputError.exit_code)]
    if free < most:
        remedy = f"{kept} that are kept and one being written need {most / GB:,.1f} GB: keep fewer (checkpoint.keep…)"
        return [warning(SECTION, "run_dir", told, remedy)]
    return [ok(SECTION, "run_dir", f"{told}, {most / GB:,.2f} GB for all that are kept at once")]


def judge_ranks(config: Config, gpus: int) -> list[Finding]:
    """Whether each rank of a job on this machine has a GPU of its own, where there are some."""
    ranks = config.launch.processes_per_node
    if config.launch.target != "local" or not gpus or ranks <= gpus:
        return []
    told = f"launch.processes_per_node {ranks}, but this machine has {gpus} GPU(s)"
    return [problem(SECTION, "ranks", told, f"set launch.processes_per_node {gpus}, or launch with --local {gpus}")]


def judge_shared_memory(free: float) -> list[Finding]:
    """free: bytes of /dev/shm."""
    told = f"{free / GB:,.2f} GB free"
    if free < LEAST_SHARED_MEMORY:
        return [warning(SECTION, "/dev/shm", told, "give the container more: docker run --shm-size=8g, or --ipc=host")]
    return [ok(SECTION, "/dev/shm", told)]


def judge_open_files(soft: int, hard: int) -> list[Finding]:
    """The limits of open files of a process; -1: none."""
    told = f"{'no limit' if soft < 0 else f'{soft:,}'} for a process"
    if 0 <= soft < LEAST_FILES:
        return [warning(SECTION, "open files", told, f"ulimit -n {LEAST_FILES if hard < 0 else min(hard, 65536)}")]
    return [ok(SECTION, "open files", told)]


def judge_interfaces(variables: Mapping[str, str], names: Sequence[str], origin: str, certain: bool) -> list[Finding]:
    """Whether an interface that NCCL or gloo is told to use is here. certain: the jobs run on this machine.

    names: of this machine's interfaces. NCCL takes a list of prefixes; behind ^ those not to use, behind = whole names.
    """
    found = []
    for variable in INTERFACE_VARIABLES:
        value = variables.get(variable, "")
        prefixes = [part for part in value.lstrip("=").split(",") if part]
        if not prefixes or value.startswith("^"):
            continue
        told = f"{origin}: {variable} {value}; this machine has {', '.join(names)}"
        if any(name.startswith(prefix) for name in names for prefix in prefixes):
            found.append(ok(SECTION, variable, told))
        elif certain:
            remedy = "name one of these interfaces (ip -brief address), or unset the variable"
            found.append(problem(SECTION, variable, told, remedy))
        else:
            remedy = "see that the nodes have it: srun --nodes=1 ip -brief address"
            found.append(warning(SECTION, variable, told, remedy))
    return found


def check_port(text: str) -> list[Finding]:
    """MASTER_PORT, where it is set: whether rank 0 could listen on it."""
    remedy = "give torchrun another --master-port, or unset MASTER_PORT: the launcher finds a free one"
    if not text.isdigit() or not 0 < int(text) < 65536:
        return [problem(SECTION, "MASTER_PORT", f"{text} is no port: a whole number from 1 to 65535", remedy)]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            told = f"port {text}: {'another process listens on it' if taken else error.strerror}"
            return [problem(SECTION, "MASTER_PORT", told, remedy, UnavailableError.exit_code)]
    return [ok(SECTION, "MASTER_PORT", f"port {text} is free")]


def check_compiler() -> list[Finding]:
    """A C compiler: of data_tools/resample.c, and of what torch.compile writes."""
    command = os.environ.get("CC", "cc")
    if shutil.which(command) is None:
        return judge_compiler(command, None)
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=COMMAND_S, check=False)
    return judge_compiler(command, done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else None)


def judge_compiler(command: str, version: str | None) -> list[Finding]:
    """version: the first line that it says of itself; none where it does not start."""
    if version is None:
        told = f"{command} does not start: images are cut by Pillow, more slowly, and torch.compile does not work"
        return [warning(SECTION, "C compiler", told, "apt-get install gcc, or set CC to one that is there")]
    return [ok(SECTION, "C compiler", version)]
