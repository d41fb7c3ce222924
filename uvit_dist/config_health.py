"""The sections of the configuration on what watches over hardware: slow ranks, and whose fault a bad step was."""

from __future__ import annotations

from pydantic import Field

from uvit_dist.config_data import Section


class StragglersConfig(Section):
    """Ranks whose forward passes take longer than the others'."""

    every: int | None = Field(50, gt=0, description="steps between comparisons of the ranks' times; none: never")
    ratio: float = Field(1.3, gt=1, description="a rank that takes so many times the median of the others is slow")
    gathers: int = Field(3, gt=0, description="comparisons in a row for which a rank must be slow before it is named")
    exclude: bool = Field(False, description="ask SLURM for no host that was named, when the job is next queued")


class AttributionConfig(Section):
    """Whose fault a bad step was: the hardware's, or that of data and optimization. It changes no number."""

    replay: bool = Field(
        False,
        description="compute suspicious steps (not finite, or a spike) again before their update, and compare each "
        "rank's gradients bit for bit (train.deterministic); every step then pays for checksums of its gradients",
    )
    replay_every: int | None = Field(None, gt=0, description="steps between replays of steps that are not suspicious")
    spike: float = Field(
        8.0, gt=0, description="a loss or gradient norm so many standard deviations above the last ones' mean is one"
    )
    window: int = Field(50, gt=1, description="steps that the mean and deviation are taken of; fewer do not tell")
    disagreements: int = Field(
        3, gt=0, description="steps in which a host's results were wrong before the run ends, naming it; until then "
        "such a step is done again"
    )  # fmt: skip
    weights_every: int | None = Field(
        None, gt=0, description="steps between comparisons of the weights that ranks have in common (zero.stage 0 to 2)"
    )
