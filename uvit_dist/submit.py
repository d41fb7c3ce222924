"""Orders become SLURM jobs: the one place that talks to submitit.

The batch script holds one process, the supervisor, in place of its shell (``exec``), so that SLURM's signals reach it.
The supervisor starts the ranks itself: ``uvit_dist.supervisor``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor

from uvit_dist.config_cluster import ClusterProfile, Order
from uvit_dist.errors import ConfigError, UnavailableError

RANK_VARIABLES = ("NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "PYTHONPATH", "PYTHONSAFEPATH")
"""What a submission from inside a job must not hand on, beside what submitit takes away."""
KEPT = ("SLURM_CONF", "SBATCH_")
"""What submitit would take away, and sbatch needs."""
UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Connection refused", "Zero Bytes")
MODULES = (
    "type module >/dev/null 2>&1 || for file in /etc/profile.d/*modules*.sh /etc/profile.d/*lmod*.sh; do "
    '[ -r "$file" ] && . "$file"; done'
)
"""A batch script is no login shell: where the function ``module`` did not come with the environment, it is defined."""


class _Executor(SlurmExecutor):
    """Writes batch scripts also where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def run(order_path: str) -> None:
    """What the batch process runs. Ends the process with the supervisor's exit code."""
    from uvit_dist.supervisor import supervise

    raise SystemExit(supervise(order_path))  # never a result: submitit would pickle it, and a kill leave half of it


def submit(order: Order, after: str | None = None, exclude: Sequence[str] = ()) -> str:
    """Submit an order as a job, also from inside another. Returns its id.

    after: the id of a job in whose place this one steps if that fails: a guard; exclude: hosts to leave out, beside
    those of the profile. Raises ``ConfigError`` with sbatch's
    own words where it refuses, ``UnavailableError`` where SLURM does not answer.
    """
    hosts = tuple(dict.fromkeys((*order.profile.exclude, *exclude)))
    changed = order.model_copy(update={"profile": order.profile.model_copy(update={"exclude": hosts})})
    return _submitted(_executor(changed, submitit_folder(order), after), [order])[0]


def submit_array(orders: Sequence[Order]) -> list[str]:
    """Submit orders that differ in their number as one array. Returns their ids, ARRAY_TASK. Raises as ``submit``."""
    if len(orders) == 1:
        return [submit(orders[0])]
    return _submitted(_executor(orders[0], array_folder(orders[0]), None), orders)


def _submitted(executor: SlurmExecutor, orders: Sequence[Order]) -> list[str]:
    paths = [str(Path(order.directory, "order.json")) for order in orders]
    try:
        with _environment_of_a_submission():
            return [str(job.job_id) for job in executor.map_array(run, paths)]
    except OSError as error:
        raise UnavailableError(
            f"sbatch cannot be started ({error.strerror or error}): start this on the cluster's login node"
        ) from None
    except (FailedJobError, FailedSubmissionError) as error:
        if any(words in str(error) for words in UNREACHABLE):
            raise UnavailableError(f"SLURM does not answer: {error}; nothing was submitted, try again") from None
        raise ConfigError(f"sbatch refused the job: {error}; mend launch.cluster or the launch section") from None


@contextlib.contextmanager
def _environment_of_a_submission() -> Iterator[None]:
    """Without what a job has of its own; with what tells sbatch its cluster and the user's defaults."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    with clean_env(RANK_VARIABLES):
        os.environ.update(kept)
        yield


def script(order: Order, tasks: int = 1) -> str:
    """The batch script that ``submit`` sends, or ``submit_array`` for so many tasks; needs no SLURM."""
    executor = _executor(order, submitit_folder(order) if tasks == 1 else array_folder(order), None)
    if tasks > 1:
        executor.parameters["map_count"] = tasks
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submitit_folder(order: Order) -> Path:
    """Where submitit keeps what it needs of an order's jobs, and where their batch processes log."""
    return Path(order.directory, "submitit")


def array_folder(order: Order) -> Path:
    """As ``submitit_folder``, of an array."""
    return Path(order.run_dir, "launch", f"{order.job}-array", "submitit")


def batch_log(order: Order, job_id: str) -> Path:
    """What the batch process of a job has written, its supervisor's words among them."""
    folder = array_folder(order) if "_" in job_id else submitit_folder(order)
    return JobPaths(folder, job_id).stdout


def _executor(order: Order, folder: Path, after: str | None) -> SlurmExecutor:
    executor = _Executor(folder, python=f"exec {shlex.quote(order.python)}")
    executor.update_parameters(**parameters(order, after))
    return executor


def parameters(order: Order, after: str | None = None) -> dict[str, Any]:
    """submitit's parameters for an order; after: as for ``submit``."""
    profile = order.profile
    more: dict[str, Any] = {
        "signal": f"B:USR2@{order.signal_lead_s}",
        "requeue": True,
        "chdir": order.workdir,
        **{name.lstrip("-"): value for name, value in profile.sbatch.items() if value is not False},
    }
    if order.no_kill:
        more["no-kill"] = True
    if after is not None:
        more |= {"dependency": f"afternotok:{after}", "kill-on-invalid-dep": "yes"}
    if profile.gpus_per_node:
        count = str(order.processes_per_node)
        more["gpus-per-node"] = f"{profile.gpu_type}:{count}" if profile.gpu_type else count
    if profile.memory_gb is not None:
        more["mem"] = f"{round(profile.memory_gb * 1e9 / 2**20)}M" if profile.memory_gb else "0"
    given = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(profile.exclude) or None,
        "exclusive": True if profile.exclusive else None,
    }
    return {
        "job_name": order.job_name,
        "nodes": order.all_nodes,
        "ntasks_per_node": order.processes_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "time": profile.time_limit_min,
        "setup": setup(order.python_path, profile),
        "stderr_to_stdout": True,
        "use_srun": False,
        "wckey": None,
        "additional_parameters": more,
        **{name: value for name, value in given.items() if value is not None},
    }


def setup(python_path: str, profile: ClusterProfile) -> list[str]:
    """The lines of the batch script before the supervisor: modules, environment, and the code of the submission."""
    modules = [MODULES, *(f"module load {name} || exit {ConfigError.exit_code}" for name in profile.modules)]
    return [
        *(modules if profile.modules else []),
        *(f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()),
        *profile.setup,
        f"export PYTHONPATH={shlex.quote(python_path)}",
        "export PYTHONSAFEPATH=1  # the directory of submission may hold newer code",
    ]
