"""Start a job: on this machine, or on a cluster through SLURM, as the configuration's launch section says.

    python -m uvit_dist.launch --config configs/digits_demo.yaml
    python -m uvit_dist.launch --config configs/digits_demo.yaml --job evaluate sample.cfg_scale=0.5
    python -m uvit_dist.launch --config configs/digits_demo.yaml --job evaluate --sweep cfg_scale=0,1,2 steps=10,20
    python -m uvit_dist.launch --config configs/digits_demo.yaml --local 1
    python -m uvit_dist.launch --config configs/uvit_h_imagenet512.yaml --dry-run
    python -m uvit_dist.launch --config configs/uvit_h_imagenet512.yaml --then evaluate --follow
    python -m uvit_dist.launch --config configs/uvit_h_imagenet512.yaml --job precompute --array 8

Exit codes: 0 done, or submitted; 75 stopped by a signal, start again to go on; 130 stopped at once by a second one, or
no longer followed; 78 the configuration is wrong; 65 damaged or contradicting data; 66 a missing file; 69 a server that
does not answer; 70 a loss that is not finite; 73 something cannot be written, or another job holds the run; 74 a rank
stood still; 2 the command line is wrong; 1 another fault, or given up after launch.attempts failures.
"""

from __future__ import annotations

import argparse
import sys

from uvit_dist import slurm, storage
from uvit_dist.config import Config
from uvit_dist.config_cluster import ONE_NODE, read_profile
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import ConfigError, OutputError, explained_exit
from uvit_dist.evaluation import sweep
from uvit_dist.local import run_local
from uvit_dist.worker import JOBS

ARRAYS = ("precompute", "evaluate")
"""Jobs whose work is shared by leases, so that the tasks of an array can do it."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--job", default="train", choices=JOBS, help="what to do (default: train)")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=VALUES", help=sweep.HELP)
    parser.add_argument("--local", type=int, metavar="N", help="run N processes on this machine, whatever launch says")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the SLURM job, whatever launch says")
    parser.add_argument("--spares", type=int, metavar="N", help="nodes that wait until one is lost (launch.spares)")
    parser.add_argument("--array", type=int, metavar="N", help="N SLURM jobs of a node each that share the work")
    parser.add_argument(
        "--then", action="append", default=[], choices=["evaluate"],
        help="start a job of its own for each committed checkpoint, which cannot stop training",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted and what it would take")
    parser.add_argument("--follow", action="store_true", help="print the job's log, and end with its exit code")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    for wrong, why in (
        (args.array is not None and args.job not in ARRAYS, f"--array is for --job {' or '.join(ARRAYS)}"),
        (args.array is not None and args.nodes is not None, "--array jobs have a node each: leave out --nodes"),
        (args.spares is not None and args.job != "train", "--spares is for --job train"),
        (args.spares is not None and args.local is not None, "--local and --spares exclude each other"),
        (args.array is not None and args.array < 1, "--array must be positive"),
        (args.then and args.job != "train", "--then is for --job train"),
        (args.local is not None and args.nodes is not None, "--local and --nodes exclude each other"),
    ):
        if wrong:
            parser.error(why)
    with explained_exit():
        config = load_config(args.config, [*args.overrides, *sweep.overrides_of(args.sweep), *_as_overrides(args)])
        if args.dry_run:
            from uvit_dist.dry_run import dry_run

            print(dry_run(config, args.job, args.then, args.array))
            code = 0
        elif config.launch.target == "local":
            if args.array is not None or args.then:
                raise ConfigError("--array and --then submit SLURM jobs: add launch.target=slurm, or leave them out")
            code = _run_here(config, args.job)
        else:
            code = _submit(config, args)
    sys.exit(code)


def _as_overrides(args: argparse.Namespace) -> list[str]:
    if args.job == "reference":  # one process does it
        target = [] if args.local is None else ["launch.target=local"]
        return [*target, *ONE_NODE, "launch.processes_per_node=1"]
    if args.local is not None:
        return ["launch.target=local", *ONE_NODE, f"launch.processes_per_node={args.local}"]
    if args.array is not None:
        return [*ONE_NODE]
    asked = {"nodes": args.nodes, "spares": args.spares}
    alone = [] if args.job == "train" else ["launch.min_nodes=null"]
    return alone + [f"launch.{key}={value}" for key, value in asked.items() if value is not None]


def _run_here(config: Config, job: str) -> int:
    try:
        return run_local(config, job)
    except OSError as error:
        raise OutputError(f"run_dir {config.run_dir}: {error}; mend its permissions or use another") from None


def _submit(config: Config, args: argparse.Namespace) -> int:
    """Check everything, submit, and say what was submitted. Returns the exit code."""
    from uvit_dist import follow, lease, order_checks, orders

    profile = read_profile(config.launch.cluster)
    tasks = [None] if args.array is None else list(range(args.array))
    wanted = [orders.make_order(config, args.job, profile, args.then, task) for task in tasks]
    if not slurm.available():
        raise ConfigError(
            "launch.target slurm: sbatch is not on this machine. Start this on the cluster's login node; or add "
            "--local N to run N processes here, --dry-run to see what would be submitted, or try it on the four-node "
            "rehearsal cluster of slurm/rehearsal"
        )
    for job in (args.job, *args.then):
        for line in order_checks.check(config, job):
            print(f"warning: {line}", file=sys.stderr)
    for order in wanted:
        lease.require_free(order.directory)
    if args.job == "train":
        with storage.locked(config.run_dir):  # no local job is in it
            pass
    job_ids = orders.place(wanted, config)
    spares = f" and {wanted[0].spares} spare(s)" if wanted[0].spares else ""
    shape = f"{wanted[0].nodes} node(s) of {wanted[0].processes_per_node} rank(s){spares}"
    print(f"submitted: job {' '.join(job_ids)}, {shape}, {wanted[0].run_dir}", flush=True)
    if args.follow:
        return follow.follow(wanted)
    print(f"watch it: python -m uvit_dist.status {config.run_dir}; end it: scancel {' '.join(job_ids)}")
    return 0


if __name__ == "__main__":
    main()
