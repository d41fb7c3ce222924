"""One rank's entry: ``python -m uvit_dist.worker --config RESOLVED.yaml --job train`` under a launcher or torchrun."""

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
from pathlib import Path

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import INTERRUPTED_EXIT_CODE, OutputError, UserError, explained_exit

JOBS = ("train", "evaluate", "precompute", "reference")
LAUNCHER_VARIABLE = "UVIT_DIST_LAUNCHER"
"""Set by the launcher to its process id; it then speaks for all ranks, and they die with it."""

SHARED_JOBS = ("evaluate", "precompute", "reference")
"""Jobs whose workers share the work by leases, on any number of machines: no process group, no lock of run_dir."""
FULL_OR_READ_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

log = logging.getLogger("uvit_dist.worker")


def error_file(run_dir: str, rank: int) -> Path:
    """Where a rank that fails leaves a record of why."""
    return Path(run_dir, "logs", f"rank-{rank:05d}.error.json")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux): a job must not live on without its starter."""
    if sys.platform.startswith("linux"):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(job: str, config: Config) -> int:
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from uvit_dist import dist, metrics

    ranks = dist.ranks_from_environment()
    metrics.set_up_logging(config.run_dir, ranks)
    storage.configure(config.storage)
    if job in ("precompute", "reference"):
        from data_tools import fid_reference, shard_job

        try:
            if job == "reference":
                log.info(fid_reference.write_reference(config))
            else:
                shard_job.run(config)
        except KeyboardInterrupt:
            return INTERRUPTED_EXIT_CODE
        return 0
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if job == "evaluate":
        from uvit_dist.evaluate import evaluate

        try:
            log.info("scores: %s", json.dumps(evaluate(config, ranks)))
        except KeyboardInterrupt:
            return INTERRUPTED_EXIT_CODE
        return 0
    from uvit_dist.preemption import StopFlag
    from uvit_dist.train import train

    stop = StopFlag()
    dist.start(ranks, config.launch.timeout_s)
    return 0 if train(config, ranks, stop) else INTERRUPTED_EXIT_CODE


def _explain(error: Exception) -> tuple[int, str, bool]:
    """Exit code, message, and whether it is something that a user can mend."""
    if isinstance(error, UserError):
        return error.exit_code, str(error), True
    if isinstance(error, OSError) and error.errno in FULL_OR_READ_ONLY:
        return OutputError.exit_code, f"{error}; make room or mend the permissions, and start again", True
    return 1, f"{type(error).__name__}: {error}", False


def _tell(run_dir: str, rank: int, code: int, message: str, mistake: bool) -> None:
    """Leave a failure in the rank's log file and, for the launcher, in a record; on stderr if there is no launcher."""
    files = [h for h in logging.getLogger("uvit_dist").handlers if isinstance(h, logging.FileHandler)]
    traceback = None if mistake else sys.exc_info()
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s", (message,), traceback)
    for handler in files:
        handler.handle(record)
    path = error_file(run_dir, rank)
    if path.parent.is_dir():
        with contextlib.suppress(OSError):
            path.write_text(json.dumps({"rank": rank, "code": code, "message": message, "mistake": mistake}))
    if LAUNCHER_VARIABLE not in os.environ:
        print(f"error: {message}", file=sys.stderr)


def main() -> None:
    """Run one rank of a job. A failure is told in the log file, on stderr and, for the launcher, in a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the resolved configuration")
    parser.add_argument("--job", required=True, choices=JOBS)
    args = parser.parse_args()
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None:
        die_with_parent()
        if os.getppid() != int(launcher):  # it ended before the line above
            sys.exit(1)
    with explained_exit():
        config = load_config(args.config)
    rank = os.environ.get("RANK", "0")
    alone = launcher is None and rank == "0" and args.job not in SHARED_JOBS
    try:
        with storage.locked(_made(config.run_dir)) if alone else contextlib.nullcontext():
            code = _run(args.job, config)
    except Exception as error:  # noqa: BLE001 - told in full in the log; the terminal gets the message alone
        code, message, mistake = _explain(error)
        _tell(config.run_dir, int(rank) if rank.isdigit() else 0, code, message, mistake)
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
