"""The probes that need torch, a driver or a server, in a process of their own: ``devices``, ``inputs``, ``ring``.

    python -m uvit_dist.doctor.probes devices
    python -m uvit_dist.doctor.probes inputs < RESOLVED.yaml

Each writes JSON lines for ``children.Child``: what begins, what was found, and facts for other checks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from uvit_dist.config import Config
from uvit_dist.config_yaml import parse_config, parse_yaml
from uvit_dist.doctor import inputs, packages
from uvit_dist.doctor.finding import Finding, of_error, ok, problem, warning
from uvit_dist.errors import UnavailableError, UserError
from uvit_dist.worker import die_with_parent

GPUS, DATA = "GPUs", inputs.DATA
LEAST_BF16 = (8, 0)
"""Compute capability from which on a GPU multiplies in bf16."""
RETRY_S = 20.0
"""Seconds of retries of a server that does not answer: a doctor does not wait as long as a training."""
LIMIT_S = 60.0
"""Of a collective between the GPUs of this machine."""
Say = Callable[[Any], None]


def devices(say: Say) -> None:
    """torch, its GPUs, NCCL and DeepSpeed's ops."""
    say({"begins": "import torch"})
    import torch

    names = nvidia_gpus()
    for finding in packages.judge_torch_for_gpus(torch.version.cuda or torch.version.hip, names):
        say(finding)
    say({"begins": "torchvision"})
    try:
        import torchvision  # noqa: F401 - its operators are registered by the import
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        remedy = f"pip install --force-reinstall 'torch=={torch.__version__.split('+')[0]}' torchvision"
        say(problem(packages.SECTION, "torchvision", f"cannot be imported with this torch ({error})", remedy))
    say({"begins": "GPUs"})
    count = torch.cuda.device_count()
    say({"gpus": count})
    if not count:
        for finding in judge_no_gpus(names, torch.version.cuda is not None):
            say(finding)
    for number in range(count):
        facts = torch.cuda.get_device_properties(number)
        free, _ = torch.cuda.mem_get_info(number)
        say(judge_gpu(number, facts.name, (facts.major, facts.minor), facts.total_memory, free))
    if count:
        say(
            ok(
                GPUS,
                "driver",
                f"{driver_version() or 'of unknown version'}; torch is for CUDA {torch.version.cuda}",
            )
        )
        say({"begins": "NCCL"})
        say(ok(GPUS, "NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    say({"begins": "ranks"})
    from uvit_dist import dist

    try:
        ranks = dist.ranks_from_environment()
        if "RANK" in os.environ:
            say(ok("machine", "ranks", f"RANK {ranks.rank} of WORLD_SIZE {ranks.world_size}, all variables are set"))
    except UserError as error:
        say(of_error("machine", "ranks", error))
    say({"begins": "DeepSpeed"})
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if count else "cpu")
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    builders = {name: builder for name, builder in ALL_OPS.items() if name != "deepspeed_not_implemented"}
    usable = [name for name, builder in builders.items() if builder.is_compatible(verbose=False)]
    told = f"none is wanted: AdamW is torch's own; {len(usable)} of {len(builders)} could be built here"
    say(ok(packages.SECTION, "DeepSpeed ops", f"{told}: {', '.join(sorted(usable)) or 'none'}"))


def nvidia_gpus() -> list[str]:
    """The GPUs that NVIDIA's driver tells of in /proc, whatever torch sees."""
    found = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir("/proc/driver/nvidia/gpus")):
            with open(f"/proc/driver/nvidia/gpus/{name}/information", encoding="utf-8") as file:
                lines = dict(line.split(":", 1) for line in file if ":" in line)
            found.append(lines.get("Model", name).strip())
    return found


