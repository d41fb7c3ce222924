"""What works here, what does not, and what to type, on one page.

    python -m uvit_dist.doctor
    python -m uvit_dist.doctor --config configs/uvit_h_imagenet512.yaml run_dir=/scratch/me/run
    python -m uvit_dist.doctor --config configs/digits_demo.yaml --problems

Without --config: Python, packages, GPUs, NCCL, DeepSpeed, compiler, disk, limits, SLURM. With it also whatever the
configuration names: data, server, weights, references, cluster. Nothing is changed, fetched or submitted.

Exit codes: 0 nothing is wrong (there may be warnings); else that of the problem to mend first: 78 the machine, its
packages or the configuration; 73 something cannot be written; 66 a missing file; 65 damaged or contradicting data; 69
a server or a device that does not answer.
"""

from __future__ import annotations

from uvit_dist.doctor.command import run


def main() -> None:
    """The command line."""
    run(__doc__)


if __name__ == "__main__":
    main()
