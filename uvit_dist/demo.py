"""The whole job on real images in minutes: latents, training, sampling, scoring, with the commands a user would type.

    python -m uvit_dist.demo          (or: make demo)

Interrupted, and run again, it goes on where it was. Ends with a table of results and controls and, as the last line of
standard output, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from uvit_dist.config_yaml import load_config
from uvit_dist.errors import explained_exit
from uvit_dist.worker import die_with_parent

MIN_CLASS_ACCURACY, MIN_RECALL, MAX_DISTANCE_RATIO = 0.9, 0.5, 8.0
UNTRAINED = "evaluate.weights=untrained"


def run(module: str, *arguments: str) -> None:
    """Print a command as a user would type it and run it; end with its exit code if it fails.

    A Ctrl-C reaches the command from the terminal, a SIGTERM from here; it saves and ends, and so do we. If we are
    killed, it is killed too.
    """
    print(f"\n$ {shlex.join(['python', '-m', module, *arguments])}", flush=True)
    signal.signal(signal.SIGINT, lambda *_: None)
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], preexec_fn=die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    code = process.wait()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def processes_here(wanted: int) -> int:
    """As many ranks as wanted, or as there are GPUs if there are fewer: two ranks cannot share one."""
    import torch

    return min(wanted, torch.cuda.device_count() or wanted)


def scores_of(run_dir: str, weights: str) -> dict[str, Any]:
    """The newest scores of a run for a kind of weights."""
    lines = Path(run_dir, "evaluation", "scores.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["weights"] == weights][-1]


def passes(scores: dict[str, Any]) -> list[bool]:
    """Class accuracy, recall and distance against what the demo must reach."""
    return [
        scores["class_accuracy"] >= MIN_CLASS_ACCURACY,
        scores["recall"] >= MIN_RECALL,
        scores["frechet_distance"] <= MAX_DISTANCE_RATIO * scores["frechet_distance_real_halves"],
    ]


def table(trained: dict[str, Any], untrained: dict[str, Any]) -> str:
    """Results beside their controls, as text."""
    names = ("class_accuracy", "recall", "frechet_distance")
    rows = [
        ("", "as asked", "recall", "Fréchet distance"),
        ("one half of the real digits against the other", *(trained[f"{n}_real_halves"] for n in names)),
        (f"U-ViT, EMA weights of step {trained['step']}", *(trained[n] for n in names)),
        ("untrained weights", *(untrained[n] for n in names)),
    ]
    texts = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in texts
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/digits_demo.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    with explained_exit():
        config = load_config(args.config, args.overrides)
        ranks = processes_here(config.launch.processes_per_node)
        changes = list(args.overrides)
        if ranks != config.launch.processes_per_node:
            changes.append(f"launch.processes_per_node={ranks}")
            config = load_config(args.config, changes)
    started = time.monotonic()
    common = ["--config", args.config, *changes]
    run("data_tools.precompute_latents", *common)
    run("data_tools.fid_reference", *common)
    run("uvit_dist.launch", *common)
    run("uvit_dist.launch", *common, "--job", "evaluate")
    run("uvit_dist.launch", *common, "--job", "evaluate", UNTRAINED)

    trained, untrained = scores_of(config.run_dir, "ema"), scores_of(config.run_dir, "untrained")
    metrics = str(Path(config.run_dir, "metrics.jsonl"))
    print(f"\n{trained['samples']} samples in the feature space {trained['feature_space']}\n")
    print(table(trained, untrained))
    print(f"\nsamples: {trained['grid']}\nmetrics: {metrics}")
    good, control = passes(trained), passes(untrained)
    if not all(good) or any(control):
        print(
            f"the demo failed: (class accuracy at least {MIN_CLASS_ACCURACY}, recall at least {MIN_RECALL}, "
            f"distance at most {MAX_DISTANCE_RATIO} times the halves') is {good} for the trained weights, which must "
            f"have all, and {control} for the untrained, which must have none",
            file=sys.stderr,
        )
        sys.exit(1)
    names = ("class_accuracy", "frechet_distance", "frechet_distance_real_halves", "recall", "samples")
    summary = {name: trained[name] for name in names}
    seconds = round(time.monotonic() - started, 1)
    print(
        json.dumps(
            {**summary, "steps": trained["step"], "seconds": seconds, "grid": trained["grid"], "metrics": metrics}
        )
    )


if __name__ == "__main__":
    main()
