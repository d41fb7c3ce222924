"""What the fork server imports once, so that no rank pays for importing torch, deepspeed and diffusers."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import uvit_dist.evaluate
import uvit_dist.sample
import uvit_dist.train  # noqa: F401
