"""What the paper's ablations change of the loss on the digits: runs that saw the same samples, noises and times.

for name in skips no_skip no_conv mlp_time; do
  .venv/bin/python -m uvit_dist.launch --config configs/ablations/digits_$name.yaml
done
.venv/bin/python -m benchmarks.ablations --out benchmarks/results/ablations.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import ROOT, provenance
from uvit_dist.errors import MissingInputError, explained_exit

RUNS = {"skips": "U-ViT", "no_skip": "no long skips", "no_conv": "no 3x3 convolution", "mlp_time": "time by an MLP"}
SPAN = 250
"""Steps that one mean is over."""


def spans(records: list[dict[str, Any]]) -> dict[str, float]:
    """Mean training loss of each span of steps, by its first and last step."""
    last = max(record["step"] for record in records)
    return {
        f"{first + 1}-{first + SPAN}": fmean(r["loss"] for r in records if first < r["step"] <= first + SPAN)
        for first in range(0, last, SPAN)
    }


def at_the_end(records: list[dict[str, Any]]) -> list[float]:
    """Mean loss of the last span in each part of the time axis, the one nearest the data first."""
    last = max(record["step"] for record in records) - SPAN
    rows = [record["loss_by_timestep"] for record in records if record["step"] > last]
    return [fmean(value for value in column if value is not None) for column in zip(*rows, strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/ablations", help="where the runs lie")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    with explained_exit():
        results = {}
        for name in RUNS:
            path = args.runs / f"digits_{name}" / "metrics.jsonl"
            if not path.exists():
                raise MissingInputError(f"{path}: no such file; run configs/ablations/digits_{name}.yaml first")
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            records = list({line["step"]: line for line in lines}.values())  # a resumed run writes steps again
            results[name] = {"loss": spans(records), "loss_by_timestep_at_the_end": at_the_end(records)}
    columns = list(results["skips"]["loss"])
    print("steps".ljust(20), *(column.rjust(10) for column in columns))
    for name, label in RUNS.items():
        print(label.ljust(20), *(f"{results[name]['loss'][column]:10.4f}" for column in columns))
    if args.out:
        args.out.write_text(
            json.dumps({"command": "python -m benchmarks.ablations", **provenance(), "runs": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
