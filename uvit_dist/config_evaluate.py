"""The sections of the configuration on evaluation: what is generated, how it is scored, and sweeps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from uvit_dist.config_data import Section
from uvit_dist.config_rules import raise_broken
from uvit_dist.scores.kinds import OF_INCEPTION, OF_PIXELS

Solver = Literal["dpm_solver_pp", "dpm_solver", "euler_maruyama_sde", "euler_maruyama_ode"]


Score = Literal["fid", "adm_fid", "sfid", "inception_score", "precision", "recall", "kid", "clip_score",
                "frechet_distance", "class_accuracy"]  # fmt: skip


class SweepConfig(Section):
    """Values that an evaluation tries in the place of those of the sample section: all combinations of them."""

    cfg_scale: tuple[float, ...] = Field((), description="values of sample.cfg_scale; none: that one alone")
    steps: tuple[int, ...] = Field((), description="values of sample.steps")
    solver: tuple[Solver, ...] = Field((), description="values of sample.solver")

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        raise_broken(
            [
                (all(scale >= 0 for scale in self.cfg_scale), f"cfg_scale {list(self.cfg_scale)} must be 0 or more"),
                (all(steps > 1 for steps in self.steps), f"steps {list(self.steps)} must be above 1"),
            ]
        )
        return self


class EvaluateConfig(Section):
    """What is generated and how it is scored."""

    samples: int = Field(50_000, ge=10, description="images generated")
    sub_batch_size: int = Field(50, gt=0, description="images in one forward pass: a part of the protocol")
    chunk_size: int = Field(250, gt=0, description="images in a unit of work; a multiple of sub_batch_size")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of noise and labels, by image id")
    features: Literal["inception", "pixels_8x8", "digits_pixels_8x8"] = Field(
        "inception", description="the feature space of the scores; FID is that of Inception alone"
    )
    inception: str | None = Field(None, description="path or URL of pt_inception-2015-12-05-6726825d.pth")
    inception_sha256: str | None = Field(None, description="hash of that file; a URL must have one")
    scores: tuple[Score, ...] | None = Field(
        None,
        description="what is scored; none: FID, or in spaces other than Inception's the Frechet distance, recall and "
        "class accuracy. All but fid, the paper's, and clip_score are as ADM's evaluator has them",
    )
    compared: int = Field(
        10_000, gt=1, description="images, those of the lowest ids, that precision, recall, KID and class accuracy use"
    )
    reference: str = Field(description="path of the reference statistics: ours, or the official .npz of mu and sigma")
    adm_reference: str | None = Field(
        None, description="ADM's reference batch (.npz), for the scores after its resize; none: reference has them too"
    )
    reference_images: int | None = Field(None, gt=0, description="images that reference must be of; none: any number")
    clip: str | None = Field(None, description="path or URL of the weights of the CLIP that clip_score is of")
    clip_sha256: str | None = Field(None, description="hash of that file; a URL must have one")
    clip_model: str = Field("ViT-L-14-quickgelu", description="open_clip's name of that model")
    labels: Literal["uniform", "frequency"] = Field(
        "uniform", description="classes asked for: evenly, or as often as in the training set (ImageNet 64)"
    )
    captions: str | None = Field(None, description="index of the samples whose captions are asked for (text systems)")
    checkpoint: str | None = Field(
        None, description="weights to evaluate: a run, a step of one, or an export; none: the newest of run_dir"
    )
    neighbours: int = Field(5, gt=0, description="k of the nearest-neighbour classifier and of recall")
    weights: Literal["ema", "model", "untrained"] = Field("ema", description="'untrained' is the control")
    grid_rows: int = Field(10, gt=0, description="rows of the picture of samples, ten images in each")
    save_samples: bool = Field(False, description="keep all images: webdataset shards of PNG files, one for each chunk")
    small_samples: int | None = Field(
        None,
        ge=10,
        description="score so many images first, and all of evaluate.samples only where no other checkpoint of the run "
        "scored better on as many: for jobs that follow training",
    )
    sweep: SweepConfig = Field(
        SweepConfig(), description="values of the sample section to score in turn, as launch --sweep gives them"
    )
    lease_s: float = Field(
        60.0, gt=0, description="seconds of silence after which another worker takes over a worker's chunk"
    )

    @property
    def asked(self) -> tuple[str, ...]:
        """The scores that are made, as far as the reference allows where none are named."""
        default = ("fid",) if self.features == "inception" else ("frechet_distance", "recall", "class_accuracy")
        return self.scores if self.scores is not None else default

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        possible = OF_INCEPTION if self.features == "inception" else OF_PIXELS
        raise_broken(
            [
                (
                    set(self.asked) <= set(possible) and len(self.asked) > 0,
                    f"scores {list(self.asked)} must be some of {', '.join(possible)}, with features {self.features}",
                ),
                (
                    "clip_score" not in self.asked or self.clip is not None,
                    f"scores: clip_score needs the weights of {self.clip_model}: set clip",
                ),
                (
                    self.chunk_size % self.sub_batch_size == 0,
                    f"chunk_size {self.chunk_size} must be divisible by sub_batch_size {self.sub_batch_size}",
                ),
                (
                    self.small_samples is None or self.small_samples < self.samples,
                    f"small_samples {self.small_samples} must be less than samples {self.samples}",
                ),
                (
                    self.small_samples is None or self.sweep == SweepConfig(),
                    "small_samples and sweep exclude each other: a sweep scores evaluate.samples at each point",
                ),
            ]
        )
        return self
