"""Export the EMA weights of a checkpoint as safetensors with their configuration; needs no DeepSpeed.

python -m uvit_dist.export --run-dir runs/digits_demo --out ema.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from uvit_dist.checkpoint import export_weights
from uvit_dist.errors import explained_exit


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="directory of the run")
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--kind", default="ema", choices=["ema", "master"], help="which weights (default: ema)")
    args = parser.parse_args()
    with explained_exit():
        step = export_weights(args.run_dir, args.out, args.kind)
    print(f"{args.out}: {args.kind} weights of step {step}")


if __name__ == "__main__":
    main()
