"""Starts, breaks and stops a SLURM cluster of several nodes on this machine, on loopback, in one directory.

Each node is a slurmd of its own. Two partitions share them: "low", whose jobs are preempted and requeued after a grace
time, and "high". Jobs and nodes are real: a node dies by SIGKILL to all that runs on it. Only what was started here is
ended, by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from slurm.rehearsal.processes import command_of, daemon_processes, is_rank, is_running, job_processes, node_of

INSTALL = "apt-get install --no-install-recommends slurm-wlm"
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n0", "n1", "n2", "n3")
STATE = "rehearsal.json"
START_S, STOP_S = 30.0, 15.0
CONF = """\
ClusterName=rehearsal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
AuthInfo=cred_expire={hold_s}
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
KillWait=5
SlurmdTimeout={node_timeout_s}
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
{nodes}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 GraceTime={grace_s} PreemptMode=REQUEUE State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing_programs() -> list[str]:
    """SLURM's programs that are not there; INSTALL brings them."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


def needed() -> str:
    """What to do where programs are missing."""
    return f"{', '.join(missing_programs())}: not installed; {INSTALL}"


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


class Cluster:
    """A SLURM cluster in a directory, of this process or of an earlier one (``Cluster(directory)`` finds it again).

    cpus: of each node, whatever the machine has; grace_s: between the warning and the end of a preempted job;
    node_timeout_s: silence after which SLURM calls a node DOWN; hold_s: how long a requeued job waits (SLURM's default:
    120); outlives: whether the daemons live on when the thread that started them ends.
    """

    def __init__(
        self,
        directory: str | Path,
        nodes: int = 4,
        cpus: int = 8,
        grace_s: int = 20,
        node_timeout_s: int = 15,
        hold_s: int = 5,
        outlives: bool = False,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.nodes = tuple(f"n{number}" for number in range(nodes))
        self._cpus, self._grace_s, self._node_timeout_s, self._hold_s = cpus, grace_s, node_timeout_s, hold_s
        self._bound = [] if outlives else ["setpriv", "--pdeathsig", "KILL"]
        self._children: list[subprocess.Popen[bytes]] = []

    # -- its life --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def conf(self) -> Path:
        """The configuration: what SLURM_CONF must name."""
        return self.directory / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, but of no other cluster: SLURM's commands find this one."""
        others = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_")
        mine = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        return {**mine, "SLURM_CONF": str(self.conf)}

    @property
    def is_running(self) -> bool:
        """Whether its controller runs."""
        return any(is_running(pid) for name, pid in self._pids().items() if name == "slurmctld")

    def start(self) -> None:
        """Start all, and wait until the nodes are idle. Raises ``RuntimeError`` with the ends of the logs."""
        if missing_programs():
            raise RuntimeError(needed())
        for name in ("state", "spool"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        lines = [
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs={self._cpus} RealMemory=20000"
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        self.conf.write_text(
            CONF.format(
                host=host, controller_port=controller_port, user=_user(),
                node_timeout_s=self._node_timeout_s, directory=self.directory, nodes="\n".join(lines),
                names=",".join(self.nodes), grace_s=self._grace_s, hold_s=self._hold_s,
            )
        )  # fmt: skip
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._spawn("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.conf)])
        for name in self.nodes:
            self.revive_node(name, wait=False)
        self._wait(lambda: len(self.idle_nodes()) == len(self.nodes), START_S, "the nodes are not idle")

    def stop(self) -> None:
        """End all jobs, nodes and the controller."""
        with contextlib.suppress(subprocess.SubprocessError, OSError, RuntimeError):  # where the controller is gone
            self.command("scancel", "--full", f"--user={_user()}", check=False)
            self._wait(lambda: not self.jobs(), STOP_S, "jobs are left")
        pids = [pid for pid in self._pids().values() if str(self.conf) in command_of(pid)]
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.05)
        for pid in [*pids, *self._daemons(*self.nodes), *self.processes()]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._reap()
        (self.directory / STATE).unlink(missing_ok=True)

    def _spawn(self, name: str, command: list[str]) -> None:
        with open(self.directory / f"{name}.out", "ab") as out:
            child = subprocess.Popen(
                [*self._bound, *command], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment,
                cwd=self.directory, start_new_session=True,
            )  # fmt: skip
        self._children.append(child)
        (self.directory / STATE).write_text(json.dumps({**self._pids(), name: child.pid}))

    def _pids(self) -> dict[str, int]:
        """slurmctld, and slurmd-NODE → process id."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.directory / STATE).read_text()))
        return {}

    def _reap(self) -> None:
        for child in self._children:
            child.poll()

    def _wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                logs = sorted([*self.directory.glob("*.log"), *self.directory.glob("*.out")])
                tails = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-500:]}" for path in logs)
                raise RuntimeError(f"{what}, after {limit_s:g} s; squeue:\n{self.queue()}\n{tails}")
            time.sleep(0.1)

    # -- what it tells ---------------------------------------------------------------------------------------------

    def command(self, *arguments: str, check: bool = True, timeout_s: float = 30) -> str:
        """What one of SLURM's commands prints. check: raise ``CalledProcessError`` where it fails."""
        done = subprocess.run(
            arguments, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, arguments, done.stdout, done.stderr)
        return done.stdout

    def idle_nodes(self) -> list[str]:
        """The nodes that could start a job."""
        lines = self.command("sinfo", "--noheader", "--partition=low", "-N", "-o", "%N %t", check=False).splitlines()
        return [line.split()[0] for line in lines if line.split()[1:] == ["idle"]]

    def living_nodes(self) -> list[str]:
        """The nodes whose slurmd runs."""
        return [name for name in self.nodes if is_running(self._pids().get(f"slurmd-{name}", -1))]

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by name; empty where it knows no such job."""
        text = self.command("scontrol", "--oneliner", "show", "job", job_id, check=False)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def state(self, job_id: str) -> str:
        """The job's state, as RUNNING; "" where it is not known any more."""
        return self.job(job_id).get("JobState", "")

    def queue(self) -> str:
        """What ``squeue`` prints: the jobs that are not over."""
        return self.command("squeue", "-o", "%.8i %.9P %.24j %.10T %.8M %.5D %R", check=False)

    def jobs(self) -> list[str]:
        """The ids of jobs that are pending or running."""
        return self.command("squeue", "--noheader", "-o", "%i", check=False).split()

    def wait_state(self, job_id: str, *states: str, limit_s: float = 60) -> str:
        """Wait until the job is in one of the states; returns which. Raises ``RuntimeError`` when the time is over."""
        self._wait(lambda: self.state(job_id) in states, limit_s, f"job {job_id} is not {' or '.join(states)}")
        return self.state(job_id)

    # -- processes -------------------------------------------------------------------------------------------------

    def processes(self, node: str | None = None, containing: str = "") -> list[int]:
        """Processes of jobs on a node (none: on any), whose command line holds the text, without slurmstepd's."""
        return job_processes(self.conf, node, containing)

    def rank_process(self, rank: int, containing: str = "uvit_dist.worker") -> int:
        """The process of a rank of the running step. Raises ``LookupError`` where there is none or several."""
        found = [pid for pid in self.processes(containing=containing) if is_rank(pid, rank)]
        if len(found) != 1:
            raise LookupError(f"rank {rank}: processes {found}")
        return found[0]

    def node_of(self, pid: int) -> str:
        """The node that a job's process runs on."""
        return node_of(pid)

    def _daemons(self, *nodes: str) -> list[int]:
        """slurmd and slurmstepd processes of those nodes."""
        return list(daemon_processes({str(self.directory / f"slurmd-{name}.log") for name in nodes}))

    def path_without(self, *programs: str) -> str:
        """A value of PATH that has everything but those: as on clusters whose compute nodes have no ``scontrol``."""
        directory = self.directory / "-".join(["path-without", *programs])
        directory.mkdir(exist_ok=True)
        for folder in reversed(os.environ["PATH"].split(os.pathsep)):
            for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
                if entry.name not in programs:
                    (directory / entry.name).unlink(missing_ok=True)
                    (directory / entry.name).symlink_to(entry)
        return str(directory)

    # -- faults ----------------------------------------------------------------------------------------------------

    def kill_node(self, node: str) -> None:
        """The node loses power: its slurmd, all slurmstepd and all processes of jobs there are killed.

        They stop first, so that none lives to see, and to answer, the death of another. Returns when all are gone.
        Raises ``ValueError`` where there is no such node, ``RuntimeError`` where one does not go.
        """
        self._check(node)
        killed: set[int] = set()
        for number in (signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL):  # twice: what was started meanwhile, too
            for pid in [*self._daemons(node), *self.processes(node)]:
                killed.add(pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        self._wait(lambda: not any(map(is_running, killed)), STOP_S, f"{node} does not die")
        self._reap()

    def revive_node(self, node: str, wait: bool = True) -> None:
        """The node boots. wait: until SLURM calls it idle. Raises ``ValueError`` where there is no such node."""
        self._check(node)
        (self.directory / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._spawn(f"slurmd-{node}", ["slurmd", "-D", "-c", "-N", node, "-f", str(self.conf)])
        if wait:
            self._wait(lambda: node in self.idle_nodes(), START_S + self._node_timeout_s, f"{node} is not idle")

    def _check(self, node: str) -> None:
        if node not in self.nodes:
            raise ValueError(f"{node}: no such node; they are {', '.join(self.nodes)}")

    def preempt(self, seconds: float = 5) -> str:
        """Submit a job of the higher partition that wants all nodes for so long. Returns its id."""
        return self.command(
            "sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodes={len(self.nodes)}",
            f"--output={self.directory}/preempting-%j.out", f"--wrap=sleep {seconds:g}",
        ).strip()  # fmt: skip
