"""A cluster's facts (``slurm/*.yaml``), and the order that the launcher writes and a job's supervisor reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from uvit_dist.config_data import Section
from uvit_dist.config_rules import raise_broken
from uvit_dist.config_yaml import described, parse_yaml, shipped
from uvit_dist.errors import ConfigError, DataError

SHORTEST_LEAD_S, LONGEST_LEAD_SHARE = 60, 0.25
"""Least seconds of warning before the time limit; most of it as a share of the limit. SLURM looks once in 30 s."""

ONE_NODE = ("launch.nodes=1", "launch.spares=0", "launch.min_nodes=null")
"""Overrides for jobs that have one, whatever the configuration says of training."""


class ContainerConfig(Section):
    """The image that the ranks run in. The supervisor stays outside, where SLURM's commands are."""

    kind: Literal["pyxis", "apptainer"] = Field(description="srun's pyxis plugin, or apptainer around each rank")
    image: str = Field(description="image: a file, or what the plugin can fetch")
    python: str = Field("python3", description="interpreter in the image, with this program's dependencies")
    mounts: tuple[str, ...] = Field(
        (), description="SOURCE:TARGET or one path for both; run_dir and the directory of submission are added"
    )
    options: tuple[str, ...] = Field((), description="more options: of srun (pyxis), or of apptainer exec")


class ClusterProfile(Section):
    """What a cluster wants of a job, and what its nodes are. Every key has a default: an empty profile is valid."""

    partition: str | None = Field(None, description="none: the cluster's default")
    account: str | None = Field(None, description="who pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features that the nodes must have")
    exclude: tuple[str, ...] = Field((), description="hosts that are never asked for")
    exclusive: bool = Field(False, description="whole nodes")
    time_limit_min: int = Field(1440, gt=0, description="time limit of a job, minutes; a longer run goes on through it")
    signal_lead_s: int | None = Field(
        None, gt=0, description="seconds before the limit at which the run is told to save; none: by its save time"
    )
    cpus_per_task: int = Field(1, gt=0, description="cores for each rank")
    memory_gb: float | None = Field(None, ge=0, description="memory of a node for the job; 0: all; none: the default")
    gpus_per_node: int = Field(8, ge=0, description="GPUs of a node, one for each rank; 0: none are asked for")
    gpu_type: str | None = Field(None, description="asked for by name where a cluster has several")
    gpu_memory_gb: float = Field(80.0, gt=0, description="memory of a GPU, 10^9 bytes: what the dry run holds against")
    gpu_tflops: float = Field(989.0, gt=0, description="dense bf16 peak of a GPU, 10^12 FLOP/s: for the dry run")
    gpu_utilisation: float = Field(0.4, gt=0, le=1, description="share of that peak assumed until a run is measured")
    mtbf_node_hours: float = Field(20_000.0, gt=0, description="mean hours between failures of one node")
    restart_s: float = Field(120.0, gt=0, description="seconds from a fault to the first step, until measured")
    save_s: float = Field(30.0, gt=0, description="seconds of a save, until measured")
    environment: dict[str, str] = Field({}, description="variables of every process: NCCL, network interfaces")
    modules: tuple[str, ...] = Field((), description="environment modules that the batch script loads")
    setup: tuple[str, ...] = Field((), description="lines of shell before the supervisor starts")
    sbatch: dict[str, str | int | bool] = Field({}, description="more options of sbatch, by their long names")
    srun: tuple[str, ...] = Field((), description="more options of the srun that starts the ranks")
    container: ContainerConfig | None = Field(None, description="none: the ranks run in this program's environment")
    python: str | None = Field(None, description="interpreter on the nodes; none: the one that launches")

    @model_validator(mode="after")
    def _check(self) -> ClusterProfile:
        limit, lead = self.time_limit_min * 60, self.signal_lead_s
        ours = {"signal", "requeue", "output", "error", "dependency", "array", "nodes", "ntasks-per-node", "chdir"}
        taken = sorted(ours & {name.lstrip("-").replace("_", "-") for name in self.sbatch})
        raise_broken(
            [
                (
                    lead is None or lead < limit,
                    f"signal_lead_s {lead} must be less than time_limit_min, {limit} s: nothing would be trained",
                ),
                (not taken, f"sbatch: {', '.join(taken)}: the launcher sets this itself; leave it out"),
                (
                    all(name.isidentifier() for name in self.environment),
                    "environment: names of variables have letters, digits and _ alone",
                ),
            ]
        )
        return self

    def lead_s(self, save_s: float | None) -> int:
        """Seconds before the time limit at which a run is told to save, for saves of that length (none: unknown).

        Three saves, and 30 s for the steps and processes to end; at least a minute, at most a quarter of the limit.
        """
        if self.signal_lead_s is not None:
            return self.signal_lead_s
        wanted = max(SHORTEST_LEAD_S, 3 * (self.save_s if save_s is None else save_s) + 30)
        return max(1, int(min(wanted, LONGEST_LEAD_SHARE * self.time_limit_min * 60)))


