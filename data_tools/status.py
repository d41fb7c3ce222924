"""How far the jobs are that write shards into a directory.

    python -m data_tools.status data/imagenet512
    python -m data_tools.status s3://bucket/imagenet512 --watch 30

By what lies there: the jobs need not be asked.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from data_tools.shard_set import storage_options, use_storage
from data_tools.units import JOB, MERGED, WORK, State
from uvit_dist import storage
from uvit_dist.errors import MissingInputError, explained_exit
from uvit_dist.work import holders


def jobs_in(directory: str) -> dict[str, list[str]]:
    """Work directory → names of its files, of the jobs whose shards go to a directory.

    Raises ``MissingInputError`` where there is none.
    """
    work = storage.join(directory, WORK)
    found: dict[str, list[str]] = {}
    for path in storage.tree(work):
        job, slash, name = path.partition("/")
        if slash and "/" not in name:
            found.setdefault(storage.join(work, job), []).append(name)
    found = {job: names for job, names in found.items() if JOB in names}
    if not found:
        raise MissingInputError(f"{directory}: no job that writes shards has run here; give the folder of its index")
    return found


def describe(work: str, names: list[str]) -> str:
    """Some lines on one job. names: the files of its work directory."""
    job = json.loads(storage.read_bytes(storage.join(work, JOB)))
    state, held = State.of(names), holders(work, names)
    images = _images_done(job, state) + sum(told["progress"].get("images", 0) for told in held.values())
    share = images / max(1, job["images"])
    lines = [f"{job['index']}: {job['source']}"]
    done = f"{len(state.done)} of {job['units']} units, {images:,} of {job['images']:,} images ({share:.1%})"
    lines.append(f"  {'complete: ' if MERGED in names else ''}{done}, {state.bad} images left out")
    rates = {unit: told["progress"].get("images_per_s", 0.0) for unit, told in held.items()}
    workers: dict[str, tuple[str, float, list[str]]] = {}
    for unit, told in sorted(held.items()):
        name, rate, units = workers.get(told["token"], (f"{told['host']} ({told['pid']})", 0.0, []))
        workers[told["token"]] = name, max(rate, rates[unit]), [*units, unit]
    for name, rate, units in workers.values():
        lines.append(f"  {name}: {rate:.1f} images/s, {', '.join(units)}")
    total = sum(rate for _, rate, _ in workers.values())
    if total and MERGED not in names:
        left = (job["images"] - images) / total
        lines.append(f"  {len(workers)} worker(s), {total:.1f} images/s, {_time(left)} left")
    if held:
        lines.append(f"  a worker that was killed is listed until others have missed it for {job['lease_s']:g} s")
    return "\n".join(lines)


def _images_done(job: dict[str, Any], state: State) -> int:
    last = job["images"] - (job["units"] - 1) * job["per_unit"]
    return sum(last if unit.endswith(f"-{job['units'] - 1:06d}") else job["per_unit"] for unit in state.done)


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="folder or URL prefix of the index")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="tell again and again, until it is complete")
    storage_options(parser)
    args = parser.parse_args()
    with explained_exit():
        use_storage(args)
        while True:
            jobs = jobs_in(args.directory)
            print("\n".join(describe(work, names) for work, names in jobs.items()), flush=True)
            if args.watch is None or all(MERGED in names for names in jobs.values()):
                return
            time.sleep(args.watch)


if __name__ == "__main__":
    main()
