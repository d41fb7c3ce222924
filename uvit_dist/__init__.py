"""Train, sample and score U-ViT diffusion models at scale (arXiv 2209.12152)."""

__version__ = "0.1.0"
