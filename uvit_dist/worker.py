"""One rank's entry: under the local launcher, a supervisor's ``srun``, torchrun on any number of machines, or alone.

    python -m uvit_dist.worker --config configs/digits_demo.yaml --job train
    torchrun --nproc-per-node 2 -m uvit_dist.worker --config configs/digits_demo.yaml --job train

The configuration is taken as it is: overrides are the launcher's, which writes what results to a file of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from uvit_dist import misfits, stopping, storage, watchdog
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import INTERRUPTED_EXIT_CODE, ConfigError, HardwareError, OutputError, UserError, explained_exit
from uvit_dist.metrics import log_file
from uvit_dist.preemption import StopFlag

JOBS = ("train", "evaluate", "precompute", "reference")
SLURM_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
    "NODE_RANK": "SLURM_NODEID",
}
"""What torchrun's variables are called in a step of a supervisor's, which sets MASTER_ADDR and MASTER_PORT itself."""
LAUNCHER_VARIABLE = "UVIT_DIST_LAUNCHER"
"""Set by the launcher to its process id; it then speaks for all ranks, and they die with it."""

SHARED_JOBS = ("evaluate", "precompute", "reference")
"""Jobs whose workers share the work by leases, on any number of machines: no process group, no lock of run_dir."""
FULL_OR_READ_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

log = logging.getLogger("uvit_dist.worker")


def error_file(run_dir: str, rank: int, name: str = "") -> Path:
    """Where a rank that fails leaves a record of why. name: of the job, where it is not the run's training."""
    return Path(run_dir, "logs", name, f"rank-{rank:05d}.error.json")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux): a job must not live on without its starter."""
    if sys.platform.startswith("linux"):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _be_supervised(config: Config, name: str, on_stop: Callable[[], None]) -> None:
    """Take this rank's place in a step of the supervisor's: its variables, its log, its beats."""
    for ours, slurms in SLURM_VARIABLES.items():
        os.environ[ours] = os.environ[slurms]
    rank = int(os.environ["RANK"])
    path = log_file(config.run_dir, rank, name)
    storage.make_directory(str(path.parent))
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    if rank != 0:  # rank 0 is heard in the batch job's log
        os.dup2(descriptor, 2)
    watchdog.register_stacks(descriptor)
    watchdog.start(rank, descriptor, on_stop)


def _stopping(job: str) -> tuple[StopFlag | None, Callable[[], None]]:
    """The flag of a training, raised by signals; and what the supervisor's "stop" does. For the main thread."""
    if job == "train":
        flag = StopFlag()
        return flag, flag.raise_now
    stopping.tell(lambda: watchdog.progress(watchdog.WORKING))
    # The other jobs stop at SIGTERM, each in its way.
    signal.signal(signal.SIGUSR2, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    return None, lambda: os.kill(os.getpid(), signal.SIGTERM)


def _run(job: str, config: Config, name: str, stop: StopFlag | None) -> int:
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from uvit_dist import dist, metrics
    from uvit_dist.host_memory import keep_memory

    ranks = dist.ranks_from_environment()
    metrics.set_up_logging(config.run_dir, ranks, name)
    storage.configure(config.storage)
    if job in ("precompute", "reference"):
        from data_tools import fid_reference, shard_job

        watchdog.progress(watchdog.WORKING)
        try:
            if job == "reference":
                log.info(fid_reference.write_reference(config))
            else:
                shard_job.run(config)
        except KeyboardInterrupt:
            return INTERRUPTED_EXIT_CODE
        return 0
    if job == "reference":
        from data_tools.fid_reference import write_reference

        watchdog.progress(watchdog.WORKING)
        log.info("%s", write_reference(config))
        return 0
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if ranks.device.type == "cpu":
        keep_memory()
    watchdog.progress(watchdog.JOINING)
    if job == "preflight":
        from uvit_dist.rank_check import check_ranks

        check_ranks(config, ranks)
        return 0
    if job == "evaluate":
        from uvit_dist.evaluate import evaluate

        watchdog.progress(watchdog.WORKING)
        try:
            log.info("scores: %s", json.dumps(evaluate(config, ranks)))
        except KeyboardInterrupt:
            return INTERRUPTED_EXIT_CODE
        return 0
    from uvit_dist.train import train

    assert stop is not None
    dist.start(ranks, config.launch.timeout_s)
    return 0 if train(config, ranks, stop) else INTERRUPTED_EXIT_CODE


def _explain(error: Exception) -> tuple[int, str, bool]:
    """Exit code, message, and whether it is something that a user can mend."""
    if isinstance(error, UserError):
        return error.exit_code, str(error), True
    if isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY:
        return OutputError.exit_code, f"{error}; make room or mend the permissions, and start again", True
    wrong = misfits.explained(error)
    if wrong is not None:
        return ConfigError.exit_code, wrong, True
    hint = "; python -m uvit_dist.doctor says more of the packages" if isinstance(error, ImportError) else ""
    return 1, f"{type(error).__name__}: {error}{hint}", False


def _tell(path: Path, rank: int, code: int, message: str, mistake: bool) -> None:
    """Leave a failure in the rank's log file and in a record; on stderr if nobody else speaks for the ranks.

    path: of the record.
    """
    files = [h for h in logging.getLogger("uvit_dist").handlers if isinstance(h, logging.FileHandler)]
    traceback = None if mistake else sys.exc_info()
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (message,), traceback)
    for handler in files:
        handler.handle(record)
    if path.parent.is_dir():
        with contextlib.suppress(OSError):
            path.write_text(json.dumps({"rank": rank, "code": code, "message": message, "mistake": mistake}))
    if LAUNCHER_VARIABLE not in os.environ and watchdog.VARIABLE not in os.environ:
        print(f"error: {message}", file=sys.stderr)


def main() -> None:
    """Run one rank of a job. A failure is told in the log file, on stderr and, for the launcher, in a record."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the resolved configuration")
    parser.add_argument("--job", required=True, choices=(*JOBS, "preflight"), help="what to do")
    parser.add_argument("--name", default="", help="name of the job in its run, for its logs (default: the run's own)")
    args = parser.parse_args()
    stop, on_stop = _stopping(args.job)
    supervised = watchdog.VARIABLE in os.environ
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None:
        die_with_parent()
        if os.getppid() != int(launcher):  # it ended before the line above
            sys.exit(1)
    with explained_exit():
        config = load_config(args.config)
        if supervised:
            _be_supervised(config, args.name, on_stop)
    rank = os.environ.get("RANK", "0")
    number = int(rank) if rank.isdigit() else 0
    alone = launcher is None and not supervised and rank == "0" and args.job not in SHARED_JOBS
    message, mistake, blamed = "", False, tuple[int, ...]()
    try:
        with storage.locked(_made(config.run_dir)) if alone else contextlib.nullcontext():
            code = _run(args.job, config, args.name, stop)
    except Exception as error:  # noqa: BLE001 - told in full in the log; the terminal gets the message alone
        code, message, mistake = _explain(error)
        blamed = error.ranks if isinstance(error, HardwareError) else ()
        _tell(error_file(config.run_dir, number, args.name), number, code, message, mistake)
    watchdog.end(code, message, mistake, blamed)
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    # Leave at once: after a failed collective the interpreter's own shutdown can wait for the ranks that are gone.
    os._exit(code)


def _made(run_dir: str) -> str:
    storage.make_directory(run_dir)
    return run_dir


if __name__ == "__main__":
    main()