class Order(Section):
    """One job as it was ordered: what the supervisor reads, and what a requeued or succeeding job goes by."""

    job: str = Field(description="train, precompute, evaluate or reference")
    name: str = Field(description="name of the job in its run: train, precompute-3, evaluate-step-00000010")
    run_dir: str = Field(description="absolute path")
    directory: str = Field(description="RUN_DIR/launch/NAME, absolute")
    config: str = Field(description="path of the resolved configuration")
    code: str = Field(description="directory of the packages as they were at submission")
    python_path: str = Field(description="PYTHONPATH of the batch process and the ranks: code first")
    workdir: str = Field(description="directory of submission: relative paths mean what they meant there")
    python: str = Field(description="interpreter of the batch process, and of ranks without a container")
    nodes: int = Field(gt=0)
    processes_per_node: int = Field(gt=0)
    spares: int = Field(0, ge=0, description="nodes beside those, which wait until one is lost")
    shrinks_to: tuple[int, ...] = Field((), description="smaller numbers of nodes that will do, the largest first")
    profile: ClusterProfile = ClusterProfile()
    signal_lead_s: int = Field(gt=0, description="seconds before the time limit")
    then: tuple[str, ...] = Field((), description="jobs that each committed checkpoint starts: evaluate")
    array_task: int | None = Field(None, ge=0, description="its number in an array; none: no array")
    checkpoint: str | None = Field(None, description="checkpoint that a follow-up job works on")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.processes_per_node

    @property
    def all_nodes(self) -> int:
        """Nodes that the job asks for."""
        return self.nodes + self.spares

    @property
    def no_kill(self) -> bool:
        """Whether the job goes on in its allocation where a node of it is lost."""
        return self.spares > 0 or bool(self.shrinks_to)

    @property
    def job_name(self) -> str:
        """What SLURM calls the job."""
        return f"{Path(self.run_dir).name}:{self.name}"

    def srun_options(self) -> list[str]:
        """Options of ``srun`` that come from the profile, for a step that runs ranks."""
        options = [f"--cpus-per-task={self.profile.cpus_per_task}", *self.profile.srun]
        box = self.profile.container
        if box is not None and box.kind == "pyxis":
            options += [f"--container-image={box.image}", f"--container-mounts={','.join(self._mounts())}",
                        f"--container-workdir={self.workdir}", *box.options]  # fmt: skip
        return options

    def rank_command(self) -> list[str]:
        """What starts a rank's interpreter: its arguments (``-m uvit_dist.worker …``) come behind it."""
        box = self.profile.container
        if box is None:
            return [self.python]
        if box.kind == "pyxis":
            return [box.python]
        gpu = ["--nv"] if self.profile.gpus_per_node else []
        binds = [part for mount in self._mounts() for part in ("--bind", mount)]
        return ["apptainer", "exec", *gpu, *binds, "--pwd", self.workdir, *box.options, box.image, box.python]

    def _mounts(self) -> list[str]:
        assert self.profile.container is not None
        given = [mount if ":" in mount else f"{mount}:{mount}" for mount in self.profile.container.mounts]
        own = [f"{path}:{path}" for path in dict.fromkeys((self.workdir, self.run_dir))]
        return [*own, *given]


def read_profile(path: str | Path | None) -> ClusterProfile:
    """A profile from YAML, those of ``slurm/`` found from everywhere; none: the default one.

    Raises ``ConfigError`` with every mistake.
    """
    if path is None:
        return ClusterProfile()
    try:
        text = shipped(path, "slurm").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"launch.cluster {path}: cannot be read ({error}); give the path of a profile, as those in slurm/"
        ) from None
    tree = parse_yaml(text, str(path))
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(
            f"launch.cluster {path}: holds {type(tree).__name__}, not a mapping; write it as the profiles in slurm/ are"
        )
    try:
        return ClusterProfile.model_validate(_with_tuples(tree or {}))
    except ValidationError as error:
        lines = [line for item in error.errors() for line in described(item, ClusterProfile)]
        told = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"launch.cluster {path}: {len(lines)} mistake(s){told}") from None


def _with_tuples(value: object) -> object:
    """YAML's lists as tuples, which the strict sections ask for."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def job_directory(run_dir: str | Path, name: str) -> Path:
    """Where a job of a run keeps its order, its lease, its attempts and submitit's files."""
    return Path(run_dir, "launch", name).absolute()


def write_order(order: Order) -> str:
    """Write an order to its ``order.json``, whole or not at all. Returns the path."""
    path = Path(order.directory, "order.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".order.json.{os.getpid()}")
    temporary.write_text(order.model_dump_json(indent=1))
    temporary.replace(path)
    return str(path)


def read_order(path: str | Path) -> Order:
    """The order that ``write_order`` wrote. Raises ``DataError``."""
    try:
        return Order.model_validate_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no order of a job ({error}); start the run again with uvit_dist.launch") from None
