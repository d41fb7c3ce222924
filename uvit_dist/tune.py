"""Find the micro-batch, checkpointing and ZeRO stage that train fastest on the GPU at hand, and say why.

    python -m uvit_dist.tune --config configs/uvit_h_imagenet512.yaml
    python -m uvit_dist.tune --config configs/uvit_h_imagenet512.yaml launch.nodes=8 --bus 400

The forecast leaves out what does not fit, or cannot be faster. The rest is measured: whole updates of one rank on
synthetic batches, no data needed. What one process cannot show is added by arithmetic and said to be: the state that
the ranks of launch.nodes x launch.processes_per_node share, and their communication. The global batch stays as it is.
Without a GPU time is measured and memory is the forecast's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from uvit_dist import forecast, tuning
from uvit_dist.config import Config
from uvit_dist.config_cluster import read_profile
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import ConfigError, UnavailableError, explained_exit
from uvit_dist.tuning import GB, Candidate

ANSWER = "uvit_dist.trial: "
MOST_PASSES = 4
"""Micro-batches of an update that are measured at most; more of them only repeat."""
START_S, LAST_S, SHARE_OF_TRIAL = 20.0, 2.0, 0.5
"""Seconds that a new process needs, assumed; seconds kept to print; of a trial's time, that for its counted steps."""


class Trials:
    """The process that measures, and its answers. It is started anew where it has died or hung."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.hello = deadline, dict[str, Any]()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the trials
        self._lines: queue.Queue[str | None] = queue.Queue()

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def start(self) -> None:
        """Start the process and learn what device it has. Raises ``UnavailableError`` where it does not start."""
        self._lines = queue.Queue()
        command = [sys.executable, "-m", "uvit_dist.trial"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                                         text=True)  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True)
        self._reader.start()
        hello = self._answer()
        if "error" in hello:
            raise UnavailableError(f"the process that measures did not start: {hello['error']}; see --seconds")
        self.hello = hello

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ANSWER):
                lines.put(line.removeprefix(ANSWER))
        lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.1, self.left_s))
        except queue.Empty:
            self.close()
            return {"error": "not done when the time was over"}
        if line is None:
            self._errors.seek(0)
            told = self._errors.read().strip().splitlines()
            self.close()
            return {"error": f"the process died: {told[-1] if told else 'without a word'}"}
        return dict(json.loads(line))

    def ask(self, config: Config, limit_s: float) -> dict[str, Any]:
        """What ``trial.measure`` found, or {"error": why not}."""
        if self._process is None:
            if self.left_s < START_S:
                return {"error": "the time was over"}
            try:
                self.start()
            except UnavailableError as error:  # what was measured before is worth having
                return {"error": str(error)}
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then the answer says why
            self._process.stdin.write(json.dumps({"config": config.model_dump(mode="json"), "limit_s": limit_s}) + "\n")
            self._process.stdin.flush()
        found = self._answer()
        if found.get("left", 0) > 0.02 * (self.hello["memory"] or 1e30):  # would be missing from the next
            self.close()
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            if self._reader is not None:
                self._reader.join()  # its pipe has ended with the process
            with contextlib.suppress(BrokenPipeError), self._process:
                pass  # closes the pipes and waits
            self._process = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._errors.close()


@dataclass(frozen=True)
class Measured:
    """A candidate's update, seconds: of one rank's computation, and with communication, assumed. Memory in bytes.

    peak: measured here, none without a GPU; predicted: the forecast of the same; whole: on all ranks together.
    """

    candidate: Candidate
    compute_s: float
    update_s: float
    spread: float
    peak: float | None
    predicted: float
    whole: float


def trial_config(config: Config, candidate: Candidate, world_size: int) -> Config:
    """One rank's part of an update, for one process: no more than MOST_PASSES micro-batches of it."""
    passes = min(MOST_PASSES, tuning.passes(config, candidate, world_size))
    tree = candidate.applied(config).model_dump(mode="json")
    tree["launch"] |= {"target": "local", "nodes": 1, "processes_per_node": 1}
    tree["train"] |= {"global_batch_size": passes * candidate.micro}
    tree["data"] |= {"lanes": 1}
    del tree["profile"]  # that of a run
    return Config.model_validate_json(json.dumps(tree))


def measured(config: Config, candidate: Candidate, world_size: int, found: dict[str, Any], bus: float) -> Measured:
    """What was found, carried over to all passes and ranks: a rank updates its share of the weights, once."""
    local = trial_config(config, candidate, world_size)
    here = forecast.gpu_memory(local.model, local.train, local.zero, 1, candidate.micro)
    there = tuning.memory(config, candidate, world_size)
    passes = tuning.passes(config, candidate, world_size)
    update_s = found["update_s"] / (world_size if candidate.stage else 1)
    compute_s = (found["step_s"] - found["update_s"]) * passes / min(MOST_PASSES, passes) + update_s
    extra = tuning.communication_s(config, candidate, world_size, bus)
    used = found.get("used")
    whole = there.total if used is None else used - here.total + there.total
    return Measured(candidate, compute_s, compute_s + extra, found["spread"], found.get("peak"),
                    here.total - here.allowance, whole)  # fmt: skip


