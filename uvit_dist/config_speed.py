"""The sections of the configuration on how fast a step is, which leave alone what it computes, and on its profile."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from uvit_dist.config_data import Section
from uvit_dist.config_rules import raise_broken


class SpeedConfig(Section):
    """How a training step is carried out. Each key changes rounding at most."""

    compile: bool = Field(False, description="compile each block of the network with torch.compile")
    cuda_graphs: bool = Field(
        False, description="replay compiled blocks as CUDA graphs, for small batches (GPU only, zero.stage 1 or 2)"
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = Field(
        "auto", description="kernel of the attention; 'auto': torch's choice"
    )
    prefetch: bool = Field(
        True, description="copy batches to the GPU from pinned memory, on a stream of their own; changes no number"
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="dense bf16 peak of a GPU, TFLOP/s, for mfu in the log; none: known by the GPU's name"
    )

    @model_validator(mode="after")
    def _check(self) -> SpeedConfig:
        raise_broken([(self.compile or not self.cuda_graphs, "cuda_graphs needs compile true")])
        return self


class ProfileConfig(Section):
    """Which steps are traced by torch's profiler."""

    steps: str | None = Field(
        None, description="'20:25' traces the five steps from 20 on, counted from 0; none: no profile"
    )
    ranks: list[Annotated[int, Field(ge=0)]] = Field([0], description="ranks that trace themselves, each for itself")

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        raise_broken(
            [
                (
                    self.steps is None or self.span is not None,
                    f"steps {self.steps!r}: write first:end with first < end, as 20:25 for the steps 20 to 24",
                )
            ]
        )
        return self

    @property
    def span(self) -> tuple[int, int] | None:
        """First step and end, counted from 0, the end not included; none where nothing is to be traced."""
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.steps or "")
        if found is None:
            return None
        first, end = int(found[1]), int(found[2])
        return (first, end) if first < end else None
