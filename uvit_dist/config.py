"""The configuration: frozen, typed sections, and the rules between them. ``config_yaml`` reads and writes it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Rule = tuple[bool, str]
"""(whether it holds, what to say if not)"""


class Section(BaseModel):
    """One section of the configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The network, in the names of the official ``nnet`` configurations."""

    img_size: int = Field(gt=0, description="height and width of the network's input, in latent (or image) pixels")
    patch_size: int = Field(gt=0, description="side of a patch, in the same pixels")
    in_chans: int = Field(4, gt=0, description="channels of the input: 4 for Stable Diffusion latents, 3 for images")
    embed_dim: int = Field(gt=0, description="width of a token")
    depth: int = Field(gt=0, description="number of blocks without the middle one: half before it, half after")
    num_heads: int = Field(gt=0, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's MLP over its width")
    qkv_bias: bool = Field(False, description="a bias on the query, key and value projection")
    mlp_time_embed: bool = Field(False, description="an MLP on the time embedding (ablation of the paper)")
    num_classes: int = Field(-1, ge=-1, description="labels, the null label included; -1: not class-conditional")
    clip_dim: int | None = Field(None, gt=0, description="width of a text token; none: not text-conditional")
    num_clip_token: int = Field(77, gt=0, description="number of text tokens")
    conv: bool = Field(True, description="a 3x3 convolution after unpatchify")
    skip: bool = Field(True, description="the long skip connections (off: ablation of the paper)")
    use_checkpoint: bool = Field(False, description="recompute activations in the backward pass")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        rules = [
            (
                self.img_size % self.patch_size == 0,
                f"img_size {self.img_size} must be divisible by patch_size {self.patch_size}",
            ),
            (
                self.embed_dim % self.num_heads == 0,
                f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}",
            ),
            (self.embed_dim % 2 == 0, f"embed_dim {self.embed_dim} must be even (half cosines, half sines)"),
            (
                self.depth % 2 == 0,
                f"depth {self.depth} must be even: each block before the middle has one after it",
            ),
            (self.num_classes != 0, "num_classes must be -1 (not class-conditional) or positive"),
            (self.num_classes < 0 or self.clip_dim is None, "num_classes and clip_dim exclude each other"),
        ]
        _raise_broken(rules)
        return self


class DiffusionConfig(Section):
    """The noise schedule and the objective."""

    schedule: Literal["discrete_sd"] = Field("discrete_sd", description="noise schedule: Stable Diffusion's 1000 steps")
    label_dropout: float = Field(0.0, ge=0, lt=1, description="share of labels replaced by null_label in training")
    null_label: int | None = Field(None, ge=0, description="the label that means 'no class'; needed for guidance")


class DataConfig(Section):
    """The training samples: how they are made, where they are, in which order they are read."""

    source: str = Field(description="'digits' (scikit-learn's), or a folder with one folder of images for each class")
    image_size: int = Field(gt=0, description="side of the images that were encoded, pixels")
    crop: Literal["none", "adm"] = Field("adm", description="'adm': centre crop of the ADM code; 'none': as they are")
    mirror: bool = Field(True, description="store each image's mirror image as a sample of its own")
    moments_dtype: Literal["float16", "float32"] = Field("float16", description="type of the stored moments")
    samples_per_shard: int = Field(4096, gt=0, description="samples in a shard")
    index: str = Field(description="path of the index of the shards")
    lanes: int = Field(gt=0, description="parallel reading lanes; divides the batch; valid world sizes divide it")
    block_size: int = Field(1024, gt=0, description="samples read and shuffled together within a lane")
    prefetch_blocks: int = Field(1, ge=0, description="blocks read ahead in each lane; changes nothing but time")
    read_threads: int = Field(4, gt=0, description="threads that read, per rank; changes nothing but time")


class AutoencoderConfig(Section):
    """The autoencoders: encoding and decoding ones may differ, as in the paper's H systems."""

    encoder: str = Field(description="path of the encoding autoencoder")
    decoder: str = Field(description="path of the decoding autoencoder")
    encoder_fingerprint: str | None = Field(None, description="hash of the encoder, where its file is not at hand")
    scale_factor: float = Field(gt=0, description="latents are multiplied by it: 1/std of the data set's latents")