def tune(config: Config, seconds: float, bus: float, memory_gb: float | None) -> Iterator[str]:
    """Lines of the report, as they come. bus: bytes a second. Raises ``UserError`` of the right kind."""
    begun = time.monotonic()
    world_size = config.world_size
    with Trials(begun + seconds - LAST_S) as trials:
        trials.start()
        device, memory = trials.hello["device"], trials.hello["memory"]
        whence = "measured" if memory else "assumed: the profile's gpu_memory_gb"
        room = memory or read_profile(config.launch.cluster).gpu_memory_gb * GB
        if memory_gb is not None:
            room, whence = memory_gb * GB, "given"
        batch = config.train.global_batch_size
        yield f"{device}, {room / GB:.1f} GB [{whence}]; {world_size} rank(s) of {batch // world_size} images each"
        candidates, left_out = tuning.propose(config, world_size, room)
        yield "left out by the forecast"
        for why in dict.fromkeys(why for _, why in left_out):
            yield f"  {'; '.join(what for what, reason in left_out if reason == why)}: {why}"
        yield f"measured on one rank, synthetic batches, {config.train.precision}"
        rows: list[Measured] = []
        untried: list[tuple[Candidate, str]] = []
        for number, candidate in enumerate(candidates):
            reason = tuning.skipped(candidate, {row.candidate: candidate_rate(config, row) for row in rows})
            share = trials.left_s / (len(candidates) - number)
            if reason is None and trials.left_s < max(1.0, LAST_S):
                reason = "the time was over"
            if reason is not None:
                untried.append((candidate, reason))
                continue
            found = trials.ask(trial_config(config, candidate, world_size), SHARE_OF_TRIAL * share)
            if "error" in found:
                untried.append((candidate, found["error"]))
                continue
            row = measured(config, candidate, world_size, found, bus)
            if memory and row.whole > room:
                untried.append((candidate, f"took {row.whole / GB:.1f} GB, carried over to {world_size} rank(s)"))
                continue
            rows.append(row)
        yield from report(config, rows, untried, bus)
        yield f"took {time.monotonic() - begun:.0f} s of {seconds:g}"


def candidate_rate(config: Config, row: Measured) -> float:
    """Images a second of all ranks."""
    return config.train.global_batch_size / row.update_s


def report(config: Config, rows: list[Measured], untried: list[tuple[Candidate, str]], bus: float) -> Iterator[str]:
    """The table, the choice and its reasons. Raises ``ConfigError`` where nothing ran."""
    world_size, batch = config.world_size, config.train.global_batch_size
    if not rows:
        told = "; ".join(f"{candidate}: {reason}" for candidate, reason in untried)
        raise ConfigError(f"nothing could be measured: {told}; raise --seconds, or take a smaller network")
    head = ("micro-batch", "activations", "ZeRO", "images/s of a rank", "spread", "GB measured", "GB predicted",
            f"GB on {world_size} rank(s)", "communication, ms", "images/s in all")  # fmt: skip
    yield from tuning.table(
        [head] + [
            (str(row.candidate.micro), forecast.KEPT[row.candidate.checkpointing], str(row.candidate.stage),
             f"{batch / world_size / row.compute_s:,.2f}", f"{row.spread:.0%}",
             "-" if row.peak is None else f"{row.peak / GB:.2f}", f"{row.predicted / GB:.2f}", f"{row.whole / GB:.2f}",
             f"{1e3 * (row.update_s - row.compute_s):.1f}", f"{candidate_rate(config, row):,.2f}")
            for row in rows
        ]
    )  # fmt: skip
    yield f"  communication by theory at {bus / GB:g} GB/s of a rank [given or assumed: --bus], nothing hidden"
    yield from (f"  not measured: {candidate}: {reason}" for candidate, reason in untried)
    rates = {row.candidate: candidate_rate(config, row) for row in rows}
    best, own = tuning.fastest(rates), tuning.own_setting(config, world_size)
    passes = tuning.passes(config, best, world_size)
    yield f"fastest: {best}"
    if own == best:
        yield "  the configuration has it already"
    elif own in rates:
        yield f"  {rates[best] / rates[own]:.2f} times the configuration's own setting ({own})"
    else:
        yield f"  the configuration's own setting ({own}) was not measured"
    yield f"  {batch} = {best.micro} images x {passes} pass(es) x {world_size} rank(s): the global batch stays"
    yield "for the configuration:"
    yield tuning.as_yaml(best)
    yield f"or behind a command: {' '.join(best.overrides())}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--seconds", type=float, default=120, help="after which it ends (default: %(default)s)")
    parser.add_argument(
        "--bus",
        type=float,
        default=50,
        metavar="GB/S",
        help="what a rank sends in a second in a ring over all (default: %(default)s, assumed)",
    )
    parser.add_argument("--memory-gb", type=float, help="memory of a GPU, 10^9 bytes (default: of the GPU here)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    if min(args.seconds, args.bus, args.memory_gb or 1) <= 0:
        parser.error("--seconds, --bus and --memory-gb must be more than 0")
    with explained_exit():
        for line in tune(load_config(args.config, args.overrides), args.seconds, args.bus * GB, args.memory_gb):
            print(line, flush=True)


if __name__ == "__main__":
    main()
