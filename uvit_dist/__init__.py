"""Train, sample and score U-ViT diffusion models at scale (arXiv 2209.12152)."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvit_dist.models.uvit import UViT
    from uvit_dist.pipeline import UViTPipeline

__version__ = "0.1.0"
__all__ = ["UViT", "UViTPipeline", "__version__"]

if sys.argv and (sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("uvit-")):  # a command, not a program
    from uvit_dist import misfits

    misfits.explain_uncaught()


def __getattr__(name: str) -> Any:
    """The classes for use in programs, imported when they are asked for: commands that need no torch start at once."""
    if name == "UViT":
        from uvit_dist.models.uvit import UViT

        return UViT
    if name == "UViTPipeline":
        from uvit_dist.pipeline import UViTPipeline

        return UViTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