def driver_version() -> str | None:
    """The version of NVIDIA's kernel module."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return "driver " + file.readline().split("  ")[1].split()[0]
    except (OSError, IndexError):
        return None


def judge_no_gpus(names: list[str], for_cuda: bool) -> list[Finding]:
    """names: of the GPUs that the driver tells of; for_cuda: whether torch was built for them."""
    if not names:
        return [ok(GPUS, "GPUs", "none here: ranks run on the CPU, with gloo; enough for the demo, not for a system")]
    if not for_cuda:
        return []  # told with torch's version
    told = f"the driver has {len(names)} ({names[0]}), torch sees none"
    return [problem(GPUS, "GPUs", told, "unset CUDA_VISIBLE_DEVICES; nvidia-smi tells if the driver is old")]


def judge_gpu(number: int, name: str, capability: tuple[int, int], total: int, free: int) -> Finding:
    """total, free: bytes of its memory."""
    told = f"{name}, {total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, capability {capability[0]}.{capability[1]}"
    subject = f"GPU {number}"
    if capability < LEAST_BF16:
        return warning(GPUS, subject, f"{told}, no bf16", "set train.precision fp32 and sample.precision fp32")
    if free < 0.9 * total:
        return warning(GPUS, subject, f"{told}, bf16", "other processes use it: nvidia-smi")
    return ok(GPUS, subject, f"{told}, bf16")


def ring(say: Say) -> None:
    """This process as one of the ranks of this machine: sums that must be exact, and their speed. On every rank."""
    from uvit_dist import dist, rank_check

    ranks = dist.ranks_from_environment()
    dist.start(ranks, LIMIT_S)
    report = rank_check.examine(ranks, [socket.gethostname()] * ranks.world_size)
    if ranks.is_main:
        say(judge_ring(report, ranks.world_size))
    dist.stop()


def judge_ring(report: dict[str, Any], world_size: int) -> Finding:
    """report: as ``rank_check.examine`` gives it."""
    if report["failing"]:
        told = "; ".join(report["failing"].values())
        return problem(GPUS, "all-reduce", told, "leave this machine out", UnavailableError.exit_code)
    speed = f", {report['all_reduce_gbytes_per_s']:.1f} GB/s" if world_size > 1 else ""
    return ok(GPUS, "all-reduce", f"right on {world_size} rank(s){speed}")


def checked_inputs(say: Say) -> None:
    """The weights, references and data of the configuration on stdin, and its server."""
    config = parse_config(parse_yaml(sys.stdin.read(), "stdin"), "stdin")
    patient = config.storage.model_copy(update={"retry_s": min(config.storage.retry_s, RETRY_S)})
    config = config.model_copy(update={"storage": patient})
    from uvit_dist import storage

    storage.configure(config.storage)
    for key, check in inputs.named(config):
        say({"begins": key})
        say(check())
    urls = [path for path in inputs.data_paths(config) if storage.is_remote(path)]
    if urls:
        say({"begins": "credentials"})
        say(inputs.credentials(config, urls[0]))
    say({"begins": "data.index"})
    for finding in _data(config):
        say(finding)


def _data(config: Config) -> Iterator[Finding]:
    """What a training checks before its first step, in its own words."""
    from uvit_dist import preflight

    told = _Told()
    logging.getLogger("uvit_dist").addHandler(told)
    logging.getLogger("uvit_dist").setLevel(logging.INFO)
    try:
        index, _ = preflight.check_training(config, config.world_size)
    except UserError as error:
        yield of_error(DATA, "data.index", error)
        return
    made = index.provenance
    yield ok(DATA, "data.index", f"{index.path}: {made.samples:,} samples in {len(index.shards)} shards, as configured")
    for level, message in told.lines:
        yield ok(DATA, "reading", message) if level < logging.WARNING else warning(DATA, "reading", message, "")


class _Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append((record.levelno, record.getMessage()))


PROBES = {"devices": devices, "inputs": checked_inputs, "ring": ring}


def main() -> None:
    """Run one probe. What libraries print goes to stderr: stdout carries the findings alone."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.doctor.probes", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("probe", choices=PROBES, help="what to look at")
    args = parser.parse_args()
    die_with_parent()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(what: Any) -> None:
        out.write(json.dumps(asdict(what) if isinstance(what, Finding) else what) + "\n")

    PROBES[args.probe](say)
    out.flush()
    os._exit(0)  # at once: some libraries' threads end slowly


if __name__ == "__main__":
    main()