class OptimizerConfig(Section):
    """AdamW with a constant rate after linear warm-up."""

    lr: float = Field(gt=0, description="learning rate after warm-up")
    betas: tuple[float, float] = Field((0.99, 0.99), description="Adam's decay rates of the moments")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.03, ge=0, description="decoupled weight decay, on every parameter")
    warmup_steps: int = Field(5000, ge=0, description="steps of linear warm-up; the first update has rate 0")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm; none: no clipping")

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        _raise_broken([(all(0 <= b < 1 for b in self.betas), f"betas {list(self.betas)} must lie in [0, 1)")])
        return self


class EmaConfig(Section):
    """The exponential moving average of the weights, in fp32."""

    decay: float = Field(0.9999, ge=0, lt=1, description="decay at each step")
    warmup: bool = Field(False, description="decay min(decay, (1 + step) / (10 + step)): for short runs")


class TrainConfig(Section):
    """How long, and in which pieces."""

    steps: int = Field(gt=0, description="optimizer updates")
    global_batch_size: int = Field(gt=0, description="samples per update, over all ranks")
    micro_batch_size: int = Field(gt=0, description="samples per rank in one forward pass")
    precision: Literal["fp32", "bf16_autocast", "bf16"] = Field(
        "bf16_autocast",
        description="fp32; fp32 weights under bf16 autocast; or bf16 weights (and gradient sums) with fp32 masters",
    )
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    deterministic: bool = Field(False, description="deterministic kernels on GPUs")
    trace: bool = Field(False, description="write every step's sample ids, timesteps, labels and noise to trace.jsonl")


class ZeroConfig(Section):
    """DeepSpeed's ZeRO: what is sharded over the ranks."""

    stage: Literal[0, 1, 2, 3] = Field(1, description="0 nothing; 1 optimizer; 2 and gradients; 3 and weights")
    bucket_size: int = Field(25_000_000, gt=0, description="elements in a bucket of gradients")
    overlap_comm: bool = Field(True, description="reduce gradients beside the backward pass (GPU only)")


class CheckpointConfig(Section):
    """When the state is saved, and how much of it is kept."""

    every: int = Field(gt=0, description="steps between checkpoints")
    keep: int = Field(2, ge=2, description="newest checkpoints kept; at least two")
    verify: Literal["size", "hash"] = Field("hash", description="what is checked of a checkpoint before it is loaded")


class SampleConfig(Section):
    """How images are generated."""

    solver: Literal["dpm_solver_pp"] = Field("dpm_solver_pp", description="DPM-Solver++, third order, single step")
    steps: int = Field(50, gt=2, description="calls of the network for each image")
    cfg_scale: float = Field(0.0, ge=0, description="s in cond + s * (cond - uncond); 0: no guidance")


class EvaluateConfig(Section):
    """What is generated and how it is scored."""

    samples: int = Field(50_000, ge=10, description="images generated")
    sub_batch_size: int = Field(50, gt=0, description="images in one forward pass: a part of the protocol")
    chunk_size: int = Field(250, gt=0, description="images in a unit of work; a multiple of sub_batch_size")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of noise and labels, by image id")
    features: Literal["digits_pixels_8x8"] = Field("digits_pixels_8x8", description="the feature space of the scores")
    reference: str = Field(description="path of the reference statistics")
    neighbours: int = Field(5, gt=0, description="k of the nearest-neighbour classifier and of recall")
    weights: Literal["ema", "model", "untrained"] = Field("ema", description="'untrained' is the control")
    grid_rows: int = Field(10, gt=0, description="rows of the picture of samples, ten images in each")

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        _raise_broken(
            [
                (
                    self.chunk_size % self.sub_batch_size == 0,
                    f"chunk_size {self.chunk_size} must be divisible by sub_batch_size {self.sub_batch_size}",
                )
            ]
        )
        return self


