"""A real four-node SLURM on one Linux machine: ``python -m slurm.rehearsal``."""
