"""From a configuration to submitted jobs: orders, their leases, their submission, and the record of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from uvit_dist import attempts, lease, pins, snapshot, storage, submit
from uvit_dist.attempts import AttemptLog
from uvit_dist.config import Config
from uvit_dist.config_cluster import ClusterProfile, Order, job_directory, write_order
from uvit_dist.config_rules import smaller_node_counts
from uvit_dist.config_yaml import dump_config
from uvit_dist.errors import ConfigError


def make_order(
    config: Config, job: str, profile: ClusterProfile, then: Sequence[str] = (), task: int | None = None
) -> Order:
    """The order of a job. task: its number in an array, whose jobs have one node each.

    Raises ``ConfigError`` where the nodes have fewer GPUs than ranks.
    """
    per_node = config.launch.processes_per_node
    if 0 < profile.gpus_per_node < per_node:
        raise ConfigError(
            f"launch.processes_per_node {per_node}: a node of this cluster has {profile.gpus_per_node} GPUs "
            "(gpus_per_node of launch.cluster), and each rank needs one; use fewer"
        )
    one_job = job == "train"  # the others share their work by leases: a lost node takes only its own share
    name = job if task is None else f"{job}-{task}"
    directory = job_directory(config.run_dir, name)
    code, events = snapshot.place(config.run_dir), []
    with contextlib.suppress(OSError):  # what is wrong with run_dir is told where it is written to
        events = attempts.read(directory)
    return Order(
        job=job,
        name=name,
        run_dir=str(Path(config.run_dir).absolute()),
        directory=str(directory),
        config=str(directory / "config.yaml"),
        code=str(code),
        python_path=os.pathsep.join(part for part in (str(code), os.environ.get("PYTHONPATH")) if part),
        workdir=str(Path.cwd()),
        python=profile.python or sys.executable,
        nodes=1 if task is not None else config.launch.nodes,
        processes_per_node=per_node,
        spares=config.launch.spares if one_job else 0,
        shrinks_to=smaller_node_counts(dict(config)) if one_job else (),
        profile=profile,
        signal_lead_s=profile.lead_s(attempts.longest_save_s(events)),
        then=tuple(then),
        array_task=task,
    )


def place(orders: Sequence[Order], config: Config) -> list[str]:
    """Submit orders of one job: several are an array. Returns the jobs' ids, in order.

    The leases are taken first, and given back where the submission fails. Raises ``OutputError`` that names the holder
    where a job of that name holds one, and as ``submit`` does.
    """
    taken: list[Order] = []
    try:
        for order in orders:
            lease.acquire(order.directory)
            taken.append(order)
            snapshot.make(order.code)
            storage.write_bytes(order.config, dump_config(config).encode())
            write_order(order)
        if orders[0].job == "train":
            pins.switch(orders[0].run_dir, bool(orders[0].then))
        job_ids = submit.submit_array(orders)
    except BaseException:
        for order in taken:
            lease.release(order.directory, None)
        raise
    for order, job_id in zip(orders, job_ids, strict=True):
        AttemptLog(order.directory).add(
            "submitted", job_id=job_id, restart=0, nodes=order.nodes, spares=order.spares,
            processes_per_node=order.processes_per_node,
        )  # fmt: skip
        lease.confirm(order.directory, job_id)
    return job_ids
