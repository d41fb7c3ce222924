"""Export the weights of a checkpoint as safetensors, with their configuration, origin and hashes; needs no DeepSpeed.

    python -m uvit_dist.export --run-dir runs/digits_demo --out ema.safetensors
    python -m uvit_dist.export --run-dir runs/digits_demo --out uvit-s-digits
    python -m uvit_dist.export --run-dir runs/digits_demo --kind master --step 500 --out s3://bucket/raw.safetensors

--out with another end than .safetensors is a folder as on the Hugging Face Hub: model.safetensors, config.json and a
model card with the scores on record. The metadata of the file are described in uvit_dist/export_weights.py.
"""

from __future__ import annotations

import argparse

from uvit_dist.errors import explained_exit
from uvit_dist.export_weights import export_folder, export_weights


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", required=True, help="directory of the run")
    parser.add_argument("--out", required=True, help="file (.safetensors) or folder to write: a path or URL")
    parser.add_argument(
        "--kind", default="ema", choices=["ema", "master"], help="which weights: averaged (default), or raw"
    )
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest whole one)")
    parser.add_argument(
        "--verify", default="hash", choices=["size", "hash"], help="what is checked of it before (default: hash)"
    )
    args = parser.parse_args()
    with explained_exit():
        write = export_weights if args.out.endswith(".safetensors") else export_folder
        step = write(args.run_dir, args.out, args.kind, args.step, args.verify)
    print(f"{args.out}: {args.kind} weights of step {step}")


if __name__ == "__main__":
    main()
