"""Evaluation in its parts: what is evaluated, the images of a chunk, scoring, sweeps."""