class LaunchConfig(Section):
    """Where the job runs."""

    target: Literal["local", "slurm"] = Field("local", description="processes on this machine, or a SLURM job")
    nodes: int = Field(1, gt=0, description="machines")
    processes_per_node: int = Field(gt=0, description="ranks on each machine, one for each GPU")
    timeout_s: float = Field(600.0, gt=0, description="seconds a collective may take before the ranks give up")


class Config(Section):
    """The whole configuration."""

    run_dir: str = Field(description="directory of everything the run writes")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of initialisation, order, noise, timesteps and dropout")
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    autoencoder: AutoencoderConfig
    optimizer: OptimizerConfig
    ema: EmaConfig = EmaConfig()
    train: TrainConfig
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig
    launch: LaunchConfig

    @property
    def world_size(self) -> int:
        """Number of ranks that the launch section asks for."""
        return self.launch.nodes * self.launch.processes_per_node

    @model_validator(mode="after")
    def _check(self) -> Config:
        _raise_broken(rules_between({name: getattr(self, name) for name in type(self).model_fields}))
        return self


def rules_between(sections: Mapping[str, Any]) -> list[Rule]:
    """The rules that concern several sections, as (holds, message): those whose sections are all given."""
    rules: list[Rule] = []
    for group in (_label_rules, _precision_rules, _path_rules, _launch_rules):
        with contextlib.suppress(KeyError):
            rules += group(sections)
    return rules


def _label_rules(sections: Mapping[str, Any]) -> list[Rule]:
    model, diffusion, sample = sections["model"], sections["diffusion"], sections["sample"]
    null, last = diffusion.null_label, model.num_classes - 1
    return [
        (model.clip_dim is None, "model.clip_dim: shards with text contexts are not supported"),
        (
            null is None or null == last,
            f"diffusion.null_label {null} must be the last label, {last} = model.num_classes - 1",
        ),
        (
            diffusion.label_dropout == 0 or null is not None,
            f"diffusion.label_dropout {diffusion.label_dropout} needs diffusion.null_label",
        ),
        (
            sample.cfg_scale == 0 or null is not None,
            f"sample.cfg_scale {sample.cfg_scale} needs diffusion.null_label",
        ),
    ]


def _precision_rules(sections: Mapping[str, Any]) -> list[Rule]:
    return [
        (
            sections["train"].precision != "bf16" or sections["zero"].stage > 0,
            "train.precision bf16 needs zero.stage 1, 2 or 3, which keep its fp32 master weights",
        ),
    ]


def _path_rules(sections: Mapping[str, Any]) -> list[Rule]:
    return [("://" not in sections["run_dir"], f"run_dir {sections['run_dir']} must be a local path, not a URL")]


def _launch_rules(sections: Mapping[str, Any]) -> list[Rule]:
    launch = sections["launch"]
    return [
        (
            launch.target != "local" or launch.nodes == 1,
            f"launch.nodes {launch.nodes}: launch.target local is this machine alone; set launch.nodes 1",
        ),
        *batch_rules(sections["train"], sections["data"], launch.nodes * launch.processes_per_node),
    ]


def batch_rules(train: TrainConfig, data: DataConfig, world_size: int) -> list[Rule]:
    """The batch arithmetic as (holds, message): the batch over lanes, ranks and micro-batches."""
    batch, micro, lanes = train.global_batch_size, train.micro_batch_size, data.lanes
    divisors = [n for n in range(1, lanes + 1) if lanes % n == 0 and batch % (n * micro) == 0]
    return [
        (batch % lanes == 0, f"train.global_batch_size {batch} must be divisible by data.lanes {lanes}"),
        (
            lanes % world_size == 0,
            f"launch: {world_size} ranks must divide data.lanes {lanes}; valid numbers of ranks: {divisors}",
        ),
        (
            batch % (micro * world_size) == 0,
            f"train.global_batch_size {batch} must be divisible by train.micro_batch_size x ranks "
            f"= {micro} x {world_size} = {micro * world_size}",
        ),
    ]


def _raise_broken(rules: Sequence[Rule]) -> None:
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def config_hash(section: BaseModel) -> str:
    """sha256 of a section's values, 16 hexadecimal digits."""
    return hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:16]
