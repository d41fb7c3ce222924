"""Start, break and stop a four-node SLURM on this machine, to rehearse a launch and its faults.

    python -m slurm.rehearsal start            # prints the line that makes it this shell's cluster
    python -m slurm.rehearsal status
    python -m slurm.rehearsal preempt          # a job of the higher partition takes all nodes for 20 s
    python -m slurm.rehearsal kill-node n2     # n2 loses power
    python -m slurm.rehearsal revive-node n2
    python -m slurm.rehearsal stop

Needs Debian's or Ubuntu's package slurm-wlm, and no other SLURM on the machine. All is on loopback, on ports that are
free, in one directory (default: uvit-rehearsal-USER below the temporary directory).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from slurm.rehearsal.cluster import Cluster, missing_programs, needed

ACTIONS = ("start", "status", "preempt", "kill-node", "revive-node", "stop")


def main() -> int:
    """The command line. Returns the exit code."""
    default = Path(tempfile.gettempdir(), f"uvit-rehearsal-{os.environ.get('USER', os.geteuid())}")
    parser = argparse.ArgumentParser(
        prog="python -m slurm.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=ACTIONS, metavar="action", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument("node", nargs="?", help="n0 to n3: for kill-node and revive-node")
    parser.add_argument("--dir", type=Path, default=default, help=f"where the cluster lives (default: {default})")
    parser.add_argument("--seconds", type=float, default=20, help="preempt: for how long (default: 20)")
    arguments = parser.parse_args()
    if arguments.action.endswith("-node") != (arguments.node is not None):
        parser.error("kill-node and revive-node need a node, n0 to n3; the others none")
    cluster = Cluster(arguments.dir, outlives=True)
    if missing_programs():
        print(f"error: {needed()}", file=sys.stderr)
        return 69
    if arguments.action == "start":
        return start(cluster)
    if not cluster.is_running:
        print(
            f"error: no rehearsal cluster runs in {arguments.dir}; start one: python -m slurm.rehearsal start",
            file=sys.stderr,
        )
        return 69
    try:
        act(cluster, arguments)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 69
    return 0


def start(cluster: Cluster) -> int:
    """Start it, if it does not run, and say how to use it. Returns the exit code."""
    if not cluster.is_running:
        shutil.rmtree(cluster.directory, ignore_errors=True)
        try:
            cluster.start()
        except RuntimeError as error:
            cluster.stop()
            print(f"error: {error}", file=sys.stderr)
            return 69
    print(f"{len(cluster.nodes)} nodes, {', '.join(cluster.nodes)}; now in your shell:\n", file=sys.stderr)
    print(f"export SLURM_CONF={cluster.conf}")
    return 0


def act(cluster: Cluster, arguments: argparse.Namespace) -> None:
    """Do what was asked, and say what was done."""
    if arguments.action == "status":
        print(f"export SLURM_CONF={cluster.conf}")
        print(cluster.command("sinfo", "--Node", "--partition=low", "-o", "%.6N %.10T"), end="")
        print(cluster.queue(), end="")
    elif arguments.action == "preempt":
        print(f"job {cluster.preempt(arguments.seconds)} wants all nodes, for {arguments.seconds:g} s")
    elif arguments.action == "kill-node":
        cluster.kill_node(arguments.node)
        print(f"{arguments.node} is dead: its slurmd and all that ran there")
    elif arguments.action == "revive-node":
        cluster.revive_node(arguments.node)
        print(f"{arguments.node} is idle")
    else:
        cluster.stop()
        shutil.rmtree(cluster.directory, ignore_errors=True)
        print("stopped; unset SLURM_CONF")


if __name__ == "__main__":
    sys.exit(main())
